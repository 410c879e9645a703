# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes into an `output_dir`."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import TrainerCallback

from fed_trainer.output.run_lock import HOLDER_NAME, FolderInUseError, owning


FORK = multiprocessing.get_context("fork")


class Call(TrainerCallback):
    """Calls something at the first optimiser step."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        action, self.action = self.action, None
        if action is not None:
            action()


pytestmark = pytest.mark.trainer(
    adapter={"r": 2, "target_modules": ["v_proj"]}, num_clients=1, num_rounds=1, max_steps=1
)


def can_be_owned(folder: Path) -> bool:
    try:
        with owning(folder):
            return True
    except FolderInUseError:
        return False


def hold(folder: Path, connection: Any, has_worker: bool) -> None:
    with owning(folder):
        if has_worker and os.fork() == 0:  # as a worker of a data loader, which outlives its parent for a while
            time.sleep(60)
            os._exit(0)
        connection.send(os.getpid())
        time.sleep(60)


@contextmanager
def another_process(folder: Path, has_worker: bool = False) -> Iterator[Any]:
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, there, has_worker))
    process.start()
    try:
        assert here.poll(60), "it has not got the lock"
        assert here.recv() == process.pid
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("resume", [False, True], ids=["start", "resume"])
def test_a_folder_that_another_process_owns_is_refused_and_nothing_in_it_is_touched(make_trainer, tmp_path, resume):
    folder = tmp_path / "out"
    if resume:
        make_trainer().train()
    trainer = make_trainer(num_rounds=2)
    with another_process(folder) as process:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(FolderInUseError) as error:
            trainer.train(resume_from_checkpoint=resume)
        assert str(error.value) == (
            f"`output_dir` {str(folder)!r} is in use by process {process.pid} on {socket.gethostname()!r}: two runs would write over "
            "each other. Wait until it has ended, stop it, or choose another `output_dir`."
        )
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    trainer.train(resume_from_checkpoint=resume)
    assert len(trainer.record["rounds"]) == 2


def test_the_lock_is_held_while_a_run_trains_and_let_go_when_it_ends_or_fails(make_trainer, tmp_path):
    seen: list[Any] = []

    def try_another():
        for resume in (False, True):
            with pytest.raises(FolderInUseError, match=f"another trainer of this process \\({os.getpid()} on"):
                other.train(resume_from_checkpoint=resume)
        seen.append(in_child(tmp_path / "out"))

    other = make_trainer()
    make_trainer(callbacks=[Call(try_another)]).train()
    assert seen == [False]
    assert in_child(tmp_path / "out") is True

    def interrupt():
        assert in_child(tmp_path / "out") is False
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Call(interrupt)], num_rounds=2).train(resume_from_checkpoint=True)
    assert in_child(tmp_path / "out") is True


def in_child(folder: Path) -> bool:
    """Whether another process could own it."""
    with FORK.Pool(1) as pool:
        return pool.apply(can_be_owned, (folder,))


@pytest.mark.parametrize("has_worker", [False, True])
def test_a_lock_dies_with_its_process(tmp_path, has_worker):
    with another_process(tmp_path, has_worker) as process:
        assert not can_be_owned(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert can_be_owned(tmp_path)


@pytest.mark.parametrize("holder", [None, "", "{", "[]", '{"host": "elsewhere"}'])
def test_a_holder_that_has_not_said_who_it_is_is_another_process(tmp_path, holder):
    with owning(tmp_path):
        path = tmp_path / HOLDER_NAME
        path.unlink() if holder is None else path.write_text(holder)
        with pytest.raises(FolderInUseError, match="is in use by another process: two runs"), owning(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_to_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("of the user")
    sentence = "file' cannot be written to .*. Make it writable, or choose another"
    with pytest.raises(OSError, match=sentence), owning(tmp_path / "file"):
        pass

    def refuses(self, timeout):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuses)
    with pytest.raises(OSError, match=r"cannot be written to \(Read-only file system\)"), owning(tmp_path):
        pass


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuses(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuses)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with owning(tmp_path):
        assert (
            "has no locks (No locks available), so a second run in this `output_dir` would not be noticed"
            in caplog.text
        )
