# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients whose policy keeps figures or numbers of examples: their updates count, and no number is made up for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fed_trainer.client.gate import PolicyGate
from fed_trainer.client.invitations import describe_run
from fed_trainer.client.policy import Policy
from fed_trainer.client.sent_log import SentLog
from fed_trainer.federation.packet import Packet, Reply
from fed_trainer.federation.rounds import Federation
from fed_trainer.federation.transport import InProcess
from fed_trainer.output.figures import means_over_clients
from fed_trainer.output.progress import RoundProgress
from fed_trainer.output.published import Openings, published_log, published_record
from fed_trainer.output.report import round_table, write_report
from helpers.data import clients_of


ROWS = {"client_0": 16, "client_1": 8, "client_2": 4}
NO_METRICS, NO_COUNTS = {"metrics": False}, {"example_counts": False}


class Gated(InProcess):
    """What comes back has gone through the gates of the clients."""

    def __init__(self, trainer: Any, gates: Mapping[str, PolicyGate]) -> None:
        super().__init__(trainer.client)
        self.gates = gates

    def exchange(self, packets: Any, round: int, timeout: float | None = None) -> Iterator[Reply]:
        for reply in super().exchange(packets, round, timeout):
            gate = self.gates[reply.client]
            content = gate.out(reply.client, reply.packet).to_bytes()
            gate.sent(reply.client, len(content))
            yield Reply(reply.client, packet=Packet.from_bytes(content), seconds=reply.seconds)


@pytest.fixture
def train(make_trainer, tmp_path):
    def train(output: str, policies: Mapping[str, Any], **settings: Any) -> Any:
        clients = {name: clients_of(3, 16)[name].select(range(rows)) for name, rows in ROWS.items()}
        trainer = make_trainer(output, clients=clients, **{"num_rounds": 2, "max_steps": 1} | settings)
        gates = {
            client: PolicyGate(SentLog(tmp_path / output / f"sent-{client}.jsonl"), Policy(may_leave=policies[client]))
            if client in policies
            else PolicyGate(SentLog(tmp_path / output / f"sent-{client}.jsonl"))
            for client in clients
        }
        trainer.federation.transport = Gated(trainer, gates)
        trainer.result = trainer.train()
        return trainer

    return train


def same_state(one: Any, other: Any) -> bool:
    mine, theirs = one.federation.state, other.federation.state
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


UNIFORM = {"aggregation_kwargs": {"weights": "uniform"}}


def test_figures_that_stay_are_no_reason_to_leave_an_update_out(train, tmp_path) -> None:
    plain, closed = train("plain", {}), train("closed", {"client_1": NO_METRICS})
    assert same_state(plain, closed)
    for before, entry in zip(plain.record["rounds"], closed.record["rounds"], strict=True):
        assert entry["refused"] == {}
        silent = entry["clients"]["client_1"]
        assert silent["figures_withheld"] is True and silent["num_examples"] == ROWS["client_1"]
        assert silent.keys() == {"num_examples", "figures_withheld", "bytes_down", "bytes_up"}
        losses = {client: before["clients"][client]["train_loss"] for client in ("client_0", "client_2")}
        expected = (16 * losses["client_0"] + 4 * losses["client_2"]) / 20
        assert entry["train_loss"] == pytest.approx(expected, rel=1e-12)
        assert entry["train_loss"] != pytest.approx(before["train_loss"], rel=1e-6)
    told = {name for entry in closed.state.log_history for name in entry if name.startswith("clients/")}
    assert told and not any(name.startswith("clients/client_1/") for name in told)
    assert "train_loss" not in (tmp_path / "closed" / "sent-client_1.jsonl").read_text().split('"held_back"')[0]


