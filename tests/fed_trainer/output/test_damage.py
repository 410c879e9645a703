# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever file of a checkpoint is damaged, and however: it is named, and the checkpoint before is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from fed_trainer import FederatedTrainer
from fed_trainer.output import checkpoint
from fed_trainer.output.checkpoint import find_checkpoint, rotate_checkpoints, write_checkpoint
from fed_trainer.output.digests import find_damage, read_digests, write_digests
from fed_trainer.output.disk import DamagedFileError
from fed_trainer.trainers import checkpoints as round_checkpoints
from helpers.runs import flip_bit
from helpers.trainers import make
from peft_scl.foreign_files import read_tensors


class Before(TrainerCallback):
    """Calls something before the local step number `step`, or before the first round (0)."""

    may_differ = True

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.left, self.action = step, action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left == 0:
            self.action()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


@pytest.fixture(scope="module")
def make_trainer(tiny_model_dir):
    def make_one(output_dir: Path, callbacks=(), **settings) -> Any:
        given = {
            "num_rounds": 3,
            "max_steps": 1,
            "aggregation": "fedsa_lora",
            "server_optimizer": "fedadam",
            **settings,
        }
        given |= {"adapter": {"r": 2, "target_modules": ["v_proj"]}, "num_clients": 2, "rows": 8}
        return make(output_dir, tiny_model_dir, ".", callbacks=list(callbacks), **given)

    return make_one


