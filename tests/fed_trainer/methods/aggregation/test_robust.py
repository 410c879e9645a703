# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Robust rules against plain formulas, and with clients that send what they like."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_trainer.methods.aggregation import (
    METHODS,
    Aggregator,
    ClientUpdate,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBounding,
    TrimmedMean,
    robust,
)
from fed_trainer.state.adapter_state import AdapterState
from helpers.dense_clients import assert_close, randn


SHAPES = {"lora_A.weight": (2, 7), "lora_B.weight": (5, 2), "head.bias": (3,)}
STATE = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
RULES = {
    "median": CoordinateMedian,
    "trimmed_mean": lambda: TrimmedMean(0.2),
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "multi_krum": MultiKrum,
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def random_delta(seed: str | int, size: float = 1.0) -> AdapterState:
    return {key: size * randn(shape, f"{seed} {key[:6]}") for key, shape in SHAPES.items()}


def updates_of(count: int, seed: str | int = 0, num_examples: int = 1) -> list[ClientUpdate]:
    return [ClientUpdate(f"client {i:02}", num_examples, random_delta(f"{seed} {i}")) for i in range(count)]


def aggregate(rule: Aggregator, updates: list[ClientUpdate]) -> AdapterState:
    rule.begin(STATE)
    for update in updates:
        rule.add(update)
    return rule.finish()


def flat(delta: AdapterState) -> torch.Tensor:
    return torch.cat([delta[key].double().flatten() for key in SHAPES])


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_median_of_every_coordinate(count: int) -> None:
    updates = updates_of(count)
    ours = flat(aggregate(CoordinateMedian(), updates))
    values = torch.stack([flat(update.delta) for update in updates]).T.tolist()
    assert_close(ours, torch.tensor([statistics.median(row) for row in values], dtype=torch.float64), 1e-6)


@pytest.mark.parametrize(
    "count, trim, dropped", [(5, 0.2, 1), (7, 0.3, 2), (4, 0.0, 0), (9, 0.49, 4), (100, 0.29, 29)]
)
def test_mean_without_the_extremes_of_every_coordinate(count: int, trim: float, dropped: int) -> None:
    updates = updates_of(count)
    ours = flat(aggregate(TrimmedMean(trim), updates))
    rows = [sorted(row)[dropped : count - dropped] for row in torch.stack([flat(u.delta) for u in updates]).T.tolist()]
    assert_close(ours, torch.tensor([math.fsum(row) / len(row) for row in rows], dtype=torch.float64), 1e-6)


def test_geometric_median_has_the_least_sum_of_weighted_distances() -> None:
    updates = updates_of(5)
    for update, number in zip(updates, (1, 2, 3, 4, 5), strict=True):
        update.num_examples = number
    ours = flat(aggregate(GeometricMedian(), updates))

    def cost(point: torch.Tensor) -> float:
        return sum(update.num_examples * float((flat(update.delta) - point).norm()) for update in updates)

    for index in range(20):
        assert cost(ours) < cost(ours + 0.01 * randn(tuple(ours.shape), index).double())
    # stationary: the weighted unit vectors towards the updates cancel
    pull = sum(
        update.num_examples * (flat(update.delta) - ours) / (flat(update.delta) - ours).norm() for update in updates
    )
    assert pull.norm() < 1e-3


def test_geometric_median_on_a_line_is_the_weighted_median() -> None:
    direction = random_delta("direction")
    positions, numbers = (0.0, 1.0, 2.0, 10.0), (1, 1, 4, 1)
    updates = [
        ClientUpdate(str(p), n, {key: p * tensor for key, tensor in direction.items()})
        for p, n in zip(positions, numbers, strict=True)
    ]
    assert_close(flat(aggregate(GeometricMedian(), updates)), 2.0 * flat(direction), 1e-4)


def krum_scores(updates: list[ClientUpdate], num_byzantine: int) -> list[float]:
    points = [flat(update.delta) for update in updates]
    scores = []
    for i, point in enumerate(points):
        distances = sorted(float((point - other).square().sum()) for j, other in enumerate(points) if j != i)
        scores.append(sum(distances[: len(points) - num_byzantine - 2]))
    return scores


@pytest.mark.parametrize("count, num_byzantine", [(5, 1), (7, 2), (6, 0)])
def test_krum_selects_the_update_with_the_least_score(count: int, num_byzantine: int) -> None:
    updates = updates_of(count, num_examples=3)
    scores = krum_scores(updates, num_byzantine)
    expected = updates[scores.index(min(scores))].delta
    assert_close(flat(aggregate(Krum(num_byzantine), updates)), flat(expected), 1e-6)


@pytest.mark.parametrize("num_selected, expected_selected", [(None, 5), (3, 3)])
def test_multi_krum_averages_the_updates_with_the_least_scores(num_selected, expected_selected: int) -> None:
    updates = updates_of(7)
    scores = krum_scores(updates, 2)
    chosen = sorted(range(7), key=scores.__getitem__)[:expected_selected]
    expected = sum(flat(updates[index].delta) for index in chosen) / expected_selected
    assert_close(flat(aggregate(MultiKrum(2, num_selected), updates)), expected, 1e-6)


def test_norm_bounding_scales_the_whole_update() -> None:
    updates = [ClientUpdate("long", 1, random_delta(0, 100.0)), ClientUpdate("short", 3, random_delta(1, 0.01))]
    ours = flat(aggregate(NormBounding(2.0), updates))
    long, short = (flat(update.delta) for update in updates)
    assert long.norm() > 2 > short.norm()
    assert_close(ours, (2 * long / long.norm() + 3 * short) / 4, 1e-6)


def test_norm_bounding_passes_on_to_another_rule_what_it_needs() -> None:
    updates = updates_of(2)
    for update, steps in zip(updates, (1, 4), strict=True):
        update.num_steps = steps
    bounded = aggregate(NormBounding(1e-3, METHODS["fednova"].build()), updates)
    expected = 2.5 * sum(1e-3 * flat(u.delta) / flat(u.delta).norm() / u.num_steps for u in updates) / 2
    assert_close(flat(bounded), expected, 1e-6)


@pytest.mark.parametrize("rule", [GeometricMedian, Krum, MultiKrum, lambda: NormBounding(0.5)])
def test_counts_of_batches_are_not_compared_with_weights(rule) -> None:
    """Clients of different sizes count different numbers of batches, which are large beside any change of weights."""
    counts = [900, 20, 300, 50, 7, 100]
    updates = updates_of(len(counts))
    expected = aggregate(rule(), updates)
    for update, count in zip(updates, counts, strict=True):
        update.delta["bn.num_batches_tracked"] = torch.tensor(count)
    aggregator = rule()
    aggregator.begin(STATE | {"bn.num_batches_tracked": torch.tensor(5)})
    for update in updates:
        aggregator.add(update)
    result = aggregator.finish()
    assert torch.equal(flat(result), flat(expected))
    assert 7 <= result["bn.num_batches_tracked"] <= 900
    if isinstance(aggregator, NormBounding):
        assert result["bn.num_batches_tracked"].item() == pytest.approx(sum(counts) / len(counts))


# Byzantine clients


@rules
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_one_client_of_any_size_does_not_move_the_result_far(rule, size: float) -> None:
    honest = [ClientUpdate(str(i), 1, {k: 1 + 0.1 * t for k, t in random_delta(i).items()}) for i in range(6)]
    for position in (0, 3):
        attacker = ClientUpdate(f"{position} attacker", 1, random_delta("attack", size))
        result = flat(aggregate(rule(), [*honest, attacker]))
        assert (result - 1).abs().max() < 0.6
    plain = flat(aggregate(METHODS["fedavg"].build(), [*honest, attacker]))
    assert (plain - 1).abs().max() > 10


def test_numbers_of_examples_do_not_help_an_attacker() -> None:
    honest = [ClientUpdate(str(i), 1, random_delta(i, 0.1)) for i in range(6)]
    for rule in ("median", "trimmed_mean", "krum", "multi_krum"):
        modest = [*honest, ClientUpdate("x", 1, random_delta("attack", 50.0))]
        boastful = [*honest, ClientUpdate("x", 10**6, random_delta("attack", 50.0))]
        assert torch.equal(flat(aggregate(RULES[rule](), modest)), flat(aggregate(RULES[rule](), boastful)))


# Properties


@rules
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 100), data=st.data())
def test_order_of_clients_does_not_matter(rule, seed: int, data: st.DataObject) -> None:
    updates = updates_of(6, seed)
    shuffled = data.draw(st.permutations(updates))
    assert torch.equal(flat(aggregate(rule(), shuffled)), flat(aggregate(rule(), updates)))


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_ties_do_not_depend_on_the_order_of_arrival(data: st.DataObject) -> None:
    # on a line, the three in the middle have the same score
    updates = [
        ClientUpdate(f"c{p}", 1, {key: torch.full(shape, p) for key, shape in SHAPES.items()})
        for p in (-2.0, -1.0, 0.0, 1.0, 2.0)
    ]
    shuffled = data.draw(st.permutations(updates))
    assert torch.equal(flat(aggregate(Krum(), shuffled)), flat(aggregate(Krum(), updates)))


