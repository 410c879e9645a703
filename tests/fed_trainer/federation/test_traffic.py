# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The bytes in the record against sizes that are written out here by method, from the shapes of the factors alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest


# of the tiny model: the inputs and outputs of `v_proj` and `down_proj` in its two layers
SHAPES = [(32, 16), (64, 32)] * 2
R = 4
NUMBER = 8


def a_bytes(r: int = R) -> int:
    return 4 * sum(r * d_in for d_in, _ in SHAPES)


def b_bytes(r: int = R) -> int:
    return 4 * sum(d_out * r for _, d_out in SHAPES)


def both(r: int = R) -> int:
    return a_bytes(r) + b_bytes(r)


@dataclass
class Case:
    """Bytes of a client as functions of the round and the round in which it was here before (0 for never)."""

    up: Callable[[int, int], int]
    down: Callable[[int, int], int]
    settings: dict[str, Any] = field(default_factory=dict)


def adds(columns: Callable[[int], int]) -> Callable[[int, int], int]:
    """
    What went into the base since then: a round's factors have so many columns, up to the smaller side of the weight.
    """

    def missed(round: int, since: int) -> int:
        pairs = [(min(columns(2), d_in, d_out), d_in, d_out) for d_in, d_out in SHAPES]
        return (round - max(since, 1)) * 4 * sum(k * (d_in + d_out) for k, d_in, d_out in pairs)

    return missed


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
PLAIN = Case(lambda t, s: both() + NUMBER, lambda t, s: both())
NO_WEIGHT = Case(lambda t, s: both(), lambda t, s: both())
KEPT = {"num_byzantine": 0}
CASES = {
    "fedavg": PLAIN,
    "fednova": Case(lambda t, s: both() + 2 * NUMBER, lambda t, s: both()),
    "ffa_lora": Case(lambda t, s: b_bytes() + NUMBER, lambda t, s: b_bytes()),
    "fedsa_lora": Case(lambda t, s: a_bytes() + NUMBER, lambda t, s: a_bytes()),
    # the factor that is frozen now was trained in the round before; the other is new for whoever was not there then
    "rolora": Case(
        lambda t, s: (b_bytes() if t % 2 else a_bytes()) + NUMBER,
        lambda t, s: b_bytes() if t == 1 else both() if s < t - 1 else a_bytes() if t % 2 else b_bytes(),
    ),
    "flora": Case(lambda t, s: both() + NUMBER, adds(lambda clients: clients * R)),
    "fedex_lora": Case(lambda t, s: both() + NUMBER, lambda t, s: both() + adds(lambda clients: clients * R)(t, s)),
    "flexlora": PLAIN,
    "hetlora": NO_WEIGHT,
    "lora_fair": PLAIN,
    "median": NO_WEIGHT,
    "trimmed_mean": Case(NO_WEIGHT.up, NO_WEIGHT.down, {"aggregation_kwargs": {"trim": 0.34}, "clients_per_round": 3}),
    "geometric_median": PLAIN,
    "krum": Case(NO_WEIGHT.up, NO_WEIGHT.down, {"aggregation_kwargs": KEPT, "clients_per_round": 3}),
    "multi_krum": Case(NO_WEIGHT.up, NO_WEIGHT.down, {"aggregation_kwargs": KEPT, "clients_per_round": 3}),
    "norm_bounding": Case(PLAIN.up, PLAIN.down, {"aggregation_kwargs": {"max_norm": 1.0}}),
    "slora": Case(
        lambda t, s: (both() if t > 1 else 4 * sum(round(0.1 * d_in * d_out) for d_in, d_out in SHAPES)) + NUMBER,
        lambda t, s: both() if t > 1 else 4 * sum(round(0.1 * d_in * d_out) for d_in, d_out in SHAPES),
        {"aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1}},
    ),
    # the control is zero, and known to be, until a round has ended; up goes the sum of the learning rates
    "scaffold": Case(
        lambda t, s: both() + 4,
        lambda t, s: both() * (1 if t == 1 else 2),
        {"aggregation": "fedavg", "local_objective": "scaffold", **SGD},
    ),
    "scaffold, ffa_lora": Case(
        lambda t, s: b_bytes() + 4,
        lambda t, s: b_bytes() * (1 if t == 1 else 2),
        {"aggregation": "ffa_lora", "local_objective": "scaffold", **SGD},
    ),
    "feddyn": Case(
        NO_WEIGHT.up,
        NO_WEIGHT.down,
        {"aggregation": "fedavg", "local_objective": "feddyn", "local_objective_kwargs": {"alpha": 0.1}},
    ),
    "fedprox": Case(
        PLAIN.up,
        PLAIN.down,
        {"aggregation": "fedavg", "local_objective": "fedprox", "local_objective_kwargs": {"mu": 0.1}},
    ),
    "ditto": Case(
        PLAIN.up,
        PLAIN.down,
        {
            "aggregation": "fedavg",
            "local_objective": "ditto",
            "local_objective_kwargs": {"mu": 0.1},
        },
    ),
    "kept optimiser": Case(PLAIN.up, PLAIN.down, {"aggregation": "fedavg", "keep_optimizer_state": True}),
    "server momentum": Case(PLAIN.up, PLAIN.down, {"aggregation": "fedavg", "server_optimizer": "fedavgm"}),
}


pytestmark = pytest.mark.trainer(
    adapter={"r": R, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"]},
    rows=4,
    num_rounds=4,
    clients_per_round=2,
    max_steps=1,
    per_device_train_batch_size=2,
    max_length=16,
    save_rounds=100,
)


@pytest.mark.parametrize("name", CASES)
def test_every_byte_of_a_client_is_counted(name: str, make_trainer) -> None:
    case = CASES[name]
    trainer = make_trainer(**{"aggregation": name, **case.settings})
    trainer.train()
    here: dict[str, int] = {}
    for entry in trainer.record["rounds"]:
        number = entry["round"]
        for client, figures in entry["clients"].items():
            since = here.get(client, 0)
            assert figures["bytes_up"] == case.up(number, since), (number, client)
            assert figures["bytes_down"] == case.down(number, since), (number, client, since)
            here[client] = number
        for direction in ("bytes_up", "bytes_down"):
            assert entry[direction] == sum(figures[direction] for figures in entry["clients"].values())


def test_a_client_of_a_smaller_rank_and_one_of_fewer_layers_send_less(make_trainer) -> None:
    trainer = make_trainer(
        aggregation="flexlora",
        clients_per_round=3,
        num_rounds=1,
        client_settings={"client_0": {"r": 1}, "client_1": {"layers_to_transform": [0]}},
    )
    trainer.train()
    figures = trainer.record["rounds"][0]["clients"]
    assert (figures["client_0"]["bytes_up"], figures["client_0"]["bytes_down"]) == (both(1) + NUMBER, both(1))
    assert (figures["client_1"]["bytes_up"], figures["client_1"]["bytes_down"]) == (both() // 2 + NUMBER, both())


def test_the_control_comes_for_the_layers_that_a_client_trains(make_trainer) -> None:
    trainer = make_trainer(
        aggregation="fedavg",
        local_objective="scaffold",
        clients_per_round=3,
        num_rounds=2,
        client_settings={"client_1": {"layers_to_transform": [0]}},
        **SGD,
    )
    trainer.train()
    figures = trainer.record["rounds"][1]["clients"]["client_1"]
    assert (figures["bytes_up"], figures["bytes_down"]) == (both() // 2 + 4, both() * 3 // 2)


def test_a_pruned_rank_travels_with_the_update_that_it_follows_from(make_trainer) -> None:
    trainer = make_trainer(
        aggregation="hetlora",
        local_objective="rank_pruning",
        local_objective_kwargs={"decay": 0.5, "penalty_weight": 100.0},
        clients_per_round=3,
        num_rounds=4,
        max_steps=2,
        optim="sgd",
        learning_rate=0.05,
    )
    trainer.train()
    for entry in trainer.record["rounds"]:
        for figures in entry["clients"].values():
            assert figures["bytes_down"] in [both(r) for r in (R, R // 2, R // 4)]
            assert (
                figures["bytes_up"] == figures["bytes_down"] + NUMBER
            )  # weighted by norms: the rank is the only number
    last = trainer.record["rounds"][-1]["clients"]
    assert any(figures["bytes_down"] < both() for figures in last.values()), "no rank was pruned"
