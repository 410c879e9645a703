# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fed_trainer.output import checkpoint
from fed_trainer.output.checkpoint import load_adapter, refuse_another_run, rotate_checkpoints, write_checkpoint
from fed_trainer.output.digests import find_damage


STATE = {"a": torch.randn(3, 2), "b": torch.randn(4).to(torch.bfloat16)}


def write_state(folder: Path) -> None:
    save_file(STATE, folder / "adapter_model.safetensors")
    (folder / "federation.json").write_text('{"rounds": []}')


def write_half(folder: Path) -> None:
    save_file(STATE, folder / "adapter_model.safetensors")
    raise OSError("No space left on device")


def rounds(output_dir: Path, *numbers: int) -> None:
    for number in numbers:
        write_checkpoint(output_dir, number, write_state)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | bool) -> Path:
    found, content = checkpoint.find_checkpoint(output_dir, resume_from_checkpoint, lambda folder: folder.name)
    assert content == found.name
    return found


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) - {"digests.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Writing


def test_write_creates_the_folder_of_the_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "new" / "run", 3, write_state)
    assert folder == tmp_path / "new" / "run" / "checkpoint-3"
    assert names(folder) == {"adapter_model.safetensors", "federation.json"}
    assert names(folder.parent) == {"checkpoint-3"}


def test_folder_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    seen = []

    def write(folder: Path) -> None:
        write_state(folder)
        seen.append(find_checkpoint(tmp_path, True).name)
        assert folder.parent == tmp_path  # the same file system, or renaming would be copying

    rounds(tmp_path, 1)
    write_checkpoint(tmp_path, 2, write)
    assert seen == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, True).name == "checkpoint-2"


def test_failed_write_leaves_the_previous_one(tmp_path: Path) -> None:
    rounds(tmp_path, 1)
    before = contents(tmp_path / "checkpoint-1")
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 2, write_half)
    assert not (tmp_path / "checkpoint-2").exists()
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-1"
    assert contents(tmp_path / "checkpoint-1") == before

    rounds(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}
    assert contents(tmp_path / "checkpoint-2") == before


def test_leftovers_do_not_end_up_in_the_next_attempt(tmp_path: Path) -> None:
    def write_other(folder: Path) -> None:
        (folder / "half.json").write_text("{")
        write_half(folder)

    with pytest.raises(OSError):
        write_checkpoint(tmp_path, 1, write_other)
    rounds(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-1"}
    assert names(tmp_path / "checkpoint-1") == {"adapter_model.safetensors", "federation.json"}


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "file"])
def test_nothing_that_is_there_is_written_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint-2"
    if kind == "checkpoint":
        rounds(tmp_path, 2)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("of the user")
    with pytest.raises(FileExistsError, match="checkpoint-2' is there already, and a run writes over nothing"):
        write_checkpoint(tmp_path, 2, write_half)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# Rotating


