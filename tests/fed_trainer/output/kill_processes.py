# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
As kill_run.py, with two processes: one is killed with SIGKILL, and the other with it, as a launcher does.

    python tests/fed_trainer/output/kill_processes.py MODEL FOLDER NUM_KILLS

Under DeepSpeed if the variables of its launch are set. Prints a JSON line: the names of the runs that did not end like
one that was not interrupted, and where runs were killed.
"""

import json
import os
import random
import signal
import socket
import sys
from pathlib import Path

from kill_run import events_of, outcome, run


SETTINGS = {
    "aggregation": "fedsa_lora",
    "server_optimizer": "fedadam",
    "per_device_train_batch_size": 2,
    "ddp_backend": "gloo",
}


def in_children(model: str, folder: Path, killed: int | None = None, kill_at: int | None = None) -> list[int]:
    """
    The statuses of both processes; the run goes on if there is one. The process `killed` is at its event number
    `kill_at`.
    """
    resume = any(folder.glob("*"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                settings = {**SETTINGS, "use_cpu": "ACCELERATE_USE_DEEPSPEED" not in os.environ}
                run(model, folder, settings, resume, kill_at if rank == killed else None)
                code = 0
            finally:
                os._exit(code)
    statuses = {}
    while len(statuses) < 2:
        child, status = os.wait()
        statuses[child] = status
        for other in children:
            if status != 0 and other not in statuses:
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


def main() -> None:
    model, root, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    generator, wrong, places = random.Random(0), [], []
    whole = root / "whole"
    assert in_children(model, whole) == [0, 0]
    expected = outcome(whole)
    events = [json.loads(events_of(whole, rank).read_text()) for rank in range(2)]
    for kill in range(kills):
        killed = kill % 2  # the first process writes, the second does not
        part = len(events[killed]) / kills  # early, later, ..., late
        kill_at = 1 + int(part * (kill + generator.random()))
        folder = root / f"killed-{killed}-{kill_at}"
        statuses = in_children(model, folder, killed, kill_at)
        assert os.WIFSIGNALED(statuses[killed]) and os.WTERMSIG(statuses[killed]) == signal.SIGKILL, statuses
        places.append(f"{killed}: {events[killed][kill_at - 1]}")
        if in_children(model, folder) != [0, 0] or outcome(folder) != expected:
            wrong.append(folder.name)
    print(json.dumps({"wrong": wrong, "places": places}))


if __name__ == "__main__":
    main()
