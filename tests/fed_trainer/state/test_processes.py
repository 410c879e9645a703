# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the first of two processes does alone."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fed_trainer.output.run_lock import FolderInUseError, owning
from fed_trainer.state.processes import SECONDS_OF_REST, from_first, is_first, rest_at_exit, wait_for_first


# Ends while there is a thread that acts in the rest only, and rests until it is done.
ENDS_AT_ONCE = """
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from fed_trainer.state.processes import rest_at_exit

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for _ in range(2):
    rest_at_exit()
dist.destroy_process_group()
rests = threading.Event()


def let_go():
    rests.wait()
    (folder / f"{rank} has let go").touch()


def rest(seconds):
    rests.set()
    thread.join()
    with open(folder / f"{rank} rests", "a") as file:
        print(seconds, file=file)


thread = threading.Thread(target=let_go, daemon=True)
thread.start()
time.sleep = rest
"""

PARTS = (
    {
        "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "none": torch.empty(0, 3),
        "view": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    },
    {"bits": torch.tensor([True, False])},
    {},
)


def assert_same_parts(ours, theirs):
    assert [list(part) for part in ours] == [list(part) for part in theirs]
    for part, other in zip(ours, theirs, strict=True):
        for key, tensor in part.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key])


def process(rank, address, folder):
    # They may start far apart. The time-out, which what the first process does exceeds, counts from here on.
    (folder / f"{rank} is here").touch()
    while not all((folder / f"{other} is here").exists() for other in (0, 1)):
        time.sleep(0.01)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=4))
    rest_at_exit()
    calls = []

    def slow():
        calls.append(rank)
        time.sleep(4.5)
        return PARTS

    def broken():
        raise ValueError("no update")

    assert is_first() == (rank == 0)
    assert_same_parts(from_first(slow), PARTS)
    assert calls == [0] * (1 - rank)
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="no update"):
        from_first(broken)
    refused = pytest.raises(FolderInUseError if rank == 0 else RuntimeError, match="is in use by")
    with owning(folder), refused, owning(folder):
        pass
    if rank == 0:
        time.sleep(4.5)
        (folder / "written").touch()
    wait_for_first()
    assert (folder / "written").exists()
    (folder / f"{rank} is done").touch()
    dist.destroy_process_group()


@pytest.mark.slow  # it waits longer than a time-out
@pytest.mark.distributed
def test_the_others_get_what_the_first_computes_however_long_it_takes(tmp_path):
    mp.spawn(process, args=(f"file://{tmp_path}/rendezvous", tmp_path), nprocs=2)
    assert all((tmp_path / f"{rank} is done").exists() for rank in (0, 1))


@pytest.mark.distributed
@pytest.mark.slow
def test_threads_have_the_time_to_let_go_before_a_process_ends(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path), str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in (0, 1):
        assert (tmp_path / f"{rank} has let go").exists()
        assert (tmp_path / f"{rank} rests").read_text() == f"{SECONDS_OF_REST}\n"  # once


def test_a_single_process_does_not_rest(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    rest_at_exit()
    assert registered == []


def test_a_single_process_is_the_first(tmp_path):
    assert is_first()
    assert from_first(lambda: PARTS) is PARTS
    wait_for_first()