AGGREGATIONS: dict[str, dict[str, Any]] = {
    "fedavg": UNIFORM,
    "fednova": {**UNIFORM, "optim": "sgd", "max_grad_norm": 0.0},
    "flora": UNIFORM,
    "flexlora": UNIFORM,
    "hetlora": {},  # by the norms of the products
    "median": {},
    "norm_bounding": {"aggregation_kwargs": {"weights": "uniform", "max_norm": 1.0}},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.fast("fedavg", "hetlora")
def test_numbers_of_examples_that_stay_are_none_where_the_rule_does_not_read_them(train, aggregation: str) -> None:
    settings = {"aggregation": aggregation, **AGGREGATIONS[aggregation]}
    plain, closed = train("plain", {}, **settings), train("closed", {"client_1": NO_COUNTS}, **settings)
    assert describe_run(closed)["weights"] == "uniform"
    assert same_state(plain, closed)
    for before, entry in zip(plain.record["rounds"], closed.record["rounds"], strict=True):
        assert entry["refused"] == {}
        counts = {client: figures["num_examples"] for client, figures in entry["clients"].items()}
        assert counts == {**ROWS, "client_1": None}
        # the losses are those of before, and now all clients weigh alike
        losses = [figures["train_loss"] for figures in entry["clients"].values()]
        assert losses == [figures["train_loss"] for figures in before["clients"].values()]
        assert entry["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_where_the_rule_reads_them_the_client_is_left_out_by_name(train) -> None:
    trainer = train("out", {"client_1": NO_COUNTS})
    assert describe_run(trainer)["weights"] == "examples"
    for entry in trainer.record["rounds"]:
        assert entry["clients"].keys() == {"client_0", "client_2"}
        assert "`num_examples` is None, but it should be a positive integer" in entry["refused"]["client_1"]


def test_a_federation_of_which_nobody_tells_figures_has_none(train, tmp_path, capsys) -> None:
    trainer = train("out", {name: {**NO_METRICS, **NO_COUNTS} for name in ROWS}, eval_rows=4, **UNIFORM)
    assert [entry["train_loss"] for entry in trainer.record["rounds"]] == [None, None]
    assert math.isnan(trainer.result.training_loss)
    assert not any("loss" in entry for entry in trainer.state.log_history)
    assert all(entry["eval"]["eval_loss"] > 0 for entry in trainer.record["rounds"])  # of the coordinator's own rows
    assert round_table(trainer.record).splitlines()[-1].split()[:3] == ["2", "3", "-"]
    assert json.loads((tmp_path / "out" / "federation.jsonl").read_text().splitlines()[0])["train_loss"] is None
    write_report(tmp_path / "out")
    published = published_record(trainer.record, Openings(client_metrics=True))
    assert published["rounds"][0]["train_loss"] is None


def test_a_mean_over_the_one_client_that_tells_is_not_published(train, tmp_path) -> None:
    trainer = train("out", {"client_0": NO_METRICS, "client_1": NO_METRICS})
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (
        trainer.record["rounds"][0]["train_loss"] == trainer.record["rounds"][0]["clients"]["client_2"]["train_loss"]
    )
    for openings, is_told in ((Openings(), False), (Openings(client_metrics=True), True)):
        published = published_record(trainer.record, openings)
        assert all((entry["train_loss"] is not None) is is_told for entry in published["rounds"])
        assert all(entry["bytes_up"] is not None for entry in published["rounds"])
        log = published_log(state, trainer.record, openings)["log_history"]
        assert any("loss" in entry for entry in log) is is_told
        assert any("bytes_up" in entry for entry in log)


def test_the_sum_of_examples_is_not_published_if_one_is_not_known(train) -> None:
    trainer = train("out", {})
    assert published_record(trainer.record)["num_examples"] == sum(ROWS.values())
    trainer.record["clients"]["client_1"]["num_examples"] = None  # of a client elsewhere
    for openings in (Openings(), Openings(client_metrics=True)):
        assert published_record(trainer.record, openings)["num_examples"] is None


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"metrics": {"eval_loss": 1.0}, "num_examples": 3}, ({"eval_loss": 1.0}, 3)),
        ({"metrics": {"eval_loss": 1.0}, "num_examples": None}, ({"eval_loss": 1.0}, None)),
        ({"metrics": {"figures_withheld": True}, "num_examples": 3}, None),
        ({"metrics": {"eval_loss": 1.0}, "num_examples": 0}, None),
        ({"metrics": {"eval_loss": 1.0}, "num_examples": "3"}, None),
    ],
)
def test_what_an_evaluation_elsewhere_has_measured(meta: dict[str, Any], expected: Any) -> None:
    assert Federation._measured(Reply("a", packet=Packet("metrics", {}, meta))) == expected


def test_means_are_weighted_if_all_tell_their_numbers_and_plain_if_one_does_not() -> None:
    figures = {"a": {"eval_loss": 1.0}, "b": {"eval_loss": 4.0}, "c": {}}
    assert means_over_clients(figures, {"a": 1, "b": 2}).means == {"eval_loss": 3.0}
    assert means_over_clients(figures, {"a": None, "b": 2}).means == {"eval_loss": 2.5}


def test_the_line_of_a_client_has_a_dash_for_what_it_does_not_say(capsys) -> None:
    with RoundProgress(2, 0, enabled=True) as progress:
        progress.client(1, "ward", None, {"figures_withheld": True})
        progress.client(1, "ward", 1200, {"train_loss": 0.5, "num_steps": 7, "seconds": 1.25})
        progress.round(None, {})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "round 1/2 ward - examples - steps loss - - s" in lines
    assert "round 1/2 ward 1,200 examples 7 steps loss 0.5000 1.2 s" in lines
