# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every method on live models, against its formula in float64 on dense matrices, written out here with none of the rules'
code.

The layers are an `nn.Linear` and a `Conv1D`, not square, beside a head in `modules_to_save`. Clients have unequal
numbers of examples and `alpha / r` is not 1. A method is played for three rounds by what `METHODS` says of it, and
after each round the weights that the model computes with are compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.facts import check_adapter
from fed_trainer.client.live.pairs import add_to_base, factor_pairs
from fed_trainer.methods.aggregation import METHODS, Aggregator, ClientUpdate
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.factors import FactorPair, truncate_ranks
from helpers.dense_clients import HEAD, LORA, add, aggregate, assert_close, randn, random_state, updates_of
from peft_scl import FederaConfig, SclConfig


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

NUM_EXAMPLES = [3, 50, 70, 7, 30]  # none has half of the weight, or it would be the geometric median
NUM_STEPS = [1, 4, 9, 2, 3]
MOMENTUM, TRIM, MAX_NORM, RIDGE = 0.5, 0.2, 3.0, 0.1
OPTIONS: dict[str, dict[str, Any]] = {
    "fednova": {"momentum": MOMENTUM},
    "lora_fair": {"ridge": RIDGE},
    "trimmed_mean": {"trim": TRIM},
    "norm_bounding": {"max_norm": MAX_NORM},
    "slora": {"sparse_rounds": 1},
    "geometric_median": {"tolerance": 1e-9, "max_iterations": 300},
}


def built(name: str, pairs: list[FactorPair], **more: Any) -> Aggregator:
    try:
        return METHODS[name].build(pairs, **OPTIONS.get(name, {}) | more)
    except TypeError as error:
        raise TypeError(f"add the options of {name!r} to OPTIONS above: {error}") from error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.c_proj = Conv1D(7, 10)
        self.classifier = nn.Linear(7, 3)


def net(config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), config)


TARGETS = {"target_modules": ["up", "c_proj"], "modules_to_save": ["classifier"]}
MODELS: dict[str, Callable[[], PeftModel]] = {
    "lora": lambda: net(LoraConfig(r=2, lora_alpha=3, **TARGETS)),
    "rslora": lambda: net(LoraConfig(r=3, lora_alpha=8, use_rslora=True, **TARGETS)),
    "patterns": lambda: net(
        LoraConfig(r=2, lora_alpha=3, rank_pattern={"up": 4}, alpha_pattern={"c_proj": 5}, **TARGETS)
    ),
    "federa": lambda: net(FederaConfig(r=2, lora_alpha=3, **TARGETS)),
    "scl": lambda: net(SclConfig(r=2, scaling=0.7, target_modules=["c_proj"], modules_to_save=["classifier"])),
}