@rules
def test_equal_updates_give_that_update(rule) -> None:
    delta = random_delta(0)
    updates = [ClientUpdate(str(i), i + 1, delta) for i in range(6)]
    assert_close(flat(aggregate(rule(), updates)), flat(delta), 1e-6)


@rules
def test_blocks_of_coordinates_do_not_show(rule, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flat(aggregate(rule(), updates_of(6)))
    monkeypatch.setattr(robust, "BLOCK", 12)  # two coordinates of six clients
    assert_close(flat(aggregate(rule(), updates_of(6))), whole, 1e-6)


@rules
def test_rounds_are_independent(rule) -> None:
    aggregator = rule()
    aggregator.begin(STATE)
    aggregator.add(updates_of(1, "abandoned")[0])
    for seed in (1, 2):
        assert torch.equal(
            flat(aggregate(aggregator, updates_of(6, seed))), flat(aggregate(rule(), updates_of(6, seed)))
        )


@rules
def test_update_that_does_not_fit_is_refused_when_it_arrives(rule) -> None:
    lacking, misshapen = updates_of(2)
    del lacking.delta["head.bias"]
    misshapen.delta["head.bias"] = torch.ones(1)
    aggregator = rule()
    aggregator.begin(STATE)
    with pytest.raises(ValueError, match="client 'client 00' lacks the tensor head.bias"):
        aggregator.add(lacking)
    with pytest.raises(ValueError, match=r"head.bias of client 'client 01' has the shape \(1,\)"):
        aggregator.add(misshapen)
    for update in updates_of(6):
        aggregator.add(update)
    assert torch.equal(flat(aggregator.finish()), flat(aggregate(rule(), updates_of(6))))


@rules
def test_round_without_clients_raises(rule) -> None:
    with pytest.raises(ValueError, match="No client update arrived"):
        aggregate(rule(), [])


# Refusals


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: TrimmedMean(0.5), r"`trim` should be in \[0, 0.5\) but the value passed is 0.5"),
        (lambda: TrimmedMean("0.2"), r"`trim` should be in \[0, 0.5\) but the value passed is '0.2'"),
        (lambda: TrimmedMean(math.nan), r"`trim` should be in \[0, 0.5\) but the value passed is nan"),
        (lambda: Krum(-1), "`num_byzantine` should be an integer of at least 0 but the value passed is -1"),
        (lambda: Krum("1"), "`num_byzantine` should be an integer of at least 0 but the value passed is '1'"),
        (lambda: Krum(1.5), "`num_byzantine` should be an integer of at least 0 but the value passed is 1.5"),
        (
            lambda: MultiKrum(1, 0),
            "`num_selected` should be an integer of at least 1 or None but the value passed is 0",
        ),
        (lambda: NormBounding(0.0), "`max_norm` should be positive and finite but the value passed is 0.0"),
        (lambda: NormBounding("1.0"), "`max_norm` should be positive and finite but the value passed is '1.0'"),
        (lambda: NormBounding(1.0, "fedavg"), "`aggregator` should be an Aggregator, .* passed is 'fedavg'"),
        (lambda: GeometricMedian(smoothing=0.0), "`smoothing` should be positive and finite"),
        (lambda: GeometricMedian(tolerance=-1e-6), "`tolerance` should be 0 or more"),
        (lambda: GeometricMedian(max_iterations=0), "`max_iterations` should be an integer of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "rule, least",
    [
        (CoordinateMedian(), 1),
        (TrimmedMean(0.0), 1),
        (TrimmedMean(0.1), 10),
        (TrimmedMean(0.3), 4),
        (TrimmedMean(1 / 3), 3),
        (TrimmedMean(1 / 49), 49),  # 49 * (1 / 49) is less than 1
        (Krum(1), 5),
        (MultiKrum(2), 7),
        (MultiKrum(1, 9), 10),
        (NormBounding(1.0), 1),
        (NormBounding(1.0, Krum(3)), 9),
    ],
)
def test_rule_works_with_its_least_number_of_updates_and_not_with_fewer(rule: Aggregator, least: int) -> None:
    assert rule.min_updates == least
    aggregate(rule, updates_of(least))
    with pytest.raises(ValueError, match=f"at least|to include|at most|No client update|{least}"):
        aggregate(rule, updates_of(least - 1))


@pytest.mark.parametrize(
    "rule, count, message",
    [
        (Krum(1), 4, r"at least 2 f \+ 3 = 5 updates to bear f = 1 arbitrary clients, but 4 arrived"),
        (MultiKrum(1, 5), 5, "`num_selected=5` of 5 updates would have to include some of the 1 arbitrary ones"),
        (TrimmedMean(0.1), 5, "`trim=0.1` of 5 clients is less than one.* at least 10 clients"),
    ],
)
def test_rounds_that_a_rule_cannot_protect_are_refused(rule: Aggregator, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(rule, updates_of(count))


def test_geometric_median_needs_examples_to_weight_by() -> None:
    with pytest.raises(ValueError, match="nothing to weight by"):
        aggregate(GeometricMedian(), updates_of(3, num_examples=0))
