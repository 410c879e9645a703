# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A run deletes and writes over nothing that it has not written; what it writes can be read like other files."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fed_trainer.output.digests import find_damage
from helpers.paths import RECIPES
from helpers.runs import DiesAtStep


pytestmark = pytest.mark.trainer(
    adapter={"r": 2, "target_modules": ["v_proj"]}, num_clients=2, rows=8, num_rounds=1, max_steps=1
)


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("of the user")


def put_checkpoint_of_another_trainer(folder: Path) -> None:
    for name in ("optimizer.pt", "trainer_state.json"):
        put(folder / name)
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", [{}, {"aggregation": "fedsa_lora"}], ids=["fedavg", "fedsa_lora"])
def test_foreign_files_everywhere_outlive_start_resume_and_rotation(make_trainer, tmp_path, method):
    """Also in folders of former names, beside our files, and in those that are rotated away or put aside."""
    out = tmp_path / "out"
    for name in (
        "notes.txt", "clients/client_0.safetensors", "clients/rows.csv", "models/deep/model.safetensors", "checkpoint-best/x",
        "checkpoint-notes.txt", "damaged-checkpoint-2/x", ".checkpoint-2/x", ".fed_clients.old/x", "run.tmp", ".env",
    ):  # fmt: skip
        put(out / name)
    # only the folders of others' checkpoints are in the way of a start
    before = contents(out)
    settings = {**method, "save_total_limit": 1}
    make_trainer(**settings).train()
    put(out / "checkpoint-1" / "notes.txt")
    put(out / "checkpoint-1" / "clients" / "rows.csv")
    put_checkpoint_of_another_trainer(out / "checkpoint-500")
    before |= {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "user" in str(path.read_bytes())
    }
    before |= contents(out / "checkpoint-500")
    make_trainer(num_rounds=3, **settings).train(resume_from_checkpoint=True)
    os.truncate(out / "checkpoint-3" / "federation.json", 3)
    put(out / "checkpoint-3" / "more.txt")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        make_trainer(num_rounds=4, **settings).train(resume_from_checkpoint=True)
    after = contents(out)
    assert {path: after.get(path) for path in before} == before
    assert sorted(path.name for path in (out / "checkpoint-1").iterdir()) == ["clients", "notes.txt"]
    assert len(before) >= 16


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "private folder": (lambda out: put(out / ".fed_clients" / "x.txt"), r"\.fed_clients' holds what no run has written \(x"),
    "record": (lambda out: put(out / "federation.json"), "holds a federation.json that is not the record of a run"),
    "list as a record": (
        lambda out: (put(out / "federation.json"), (out / "federation.json").write_text("[]"))[0],
        "holds a federation.json that is not the record of a run",
    ),
    "rounds": (lambda out: put(out / "federation.jsonl"), "holds federation.jsonl, which this run has not written"),
    "card": (lambda out: put(out / "README.md"), "holds README.md, which this run has not written, and would write over"),
    "config": (lambda out: put(out / "config.json"), r"holds config\.json, which this run has not written"),
    "checkpoint": (
        lambda out: put_checkpoint_of_another_trainer(out / "checkpoint-500"),
        "holds checkpoint-500, which is no checkpoint of a federation",
    ),
    "place of a checkpoint": (lambda out: put(out / ".checkpoint-1.tmp" / "x"), r"\.checkpoint-1\.tmp' is in the way"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("resume", [False, True], ids=["start", "start by resuming"])
def test_what_a_start_would_write_over_is_refused_before_anything_is_written(make_trainer, tmp_path, kind, resume):
    act, message = REFUSED[kind]
    (tmp_path / "out").mkdir()
    act(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=message):
        make_trainer().train(resume_from_checkpoint=resume)
    assert {
        path: content for path, content in contents(tmp_path / "out").items() if ".fed_run." not in path.name
    } == before


@pytest.mark.parametrize("kind", ["private folder", "checkpoint of a later round", "place of a checkpoint"])
def test_what_a_resumed_run_would_write_over_is_refused(make_trainer, tmp_path, kind):
    out = tmp_path / "out"
    make_trainer().train()
    if kind == "checkpoint of a later round":
        put_checkpoint_of_another_trainer(out / "checkpoint-3")
        message = (
            "holds checkpoint-3, which is no checkpoint of a federation .* and this run would write one of that name"
        )
    else:
        act, message = REFUSED[kind]
        act(out)
    before = contents(out)
    with pytest.raises(FileExistsError, match=message):
        make_trainer(num_rounds=3).train(resume_from_checkpoint=True)
    assert contents(out) == before


# A run that always resumes


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty one"])
def test_a_run_that_is_always_resumed_starts_goes_on_and_ends(make_trainer, tmp_path, there, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[DiesAtStep()]).train(resume_from_checkpoint=True)
    assert f"The run in {str(tmp_path / 'out')!r} has not been started yet: it starts." in caplog.text
    make_trainer().train(resume_from_checkpoint=True)
    assert f"The run in {str(tmp_path / 'out')!r} died before its first checkpoint: it starts again." in caplog.text
    caplog.clear()
    trainer = make_trainer(num_rounds=2)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.record["rounds"]) == 2 and "starts" not in caplog.text
    assert find_damage(tmp_path / "out" / "checkpoint-2") is None


# Modes


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("method", ["fedsa_lora", "fedex_lora"])
def test_files_have_the_mode_that_other_programs_give_them(make_trainer, tmp_path, method, umask):
    trainer = make_trainer(aggregation=method, server_optimizer="fedadam" if method == "fedsa_lora" else "sgd")
    trainer.train()
    trainer.save_client_model("client_0", str(tmp_path / "out" / "client"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len([path for path in modes if path.suffix == ".safetensors"]) >= 4
    assert {path for path, mode in modes.items() if mode != 0o666 & ~umask} == set()
    assert os.umask(umask) == umask, "it is as it was"


# The demo


def test_the_demo_takes_a_folder_that_is_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(RECIPES / "offline"))
    import demo

    folder = str(tmp_path / "demo")
    assert demo.free_folder(folder) == folder
    for taken in ("demo", "demo-2"):
        put(tmp_path / taken / "federation.json")
    before = contents(tmp_path)
    assert demo.free_folder(folder) == f"{folder}-3"
    assert (
        f"{folder} holds a federation already (--resume continues it), so this one goes to {folder}-3"
        in capsys.readouterr().out
    )
    assert contents(tmp_path) == before