@dataclass
class Round:
    """What a round is about, in float64."""

    state: AdapterState
    clients: list[AdapterState]  # what each ended with
    num_examples: list[int]
    scalings: list[dict[str, float]]
    pairs: list[FactorPair]

    @property
    def shares(self) -> list[float]:
        return [n / sum(self.num_examples) for n in self.num_examples]

    def mean(self, key: str, weights: list[float] | None = None) -> torch.Tensor:
        weights = weights or self.shares
        return sum(weight * client[key] for weight, client in zip(weights, self.clients, strict=True)) / sum(weights)

    def delta(self, client: int) -> AdapterState:
        return {key: self.clients[client][key] - tensor for key, tensor in self.state.items()}

    def factors(self, pair: FactorPair, state: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `B` as the layer multiplies them."""
        A, B = state[pair.key_A].double(), state[pair.key_B].double()
        return (A + pair.start[0].double(), B + pair.start[1].double()) if pair.trains_change else (A, B)

    def product(self, pair: FactorPair, client: int) -> torch.Tensor:
        A, B = self.factors(pair, self.clients[client])
        return self.scalings[client][pair.module] * B @ A

    def mean_product(self, pair: FactorPair) -> torch.Tensor:
        return sum(share * self.product(pair, client) for client, share in enumerate(self.shares))


def subtracted(pair: FactorPair) -> torch.Tensor | float:
    """What FeDeRA and SCL take off again."""
    return 0.0 if pair.start is None else pair.scaling * pair.start[1].double() @ pair.start[0].double()


# Rules for each tensor, as new tensors


def fedavg(round: Round) -> AdapterState:
    return {key: round.mean(key) for key in round.state}


def fednova(round: Round) -> AdapterState:
    weights = []  # of the gradients, by running SGD with momentum
    for steps in NUM_STEPS[: len(round.clients)]:
        position = velocity = 0.0
        for _ in range(steps):
            velocity = MOMENTUM * velocity + 1
            position += velocity
        weights.append(position)
    effective = sum(share * weight for share, weight in zip(round.shares, weights, strict=True))
    return {
        key: tensor + effective * sum(share * round.delta(k)[key] / weights[k] for k, share in enumerate(round.shares))
        for key, tensor in round.state.items()
    }


def hetlora(round: Round) -> AdapterState:
    norms = [
        math.sqrt(sum(float((round.product(p, k) - subtracted(p)).square().sum()) for p in round.pairs))
        for k in range(len(round.clients))
    ]
    padded = []
    for client, scalings in zip(round.clients, round.scalings, strict=True):
        whole = dict(client)
        for pair in round.pairs:
            A, B = (torch.zeros_like(round.state[key]) for key in (pair.key_A, pair.key_B))
            rank = len(client[pair.key_A])
            A[:rank] = client[pair.key_A]
            B[:, :rank] = client[pair.key_B] * scalings[pair.module] / pair.scaling
            whole |= {pair.key_A: A, pair.key_B: B}
        padded.append(whole)
    return {
        key: sum(norm * whole[key] for norm, whole in zip(norms, padded, strict=True)) / sum(norms)
        for key in round.state
    }


def lora_fair(round: Round) -> AdapterState:
    new = fedavg(round)
    for pair in round.pairs:
        A, B = round.factors(pair, new)
        lacking = round.mean_product(pair) / pair.scaling - B @ A
        new[pair.key_B] = new[pair.key_B] + lacking @ A.T @ torch.linalg.inv(A @ A.T + RIDGE * torch.eye(len(A)))
    return new


def by_coordinate(combine: Callable[[list[float]], float]) -> Callable[[Round], AdapterState]:
    def rule(round: Round) -> AdapterState:
        new = {}
        for key, tensor in round.state.items():
            rows = torch.stack([client[key].flatten() for client in round.clients]).T.tolist()
            new[key] = torch.tensor([combine(row) for row in rows], dtype=torch.float64).view(tensor.shape)
        return new

    return rule


def trimmed_mean(values: list[float]) -> float:
    dropped = int(TRIM * len(values))
    return statistics.fmean(sorted(values)[dropped : len(values) - dropped])


def distance(one: AdapterState, other: AdapterState) -> float:
    return math.sqrt(sum(float((one[key] - other[key]).square().sum()) for key in one))


def geometric_median(round: Round) -> AdapterState:
    point = fedavg(round)
    for _ in range(300):
        pulls = [
            n / max(1e-9, distance(point, client)) for n, client in zip(round.num_examples, round.clients, strict=True)
        ]
        point = {key: round.mean(key, pulls) for key in round.state}
    return point


def by_krum(num_selected: int) -> Callable[[Round], AdapterState]:
    def rule(round: Round) -> AdapterState:
        clients = round.clients
        near = len(clients) - 1 - 2
        scores = [sum(sorted(distance(a, b) ** 2 for b in clients if b is not a)[:near]) for a in clients]
        chosen = sorted(range(len(clients)), key=scores.__getitem__)[:num_selected]
        return {key: sum(clients[k][key] for k in chosen) / num_selected for key in round.state}

    return rule


def norm_bounding(round: Round) -> AdapterState:
    factors = [min(1.0, MAX_NORM / distance(client, round.state)) for client in round.clients]
    assert min(factors) < 1
    return {
        key: tensor + sum(p * factors[k] * (round.clients[k][key] - tensor) for k, p in enumerate(round.shares))
        for key, tensor in round.state.items()
    }


BY_TENSOR: dict[str, Callable[[Round], AdapterState]] = {
    "fedavg": fedavg,
    "fednova": fednova,
    "fedsa_lora": fedavg,  # of what is shared
    "hetlora": hetlora,
    "lora_fair": lora_fair,
    "median": by_coordinate(statistics.median),
    "trimmed_mean": by_coordinate(trimmed_mean),
    "geometric_median": geometric_median,
    "krum": by_krum(1),
    "multi_krum": by_krum(4),
    "norm_bounding": norm_bounding,
    "slora": fedavg,  # its second stage
}


# Rules for each product, as `s B A` of the new model


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vt = torch.linalg.svd(matrix)
    return u[:, :rank] @ torch.diag(values[:rank]) @ vt[:rank]


BY_PRODUCT: dict[str, Callable[[Round, FactorPair], torch.Tensor]] = {
    "ffa_lora": Round.mean_product,
    "rolora": Round.mean_product,
    "flora": Round.mean_product,
    "fedex_lora": Round.mean_product,
    "flexlora": lambda round, pair: truncated(round.mean_product(pair), len(round.state[pair.key_A])),
}


def in_float64(state: AdapterState) -> AdapterState:
    return {key: tensor.double() for key, tensor in state.items()}


def weight_of(model: PeftModel, pair: FactorPair, adapted: bool) -> torch.Tensor:
    """The weight the layer computes with, or that of its base layer, `(out, in)` in float64."""
    layer = model.get_base_model().get_submodule(pair.module)
    weight = layer.get_base_layer().weight.detach().double()
    if adapted:
        weight = weight + layer.get_delta_weight("default").detach().double()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def original_of(model: PeftModel, state: AdapterState, pairs: list[FactorPair]) -> dict[str, torch.Tensor]:
    """What the model computes with, less the product and plus what is subtracted: where `s B A - s B0 A0` is added."""
    helper = Round(state, [state], [1], [{pair.module: pair.scaling for pair in pairs}], pairs)
    return {
        pair.module: weight_of(model, pair, adapted=True) - helper.product(pair, 0) + subtracted(pair)
        for pair in pairs
    }


def play(name: str, model: PeftModel, num_examples: list[int], ranks: list[int] | None = None) -> None:
    """Three rounds, each compared with the formula."""
    method, adapter, pairs = METHODS[name], LiveAdapter(model), factor_pairs(model)
    rule = built(name, check_adapter(name, model))
    state = {key: randn(tuple(tensor.shape), f"global {key}") for key, tensor in adapter.read().items()}
    own = [state] * len(num_examples)
    for number in (1, 2, 3):
        split = method.roles(number).split(state)
        ended, updates, scalings = [], [], []
        for k, examples in enumerate(num_examples):
            sent, scaling = own[k] | split.shared, {pair.module: pair.scaling for pair in pairs}
            if ranks is not None:
                scaling = {pair.module: 4 / (ranks[k] + 1) for pair in pairs}
                sent = truncate_ranks(sent, pairs, ranks[k], scaling)
            delta = {
                key: torch.zeros_like(t) if key in split.frozen else randn(tuple(t.shape), f"{number} {k} {key}")
                for key, t in sent.items()
            }
            ended.append({key: tensor.double() + delta[key].double() for key, tensor in sent.items()})
            scalings.append(scaling)
            shared = {key: delta[key] for key in split.shared}
            told = None if ranks is None else scaling
            updates.append(ClientUpdate(str(k), examples, shared, num_steps=NUM_STEPS[k], scalings=told))
        adapter.write(state)
        original = original_of(model, state, pairs)

        rule.begin(split.shared, number)
        for update in updates:
            rule.add(update)
        change = rule.finish()
        state = {key: tensor + change[key] if key in change else tensor for key, tensor in state.items()}
        own = [
            {key: end[key].float() if key in split.local else tensor for key, tensor in state.items()}
            for end in ended
        ] if split.local else [state] * len(ended)  # fmt: skip
        add_to_base(model, rule.base_change, pairs)

        start = in_float64({key: tensor - change.get(key, torch.zeros(())) for key, tensor in state.items()})
        round = Round(start, ended, num_examples, scalings, pairs)
        for k in range(len(own) if split.local else 1):
            adapter.write(own[k])
            expected = BY_TENSOR[name](round) if name in BY_TENSOR else {}
            expected |= {key: ended[k][key] for key in split.local}
            for pair in pairs:
                if name in BY_TENSOR:
                    A, B = round.factors(pair, expected)
                    product = pair.scaling * B @ A
                else:
                    product = BY_PRODUCT[name](round, pair)
                ours = weight_of(model, pair, adapted=True)
                assert_close(ours, original[pair.module] + product - subtracted(pair), 1e-4)
            head = "base_model.model.classifier.weight"
            assert_close(own[k][head], expected[head] if name in BY_TENSOR else round.mean(head), 1e-4)


def test_every_method_has_a_formula() -> None:
    missing = METHODS.keys() - (BY_TENSOR.keys() | BY_PRODUCT.keys())
    assert not missing, f"add the formula of {sorted(missing)}, in float64, to BY_TENSOR or BY_PRODUCT"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_three_rounds_of_unequal_clients_follow_the_formula(name: str, model: str) -> None:
    play(name, MODELS[model](), NUM_EXAMPLES)


ALONE = [name for name in METHODS if built(name, []).min_updates == 1]


@pytest.mark.parametrize("name", ALONE)
def test_three_rounds_of_one_client_follow_the_formula(name: str) -> None:
    play(name, MODELS["lora"](), [7])


@pytest.mark.parametrize("model", ["lora", "patterns"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.takes_ranks])
def test_three_rounds_of_clients_of_mixed_ranks_follow_the_formula(name: str, model: str) -> None:
    play(name, MODELS[model](), NUM_EXAMPLES, ranks=[1, 2, 4, 1, 3])


# Properties


def model_after(name: str, updates: list[ClientUpdate]) -> AdapterState:
    """What a round makes of the tests' dense layers: the weights with the adapter, and the head."""
    new, base = aggregate(rule_of(name), random_state(LORA, "global"), with_steps(updates))
    return {HEAD: new[HEAD], **{layer.name: base.get(layer.name, 0) + layer.change(new) for layer in LORA}}


def rule_of(name: str) -> Aggregator:
    any_norm = {"max_norm": 1e3} if name == "norm_bounding" else {}
    return built(name, [layer.pair() for layer in LORA], **any_norm)


def with_steps(updates: list[ClientUpdate]) -> list[ClientUpdate]:
    for update, steps in zip(updates, NUM_STEPS, strict=True):
        update.num_steps = update.num_steps or steps
    return updates


methods = pytest.mark.parametrize("name", METHODS)


@methods
def test_order_of_clients_does_not_matter(name: str) -> None:
    expected = model_after(name, updates := updates_of(LORA, NUM_EXAMPLES))
    for order in [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3)]:
        ours = model_after(name, [updates[k] for k in order])
        for key, tensor in expected.items():
            assert_close(ours[key], tensor)