@pytest.fixture(scope="module")
def finished(make_trainer, tmp_path_factory) -> FederatedTrainer:
    """A trainer whose run has three rounds; tests must not write to its folder."""
    trainer = make_trainer(tmp_path_factory.mktemp("runs") / "whole")
    trainer.train()
    return trainer


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the folder of that run."""
    return Path(shutil.copytree(finished.args.output_dir, tmp_path / "run"))


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_of_the_round_before(path: Path) -> None:
    older = Path(str(path).replace("checkpoint-3", "checkpoint-2"))
    if older.read_bytes() == path.read_bytes():  # of a tokenizer
        flip_bit(path, 0.5)
    else:
        shutil.copy(older, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": partial(flip_bit, where=0.5),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "gone": Path.unlink,
    "a directory": as_directory,
    "older": as_of_the_round_before,
}


def nothing_more(folder: Path) -> None:
    return None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_whichever_it_is(finished, run, damage):
    files = [path.relative_to(run / "checkpoint-3") for path in (run / "checkpoint-3").rglob("*") if path.is_file()]
    assert {str(path) for path in files} >= {
        "adapter_model.safetensors", "adapter_config.json", "federation.json", "federation.jsonl",
        "trainer_state.json", "digests.json", "server_state.safetensors", "clients/client_0.safetensors", "clients/client_1.safetensors",
    }  # fmt: skip
    for name in files:
        path = run / "checkpoint-3" / name
        intact = path.read_bytes()
        DAMAGES[damage](path)
        found = find_damage(run / "checkpoint-3")
        if damage == "longer" and path.name == "digests.json":
            assert found is None  # the same JSON
        elif damage in ("flipped", "older") and path.name == "digests.json":
            assert found is not None  # other digests: which file is named is up to them
        else:
            assert found is not None and str(name) in found, found
        path.rmdir() if path.is_dir() else None
        path.write_bytes(intact)
    assert find_damage(run / "checkpoint-3") is None


def test_files_of_clients_that_were_swapped_are_named(run):
    first, second = ((run / "checkpoint-3" / "clients" / f"client_{index}.safetensors") for index in range(2))
    assert first.stat().st_size == second.stat().st_size
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content), second.write_bytes(first_content)
    assert find_damage(run / "checkpoint-3") == "clients/client_0.safetensors is not what was written"
    digests = read_digests(run / "checkpoint-3")
    for name in digests:
        if name.startswith("clients/"):  # as the first versions had them
            digests[name] = f"{first.stat().st_size} bytes"
    (run / "checkpoint-3" / "digests.json").write_text(json.dumps(digests))
    found = find_damage(run / "checkpoint-3")
    assert found == "client_0.safetensors holds what client 'client_1' keeps"


def test_a_live_file_that_is_cut_off_damages_the_checkpoints_it_is_linked_into(finished, make_trainer, tmp_path):
    make_trainer(tmp_path / "run", num_rounds=2).train()
    path = tmp_path / "run" / ".fed_clients" / "client_0@2.safetensors"
    assert path.stat().st_nlink == 2
    os.truncate(path, 30)
    assert find_damage(tmp_path / "run" / "checkpoint-2") == "clients/client_0.safetensors is not what was written"
    assert find_damage(tmp_path / "run" / "checkpoint-1") is None
    again = make_trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert same_files(tmp_path / "run", finished.args.output_dir)
    assert (tmp_path / "run" / "damaged-checkpoint-2").is_dir()


def same_files(left: str | Path, right: str | Path) -> bool:
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in Path(folder).glob("*.safetensors")}
        | {path.relative_to(folder): path.read_bytes() for path in Path(folder, ".fed_clients").glob("*.safetensors")}
        for folder in (left, right)
    )
    return len(ours) == 3 and ours == theirs


DIGESTS = {
    "empty": "",
    "half": '{"adapter_model.safetensors": "',
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "no digests": "{}",
    "not by name": '{"adapter_model.safetensors": 3}',
    "not UTF-8": b"\xff\xfe{}",
    "outside": '{"../checkpoint-1/adapter_model.safetensors": "0"}',
    "absolute": '{"/etc/hostname": "0"}',
    "nested too deeply": "[" * 200_000,
    "a name twice": '{"README.md": "0", "README.md": "0"}',
}


@pytest.mark.parametrize("content", DIGESTS)
def test_digests_that_are_none_are_damage(run, content):
    path = run / "checkpoint-3" / "digests.json"
    text = DIGESTS[content]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "digests.json" in (find_damage(run / "checkpoint-3") or "")
    assert find_checkpoint(run, True, nothing_more)[0].name == "checkpoint-2"
    assert (run / "damaged-checkpoint-3" / "digests.json").is_file()


def test_digests_that_lack_an_entry_or_have_one_too_many_are_damage(run):
    folder = run / "checkpoint-3"
    digests = read_digests(folder)
    needed = [name for name in digests if "token" not in name and name != "README.md"]
    assert len(needed) >= 6
    for name in needed:
        fewer = {other: digest for other, digest in digests.items() if other != name}
        (folder / "digests.json").write_text(json.dumps(fewer))
        damage = find_damage(folder) or ""
        assert name in damage and "digests.json" in damage, damage
    (folder / "digests.json").write_text(json.dumps({**digests, "more.safetensors": "0"}))
    assert find_damage(folder) == "more.safetensors is missing"


def test_files_of_the_users_are_no_damage(run):
    folder = run / "checkpoint-3"
    (folder / "notes.txt").write_text("of the user")
    (folder / "plots").mkdir()
    assert find_damage(folder) is None


def test_what_cannot_be_opened_is_damage(run, monkeypatch):
    opened = open

    def refuses(path, *args, **kwargs):
        if "checkpoint-3" in str(path) and str(path).endswith(unreadable):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuses)
    monkeypatch.setattr("io.open", refuses)
    for unreadable in ("digests.json", "adapter_model.safetensors", "clients/client_1.safetensors"):
        assert find_damage(run / "checkpoint-3") == f"{unreadable} cannot be read (PermissionError)"


# Records whose digests are right, but which cannot be read: of a disk that lies, or of another version

RECORDS = {
    "federation.json": [
        "",
        "{",
        "[]",
        "3",
        '{"rounds": 3}',
        '{"rounds": [3]}',
        '{"rounds": [{"round": "x"}]}',
        '{"format": 2}',
        b"\xff",
    ],
    "federation.jsonl": ["{\n", "[]\n", "3\n", "\n", '{"round": 2}\n', '{"round": 1}\n{"round": 3}\n', b"\xff\n"],
    "trainer_state.json": ["", "{", "[]", "null", '{"of_another_version": 1}', b"\xff"],
    "adapter_model.safetensors": ["", "{", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:12]],
    "server_state.safetensors": ["", "no tensors"],
    "clients/client_0.safetensors": ["", "no tensors"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, contents in RECORDS.items() for content in contents]
)
def test_what_does_not_parse_is_damage(finished, run, caplog, monkeypatch, name, content):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = run / "checkpoint-3"
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_digests(folder, read_digests(folder))
    found, content = find_checkpoint(run, True, finished._checkpoints._read)
    assert found.name == "checkpoint-2" and content.folder == found
    assert f"checkpoint-3 is damaged ({Path(name).name if 'clients' in name else name}" in caplog.text.replace(
        "(clients/", "("
    )
    assert (run / "damaged-checkpoint-3" / name).is_file()


def test_a_file_of_tensors_without_a_client_is_damage(run):
    folder = run / "checkpoint-3"
    for metadata in (None, {"round": "1"}, {"kept_by": "client_0"}, {"kept_by": '{"client": "client_0"}'}):
        save_file({"x": torch.ones(1)}, folder / "clients" / "client_0.safetensors", metadata=metadata)
        write_digests(folder, read_digests(folder))
        assert (find_damage(folder) or "").startswith("client_0.safetensors cannot be read")


# Resuming


@pytest.mark.parametrize("name", ["clients/client_1.safetensors", "server_state.safetensors", "trainer_state.json"])
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(finished, make_trainer, run, name):
    flip_bit(run / "checkpoint-3" / name, 0.5)
    trainer = make_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    assert same_files(run, finished.args.output_dir)
    assert find_damage(run / "checkpoint-3") is None and find_damage(run / "damaged-checkpoint-3") is not None


def test_an_error_while_a_checkpoint_is_loaded_is_damage(finished, make_trainer, run, monkeypatch):
    def refuses(path, **kwargs):
        if "checkpoint-3" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return read_tensors(path, **kwargs)

    monkeypatch.setattr(round_checkpoints, "read_tensors", refuses)
    make_trainer(run).train(resume_from_checkpoint=True)
    assert same_files(run, finished.args.output_dir)
    assert (run / "damaged-checkpoint-3").is_dir()


def test_what_was_put_aside_earlier_stays(run):
    for number in (3, 2):
        (run / f"damaged-checkpoint-{number}").mkdir()
        (run / f"damaged-checkpoint-{number}" / "notes.txt").write_text("of the user")
        flip_bit(run / f"checkpoint-{number}" / "federation.json", 0.5)
    assert find_checkpoint(run, True, nothing_more)[0].name == "checkpoint-1"
    for number in (3, 2):
        assert (run / f"damaged-checkpoint-{number}" / "notes.txt").is_file()
        assert (run / f"damaged-checkpoint-{number}-2" / "federation.json").is_file()


def test_a_checkpoint_of_the_first_versions_is_resumed(finished, make_trainer, run):
    """
    They had the sizes of clients' files in place of digests, no rounds in them, and the live files in `clients/`.
    """
    shutil.rmtree(run / "checkpoint-3")
    folder = run / "checkpoint-2"
    digests = read_digests(folder)
    for name in digests:
        if name.startswith("clients/"):
            client = Path(name).stem
            save_file(load_file(folder / name), folder / name, metadata={"client": client})
            digests[name] = f"{(folder / name).stat().st_size} bytes"
    (folder / "digests.json").write_text(json.dumps(digests))
    shutil.move(run / ".fed_clients", run / "clients")
    make_trainer(run).train(resume_from_checkpoint=True)
    assert same_files(run, finished.args.output_dir)
    assert (run / "clients").is_dir(), "which may be anybody's"


# While a run trains


def test_a_client_file_that_is_damaged_during_a_run_ends_it_by_name(make_trainer, tmp_path):
    path = tmp_path / "run" / ".fed_clients" / "client_1@1.safetensors"
    trainer = make_trainer(tmp_path / "run", [Before(3, lambda: os.truncate(path, 30))])  # two steps per round
    with pytest.raises(DamagedFileError, match="What client 'client_1' keeps is damaged, .* is not what was written"):
        trainer.train()


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(*args: object, **kwargs: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("refuses", [full_disk, full_disk_of_safetensors])
@pytest.mark.parametrize("at", ["server_state", "client", "digests", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_leftovers(
    finished, make_trainer, tmp_path, monkeypatch, at, refuses
):
    run = tmp_path / "run"

    def fill() -> None:
        places = {
            "server_state": (round_checkpoints, "save_file"),
            "client": (Path, "write_bytes"),
            "digests": (checkpoint, "write_digests"),
            "rename": (checkpoint, "replace_durably"),
        }
        monkeypatch.setattr(*places[at], refuses)

    with pytest.raises(OSError, match=r"could not be written \(.*No space left on device.*The checkpoints .* whole"):
        make_trainer(run, [Before(3, fill)], save_total_limit=1).train()
    monkeypatch.undo()
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-1"]
    assert not list(run.glob(".checkpoint*")) and find_damage(run / "checkpoint-1") is None
    make_trainer(run, save_total_limit=1).train(resume_from_checkpoint=True)
    assert same_files(run, finished.args.output_dir)


def test_a_resumed_run_makes_room_before_it_writes(make_trainer, run):
    leftover = run / ".checkpoint-4.tmp"
    checkpoint.make_own(leftover)
    (leftover / "half.safetensors").write_bytes(b"x" * 100)
    seen: list[list[str]] = []
    names = lambda: seen.append(sorted(path.name for path in run.glob("*checkpoint-*")))  # noqa: E731
    make_trainer(run, [Before(0, names)], num_rounds=4, save_total_limit=2).train(resume_from_checkpoint=True)
    assert seen == [["checkpoint-2", "checkpoint-3"]]


# One checkpoint


def write_state(folder: Path) -> None:
    save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")
    (folder / "federation.json").write_text('{"rounds": []}')
    (folder / "clients").mkdir()
    save_file({"a": torch.ones(3)}, folder / "clients" / "a.safetensors", metadata={"client": "a"})


def test_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    synced: set[int] = set()
    replace = os.replace
    seen = []

    def watched(source, target):
        if Path(target).name == "checkpoint-1":
            paths = [
                Path(source),
                *(path for path in Path(source).rglob("*") if path.is_file() and path.name[0] != "."),
            ]
            seen.append([path.name for path in paths if path.stat().st_ino not in synced])
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", watched)
    write_checkpoint(tmp_path, 1, write_state)
    assert seen == [[]]
    assert tmp_path.stat().st_ino in synced


def test_the_old_checkpoint_stays_until_the_new_one_was_read_again(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, write_state)
    replace = os.replace

    def lies(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint-2":
            flip_bit(Path(target) / "adapter_model.safetensors", 0.5)

    monkeypatch.setattr(os, "replace", lies)
    with pytest.raises(
        OSError, match=r"checkpoint-2 is not what was written a moment ago: adapter_model\.safetensors"
    ):
        write_checkpoint(tmp_path, 2, write_state)
    assert find_checkpoint(tmp_path, True, nothing_more)[0].name == "checkpoint-1"


def test_rotation_deletes_nothing_outside_a_checkpoint(tmp_path):
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, number, write_state)
    (tmp_path / "thesis.txt").write_text("of the user")
    digests = read_digests(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "digests.json").write_text(json.dumps({**digests, "../thesis.txt": "0"}))
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("of the user")
    rotate_checkpoints(tmp_path, 1)
    assert (tmp_path / "thesis.txt").is_file()
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["notes.txt"]
