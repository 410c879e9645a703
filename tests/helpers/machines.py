# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federations between processes: `python -m helpers.machines ROLE FOLDER MODEL ADDRESS CASE...`, where the role is
`serve` or the name of a client, and each case of `CASES` is run one after the other.

The environment says what else is to happen: `RESUME=1` lets a coordinator go on, `KILL=point:count` kills the process
when it comes to a point of `POINTS` for so many times, `POLICY` is that of a client, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fed_trainer.client.process
import fed_trainer.federation.server
import fed_trainer.federation.transport.exchange
import fed_trainer.federation.transport.store.files
import fed_trainer.output.checkpoint
import fed_trainer.trainers.checkpoints
from fed_trainer import Store
from fed_trainer.client import engine
from fed_trainer.client.policy import Policy
from fed_trainer.client.store import ClientStore
from fed_trainer.federation.transport.ends import Network
from fed_trainer.federation.transport.keys import Identity, make_keys
from fed_trainer.federation.transport.known_keys import KnownKeys
from fed_trainer.federation.transport.sealed import Sealed

from .trainers import clients_for, make


TESTS = Path(__file__).parents[1]
CLIENTS = [f"client_{index}" for index in range(4)]
SERVER, ALL = "serve", "all"

# what a federation is to be told, by what it is to show
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaffold": {"local_objective": "scaffold", "optim": "sgd", "max_grad_norm": 0.0},
    "fedsa": {"aggregation": "fedsa_lora"},
    "flora": {
        "aggregation": "flora",
        "client_settings": {"client_0": {"r": 2}, "client_1": {"r": 3}, "client_2": {"r": 4}, "client_3": {"r": 1}},
    },
    "kept_optimizers": {"keep_optimizer_state": True},
    "uniform": {"aggregation_kwargs": {"weights": "uniform"}, "clients_per_round": 4},
    "dpo": {"kind": "dpo"},
    "classifier": {"kind": "task"},
}
# where a process can be killed: module or class, and the function before which it happens
POINTS: dict[str, tuple[Any, str]] = {
    "steps": (engine.EngineMixin, "training_step"),
    "keeping": (ClientStore, "write"),
    "reply": (fed_trainer.client.process.ClientProcess, "_reply"),
    "marker": (fed_trainer.federation.transport.store.files.Files, "replace"),
    "exchange": (fed_trainer.federation.transport.exchange.Exchange, "_read"),
    "aggregation": (fed_trainer.federation.server.Server, "finish"),
    "checkpoint": (fed_trainer.trainers.checkpoints, "write_state"),
    "after the checkpoint": (fed_trainer.trainers.checkpoints, "rotate_checkpoints"),
}


def trainer_of(case: str, role: str, folder: Path, model: Path, **changes: Any) -> Any:
    """
    A trainer of a case.

    Args:
        role: `"serve"`, the name of a client, or `"all"` for all clients in one process.
        folder: Its `output_dir`.
    """
    settings = {"num_rounds": 3, "clients_per_round": 3, "save_rounds": 2, **CASES[case], **changes}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # `use_cpu` Accelerate would take for a wish to do without it
        settings |= {"use_cpu": False, "ddp_backend": "gloo"}
    kind = settings.pop("kind", "sft")
    clients = clients_for(kind, len(CLIENTS), 16)
    held_out = {name: rows.select(range(4)) for name, rows in clients.items()}
    train: Any = {SERVER: None, ALL: clients}.get(role, clients.get(role))
    held: Any = {SERVER: None, ALL: held_out}.get(role, held_out.get(role))
    return make(folder, model, ".", kind=kind, clients=train, eval_dataset=held, is_made=False, **settings)


def policy_of() -> Policy | None:
    """What the environment says of a client's policy."""
    return Policy(**json.loads(os.environ["POLICY"])) if "POLICY" in os.environ else None