@methods
def test_only_relative_numbers_of_examples_matter(name: str) -> None:
    expected = model_after(name, updates_of(LORA, NUM_EXAMPLES))
    ours = model_after(name, updates_of(LORA, [1000 * n for n in NUM_EXAMPLES]))
    for key, tensor in expected.items():
        assert_close(ours[key], tensor)


@methods
def test_equal_updates_give_the_model_of_one_client(name: str) -> None:
    delta = random_state(LORA, "delta")
    updates = [ClientUpdate(str(k), n, dict(delta), num_steps=4) for k, n in enumerate(NUM_EXAMPLES)]
    end = add(random_state(LORA, "global"), delta)
    ours = model_after(name, updates)
    assert_close(ours[HEAD], end[HEAD])
    for layer in LORA:
        assert_close(ours[layer.name], layer.change(end))


@methods
def test_deltas_with_gradients_do_not_build_a_graph(name: str) -> None:
    """It would keep every client of the run in memory."""
    updates = updates_of(LORA, NUM_EXAMPLES)
    expected = model_after(name, updates_of(LORA, NUM_EXAMPLES))
    for update in updates:
        update.delta = {key: tensor.requires_grad_() for key, tensor in update.delta.items()}
    ours = model_after(name, updates)
    assert not any(tensor.requires_grad for tensor in ours.values())
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


