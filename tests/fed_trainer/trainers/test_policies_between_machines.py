# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients in other processes with policies of their own: one declines, one keeps figures, one numbers of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fed_trainer import read_record
from fed_trainer.client.sent_log import SENT_NAME
from helpers.machines import SERVER, start


pytestmark = pytest.mark.slow  # a coordinator and four clients, as processes


POLICIES: dict[str, dict[str, Any]] = {
    "client_0": {},
    "client_1": {"may_leave": {"metrics": False}},
    "client_2": {"may_leave": {"example_counts": False}},
    "client_3": {"most_rounds": 2},
}


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    address = str(folder / "store")
    processes = {SERVER: start(SERVER, folder, tiny_model_dir, address, ["uniform"])}
    for client, policy in POLICIES.items():
        processes[client] = start(client, folder, tiny_model_dir, address, ["uniform"], POLICY=json.dumps(policy))
    codes = {role: process.wait(timeout=240) for role, process in processes.items()}
    assert codes == {SERVER: 0, "client_0": 0, "client_1": 0, "client_2": 0, "client_3": 1}
    return folder


def sent(folder: Path, client: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "uniform" / client / SENT_NAME).read_text().splitlines()]


@pytest.mark.timeout(300)
def test_both_sides_are_told_which_field_refuses_the_run(folder) -> None:
    refusal = "The policy of client 'client_3' does not allow the run (`most_rounds`)."
    assert f"DeclinedError: {refusal}" in (folder / "client_3.log").read_text()
    for entry in read_record(folder / "uniform" / SERVER)["rounds"]:
        assert entry["refused"].keys() == {"client_3"}
        assert entry["refused"]["client_3"].startswith(
            f"it has declined: {refusal} `most_rounds`: the run asks for 3 "
        )
    (line,) = sent(folder, "client_3")  # so it has trained nothing
    assert line["kind"] == "failed" and refusal in line["contains"][-1]


@pytest.mark.timeout(300)
def test_what_may_not_leave_is_not_in_the_record(folder) -> None:
    record = read_record(folder / "uniform" / SERVER)
    assert {client: about["num_examples"] for client, about in record["clients"].items()} == {
        "client_0": 16, "client_1": 16, "client_2": None, "client_3": None,
    }  # fmt: skip
    for entry in record["rounds"]:
        clients = entry["clients"]
        assert clients.keys() == {"client_0", "client_1", "client_2"}
        assert clients["client_1"]["figures_withheld"] is True and "train_loss" not in clients["client_1"]
        assert clients["client_2"]["num_examples"] is None
        losses = [clients[client]["train_loss"] for client in ("client_0", "client_2")]
        assert entry["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)
        assert entry["client_eval"].keys() == {"client_0", "client_2"}
        measured = [figures["eval_loss"] for figures in entry["client_eval"].values()]
        assert entry["eval"]["eval_loss"] == pytest.approx(sum(measured) / 2, rel=1e-12)


@pytest.mark.timeout(300)
def test_the_log_of_a_client_has_every_message(folder) -> None:
    run = read_record(folder / "uniform" / SERVER)["run"]
    evaluated = [("metrics", 1), ("update", 1), ("metrics", 2), ("update", 2), ("metrics", 3), ("update", 3)]
    expected = {
        "client_0": [("joined", None), *evaluated, ("metrics", 4)],
        "client_1": [("joined", None), *(("update", round) for round in (1, 2, 3))],
        "client_2": [("joined", None), *evaluated, ("metrics", 4)],
    }
    for client, messages in expected.items():
        lines = sent(folder, client)
        assert [(line["kind"], line["round"]) for line in lines] == messages
        assert {(line["run"], line["client"]) for line in lines} == {(run, client)}