def sealed(role: str, network: Network) -> Network:
    """The same with the keys in the folder that the environment names, encrypted; as it is if it names none."""
    if (keys := os.environ.get("KEYS")) is None:
        return network
    known = "sites.txt" if role == SERVER else "coordinator.txt"
    return Sealed(network, Identity.load(Path(keys, f"{role}.key")), KnownKeys(Path(keys, known)), encrypts=True)


def make_all_keys(folder: Path) -> None:
    """Keys of all roles, and the lists of both sides, for `KEYS`."""
    folder.mkdir()
    lines = {role: str(make_keys(folder / f"{role}.key", role)) for role in (SERVER, *CLIENTS)}
    (folder / "coordinator.txt").write_text(f"{lines.pop(SERVER)}\n")
    (folder / "sites.txt").write_text("\n".join(lines.values()))


def kill_at(point: str, count: int) -> None:
    """Kill this process when it comes to a point for the `count`th time."""
    owner, name = POINTS[point]
    original: Callable[..., Any] = getattr(owner, name)
    left = count

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if point != "marker" or str(args[1]).endswith("/up.json"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def main(role: str, folder: Path, model: Path, address: str, cases: Sequence[str]) -> None:
    if kill := os.environ.get("KILL"):
        point, _, count = kill.partition(":")
        kill_at(point, int(count))
    for case in cases:
        options = {"endpoint_url": os.environ["S3_ENDPOINT"]} if address.startswith("s3:") else None
        store = sealed(role, Store(f"{address}/{case}", patience=60, lease=1.0, storage_options=options))
        changes = {"num_rounds": int(os.environ["NUM_ROUNDS"])} if "NUM_ROUNDS" in os.environ else {}
        trainer = trainer_of(case, role, folder / case / role, model, **changes)
        if role == SERVER:
            resume = True if os.environ.get("RESUME") == "1" else None
            trainer.serve(store, clients=CLIENTS, wait=120, round_timeout=120, resume_from_checkpoint=resume)
        else:
            trainer.join(store, role, policy_of())


def start(
    role: str,
    folder: Path,
    model: Path,
    address: str,
    cases: Sequence[str],
    launcher: Sequence[str] = (),
    **environment: str,
) -> Any:
    """
    A process of a role, or several that a launcher starts; what it prints goes to `<role>.log` in the folder.
    """
    paths = [str(TESTS), str(TESTS.parent), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **environment}
    command = [sys.executable, *launcher, "-m", "helpers.machines", role, str(folder), str(model), address, *cases]
    with open(folder / f"{role}.log", "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)


def run_all(
    folder: Path,
    model: Path,
    cases: Sequence[str],
    address: str | None = None,
    kills: Mapping[str, Sequence[str]] | None = None,
    launchers: Mapping[str, Sequence[str]] | None = None,
    seconds: float = 240.0,
    **environment: str,
) -> dict[str, int]:
    """
    A coordinator and all clients as processes, until all have ended. Those that are killed are started again.

    Args:
        kills: By role, the points and counts at which its first, second, ... process is killed.
        launchers: By role, what comes between Python and `-m`.

    Returns:
        How often each role was killed.
    """
    address = address or str(folder / "store")
    left = {role: list((kills or {}).get(role, ())) for role in (SERVER, *CLIENTS)}
    killed = dict.fromkeys(left, 0)

    def begin(role: str) -> Any:
        own = dict(environment)
        if left[role]:
            own["KILL"] = left[role].pop(0)
        if killed[role]:
            own["RESUME"] = "1"
        return start(role, folder, model, address, cases, (launchers or {}).get(role, ()), **own)

    running = {role: begin(role) for role in left}
    end = time.monotonic() + seconds
    try:
        while running:
            for role, process in list(running.items()):
                code = process.poll()
                if code == -signal.SIGKILL:
                    killed[role] += 1
                    running[role] = begin(role)
                elif code is not None:
                    assert code == 0, f"{role}: {code}\n{(folder / f'{role}.log').read_text()[-3000:]}"
                    del running[role]
            assert time.monotonic() < end, f"{sorted(running)} have not ended"
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
    return killed


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
