# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kills a federation with SIGKILL at many places and lets it go on, in forked children of one process that has imported
all.

    python tests/fed_trainer/output/kill_run.py MODEL FOLDER NUM_KILLS

Prints a JSON line: the names of the runs that did not end like one that was not interrupted, and where runs were
killed. Those of the last setting publish every round, and are killed before and after requests to the Hub too.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import conftest  # noqa: F401, for its environment
import httpx2
import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from fed_trainer import read_record
from helpers.data import clients_of
from helpers.hub import redirect_client
from helpers.hub_server import HubServer
from helpers.trainers import new_trainer


# What a run does to the disk; `open` counts when it is for writing. Not `os.mkdir`: which process makes a folder is up
# to chance.
EVENTS = {"os.rename", "os.link", "os.remove", "os.rmdir"}
SETTINGS = (
    {"aggregation": "fedex_lora", "save_total_limit": 1},
    {"aggregation": "fedsa_lora", "server_optimizer": "fedadam"},
    {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}, "keep_optimizer_state": True},
    {"push_to_hub": True, "hub_strategy": "every_save"},
)


class Bomb(TrainerCallback):
    """Counts steps and changes of the disk below a folder, and kills the process at one of them."""

    may_differ = True  # the resumed run has none

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.count, self.seen = str(folder), kill_at, 0, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")) or event in EVENTS:
            self._tick(event, arguments)

    def _tick(self, event: str, arguments: tuple) -> None:
        if self.folder in str(arguments[0]):
            self._count(f"{event} {Path(str(arguments[0])).name}")

    def _count(self, what: str) -> None:
        self.count += 1
        self.seen.append(what)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_requests(self) -> None:
        send = httpx2.Client.send

        def watched(client, request, **kwargs):
            self._count(f"before {request.method} {request.url.path}")
            response = send(client, request, **kwargs)
            self._count(f"after {request.method} {request.url.path}")
            return response

        httpx2.Client.send = watched

    def on_step_end(self, args, state, control, **kwargs):
        self._count("optimiser step")


def run(model: str, folder: Path, settings: dict, resume: bool, kill_at: int | None) -> None:
    clients = clients_of(num_clients=3, rows=8)
    bomb = Bomb(folder, kill_at)
    bomb.watch_requests()
    defaults = {"num_rounds": 3, "clients_per_round": 2, "max_steps": 1, "eval_on_start": False}
    if "push_to_hub" in settings:
        defaults["hub_model_id"] = f"test/{folder.name}"
    trainer = new_trainer(
        folder,
        model,
        clients,
        {name: rows.select(range(4)) for name, rows in clients.items()},
        peft_config=LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
        callbacks=[bomb],
        **{**defaults, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    events_of(folder, int(os.environ.get("RANK", 0))).write_text(json.dumps(bomb.seen))


def events_of(folder: Path, rank: int = 0) -> Path:
    """Where a process of a run that has ended has written what it counted."""
    return folder.parent / f"{folder.name}.events-{rank}"


def in_child(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(*arguments)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def outcome(folder: Path) -> dict:
    """All that the run has left, but for the seconds."""
    record = read_record(folder)
    for entry in record["rounds"]:
        del entry["seconds"]
        entry["eval"] = {key: value for key, value in entry["eval"].items() if key.endswith("loss")}
        entry["client_eval"] = {
            client: {key: value for key, value in figures.items() if key.endswith("loss")}
            for client, figures in entry["client_eval"].items()
        }
        for figures in entry["clients"].values():
            figures.pop("seconds"), figures.pop("personal_seconds", None)
    tensors = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return {"record": record, **tensors}


def is_published(folder: Path, hub: HubServer) -> bool:
    """Whether the Hub has the final weights and the record of all rounds."""
    files = hub.commits(f"test/{folder.name}")[-1][2]
    weights = files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    return weights and len(json.loads(files["federation.json"])["rounds"]) == 3


def main() -> None:
    with HubServer() as hub:
        redirect_client(pytest.MonkeyPatch(), hub.endpoint, Path(sys.argv[2], "huggingface"))
        kill_many(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), hub)


def kill_many(model: str, root: Path, kills: int, hub: HubServer) -> None:
    generator, wrong, places = random.Random(0), [], []
    for index, settings in enumerate(SETTINGS):
        whole = root / f"whole-{index}"
        assert in_child(model, whole, settings, False, None) == 0
        expected, events = outcome(whole), json.loads(events_of(whole).read_text())
        places_of = sorted(generator.sample(range(1, len(events) + 1), kills // len(SETTINGS)))
        requests = [number for number, event in enumerate(events, 1) if event.startswith(("before ", "after "))]
        if requests and not {*requests} & {*places_of}:  # few places are drawn
            places_of[-1] = generator.choice(requests)
        for kill_at in places_of:
            folder = root / f"killed-{index}-{kill_at}"
            status = in_child(model, folder, settings, False, kill_at)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            places.append(events[kill_at - 1])
            resume = any(folder.glob("*"))  # there may be nothing to resume yet
            ended = in_child(model, folder, settings, resume, None) == 0 and outcome(folder) == expected
            if not ended or ("push_to_hub" in settings and not is_published(folder, hub)):
                wrong.append(folder.name)
    print(json.dumps({"wrong": wrong, "places": places}))


if __name__ == "__main__":
    main()
