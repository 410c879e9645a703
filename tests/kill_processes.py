# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
As kill_run.py, with two processes: one is killed with SIGKILL, and the other with it, as a launcher does.

    python tests/kill_processes.py MODEL FOLDER NUM_KILLS

Under DeepSpeed if the variables of its launch are set. Prints a JSON line: the names of the runs that did not end like one that was
not interrupted, and where runs were killed.
"""

import json
import os
import random
import signal
import socket
import sys
from pathlib import Path

import conftest
from kill_run import Bomb, outcome
from peft import LoraConfig

from fed_trainer import FederatedConfig, FederatedTrainer


def run(model: str, folder: Path, resume: bool, kill_at: int | None) -> None:
    clients = conftest.clients_of(num_clients=3, rows=8)
    bomb = Bomb(folder, kill_at)
    trainer = FederatedTrainer(
        model=model,
        args=FederatedConfig(
            output_dir=str(folder),
            num_rounds=3,
            clients_per_round=2,
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=32,
            gradient_checkpointing=False,
            use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
            ddp_backend="gloo",
            report_to="none",
            disable_tqdm=True,
            eval_on_start=False,
            aggregation="fedsa_lora",
            server_optimizer="fedadam",
        ),
        train_dataset=clients,
        eval_dataset={name: rows.select(range(4)) for name, rows in clients.items()},
        peft_config=LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
        callbacks=[bomb],
    )
    trainer.train(resume_from_checkpoint=resume)
    (folder.parent / f"{folder.name}.events-{os.environ['RANK']}").write_text(json.dumps(bomb.seen))


def in_children(model: str, folder: Path, killed: int | None = None, kill_at: int | None = None) -> list[int]:
    """The statuses of both processes; the run goes on if there is one. The process `killed` is at its event number `kill_at`."""
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
                run(model, folder, resume, kill_at if rank == killed else None)
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
    events = [json.loads((root / f"whole.events-{rank}").read_text()) for rank in range(2)]
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