def test_rotation_keeps_the_newest_by_number(tmp_path: Path) -> None:
    rounds(tmp_path, 11, 1, 9, 10, 2)  # neither the order of the names nor of the times
    rotate_checkpoints(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-11"}
    rotate_checkpoints(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-11"}


@pytest.mark.parametrize("limit", [None, 0, -1, 3, 4])
def test_rotation_within_the_limit(tmp_path: Path, limit: int | None) -> None:
    rounds(tmp_path, 1, 2, 3)
    rotate_checkpoints(tmp_path, limit)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_rotation_deletes_checkpoints_only(tmp_path: Path) -> None:
    rounds(tmp_path, 1, 2)
    for other in ("checkpoint-best", "my-checkpoint-1", "runs"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-0").write_text("a file")
    rotate_checkpoints(tmp_path, 1)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-best", "my-checkpoint-1", "runs", "checkpoint-0"}


# Finding


def test_true_finds_the_newest_by_number(tmp_path: Path) -> None:
    rounds(tmp_path, 10, 9, 1)
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-10"
    assert find_checkpoint(str(tmp_path), True) == tmp_path / "checkpoint-10"


def test_path_finds_that_one(tmp_path: Path) -> None:
    rounds(tmp_path / "run", 1, 2)
    for path in (tmp_path / "run" / "checkpoint-1", str(tmp_path / "run" / "checkpoint-1")):
        assert find_checkpoint(tmp_path / "elsewhere", path) == tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize("output_dir", [".", "missing"])
def test_nothing_to_resume(tmp_path: Path, output_dir: str) -> None:
    with pytest.raises(ValueError) as error:
        find_checkpoint(tmp_path / output_dir, True)
    assert str(error.value) == (
        f"`resume_from_checkpoint=True`, but there is no checkpoint in {str(tmp_path / output_dir)!r}. Start the run with "
        "`trainer.train()`."
    )


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_path_that_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"which holds no adapter_model\.safetensors. Pass a `checkpoint-<round>` folder"
    ):
        find_checkpoint(tmp_path, str(tmp_path / name))


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rounds(tmp_path, 1, 2, 3, 4)
    os.truncate(tmp_path / "checkpoint-4" / "adapter_model.safetensors", 20)
    (tmp_path / "checkpoint-3" / "federation.json").unlink()
    kept = contents(tmp_path / "checkpoint-4")
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "damaged-checkpoint-3", "damaged-checkpoint-4"}
    assert contents(tmp_path / "damaged-checkpoint-4") == kept, "nothing that is on disk is lost"
    assert "checkpoint-4 is damaged (adapter_model.safetensors is not what was written)" in caplog.text
    assert "checkpoint-3 is damaged (federation.json is missing)" in caplog.text


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    rounds(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert find_damage(tmp_path / "checkpoint-1") == "adapter_model.safetensors is not what was written"
    with pytest.raises(
        ValueError, match="checkpoint-1' is damaged: adapter_model.safetensors is not what was written"
    ):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        find_checkpoint(tmp_path, True)
    assert names(tmp_path) == {"checkpoint-1"}


def test_files_of_clients_are_missed_and_measured(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_state(folder)
        (folder / "clients").mkdir()
        save_file(STATE, folder / "clients" / "a.safetensors", metadata={"client": "a"})

    folder = write_checkpoint(tmp_path, 1, write)
    assert find_damage(folder) is None
    (folder / "notes.txt").write_text("of the user")
    assert find_damage(folder) is None
    os.truncate(folder / "clients" / "a.safetensors", 3)
    assert find_damage(folder) == "clients/a.safetensors is not what was written"


@pytest.mark.parametrize("content", [None, "{half"])
def test_a_checkpoint_without_readable_digests_is_damaged(tmp_path: Path, content: str | None) -> None:
    rounds(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "digests.json"
    path.unlink() if content is None else path.write_text(content)
    assert "digests.json" in (find_damage(tmp_path / "checkpoint-1") or "")


# Loading


def test_load_adapter(tmp_path: Path) -> None:
    write_state(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        state = load_adapter(folder)
        assert state.keys() == STATE.keys()
        assert all(
            torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype for key, tensor in STATE.items()
        )


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        torch.save(Trap(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"There is no adapter_model\.safetensors in .* is not read\."):
        load_adapter(tmp_path)
    assert not (tmp_path / "unpickled").exists()

    # nor under the other name
    os.replace(tmp_path / "adapter_model.bin", tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="it is no safetensors file"):
        load_adapter(tmp_path)
    assert not (tmp_path / "unpickled").exists()


# Starting where something is


def test_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    rounds(tmp_path, 9, 10)
    with pytest.raises(FileExistsError) as error:
        refuse_another_run(tmp_path)
    assert str(error.value) == (
        f"`output_dir` {str(tmp_path)!r} already holds a run (checkpoint-10), which starting afresh would mix with this "
        "one. Continue it with `train(resume_from_checkpoint=True)`, choose another `output_dir`, or delete it."
    )


@pytest.mark.parametrize("beside", [None, "damaged-checkpoint-1"])
def test_folder_with_the_record_of_finished_rounds_is_refused(tmp_path: Path, beside: str | None) -> None:
    (tmp_path / "federation.json").write_text('{"rounds": [{"round": 1}]}')
    if beside is not None:
        (tmp_path / beside).mkdir()
    with pytest.raises(FileExistsError, match=r"already holds a run \(federation.json\)"):
        refuse_another_run(tmp_path)
    if beside is None:
        refuse_another_run(tmp_path, starts_again=True)
    else:
        with pytest.raises(
            ValueError, match=rf"damaged \(the last: {beside} was put aside\).* in another `output_dir`"
        ):
            find_checkpoint(tmp_path, True)


def test_folder_with_a_final_adapter_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path)
    with pytest.raises(FileExistsError, match=r"already holds a run \(adapter_model\.safetensors\)"):
        refuse_another_run(tmp_path)


def test_folder_without_a_run_is_fine(tmp_path: Path) -> None:
    refuse_another_run(tmp_path / "missing")
    refuse_another_run(tmp_path)
    with pytest.raises(OSError):  # died in its first round: nothing to continue
        write_checkpoint(tmp_path, 1, write_half)
    (tmp_path / "federation.json").write_text('{"rounds": []}')
    (tmp_path / "checkpoint-notes").mkdir()
    refuse_another_run(tmp_path)