@methods
def test_inputs_are_not_changed_and_results_do_not_share_memory_with_them(name: str) -> None:
    state, updates = random_state(LORA, "global"), with_steps(updates_of(LORA, NUM_EXAMPLES))
    rule = rule_of(name)
    rule.begin(state, 1)
    for update in updates:
        rule.add(update)
    for tensor in [*rule.finish().values(), *(factor for change in rule.base_change.values() for factor in change)]:
        tensor.fill_(float("nan"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in random_state(LORA, "global").items())
    for update, fresh in zip(updates, updates_of(LORA, NUM_EXAMPLES), strict=True):
        assert all(torch.equal(tensor, update.delta[key]) for key, tensor in fresh.delta.items())


@methods
def test_abandoned_round_and_earlier_rounds_leave_nothing_behind(name: str) -> None:
    state, rule = random_state(LORA, "global"), rule_of(name)
    aggregate(rule, state, with_steps(updates_of(LORA, NUM_EXAMPLES, seed="earlier")))
    rule.begin(state, 1)
    rule.add(with_steps(updates_of(LORA, NUM_EXAMPLES, seed="abandoned"))[1])
    updates = with_steps(updates_of(LORA, NUM_EXAMPLES))
    (ours, base), (expected, fresh_base) = (aggregate(one, state, updates) for one in (rule, rule_of(name)))
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    assert base.keys() == fresh_base.keys()
    assert all(torch.equal(base[key], tensor) for key, tensor in fresh_base.items())
