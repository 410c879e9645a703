# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`FedAvg` against the formula in float64, written out here without the code under test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.methods.aggregation import METHODS, ClientUpdate, FedAvg
from fed_trainer.state.adapter_state import AdapterState
from helpers.states import random_state


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {f"{LAYER}.lora_A.weight": (2, 7), f"{LAYER}.lora_B.weight": (5, 2), "head.bias": (3,)}
NUM_EXAMPLES = (3, 50, 1000)

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=5)


def updates_of(num_examples: list[int] | tuple[int, ...], seed: int = 0, dtype=torch.float32) -> list[ClientUpdate]:
    return [
        ClientUpdate(f"client_{index}", number, random_state(SHAPES, 1000 * seed + index, dtype=dtype))
        for index, number in enumerate(num_examples)
    ]


def aggregate(updates: list[ClientUpdate], aggregator: FedAvg | None = None, dtype=torch.float32) -> AdapterState:
    aggregator = aggregator or FedAvg()
    aggregator.begin(random_state(SHAPES, 999, dtype=dtype))
    for update in updates:
        aggregator.add(update)
    return aggregator.finish()


def formula(updates: list[ClientUpdate]) -> AdapterState:
    """Equation of FedAvg, one dense float64 tensor per client and key."""
    shares = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    shares = shares / shares.sum()
    return {
        key: torch.einsum("k,k...->...", shares, torch.stack([update.delta[key].double() for update in updates]))
        for key in SHAPES
    }


def assert_equal(ours: AdapterState, expected: AdapterState, **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), expected[key].double(), **(tolerance or {"rtol": 0, "atol": 3e-6}))


def test_unequal_weights() -> None:
    updates = updates_of(NUM_EXAMPLES)
    assert_equal(aggregate(updates), formula(updates))


def test_one_client_is_its_own_mean() -> None:
    (update,) = updates_of([17])
    assert_equal(aggregate([update]), update.delta, rtol=1e-6, atol=0)


def test_rounds_are_independent() -> None:
    aggregator = FedAvg()
    for round, num_examples in enumerate([NUM_EXAMPLES, (5,), (8, 1)]):
        updates = updates_of(num_examples, seed=round)
        assert_equal(aggregate(updates, aggregator), formula(updates))


def test_abandoned_round_leaves_nothing_behind() -> None:
    aggregator = FedAvg()
    aggregator.begin(random_state(SHAPES, 999))
    aggregator.add(updates_of([100], seed=7)[0])
    updates = updates_of(NUM_EXAMPLES)
    assert_equal(aggregate(updates, aggregator), formula(updates))


def test_bfloat16_updates_are_averaged_in_float32() -> None:
    updates = updates_of(NUM_EXAMPLES, dtype=torch.bfloat16)
    mean = aggregate(updates, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in mean.values()} == {torch.float32}
    assert_equal(mean, formula(updates))


def test_many_small_updates_are_not_swallowed() -> None:
    # a sum kept in bfloat16 would stop at 256 of these
    ones = {key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
    mean = aggregate([ClientUpdate(f"client_{index}", 1, ones) for index in range(1000)], dtype=torch.bfloat16)
    assert_equal(mean, ones, rtol=0, atol=0)


@pytest.mark.parametrize(
    "updates", [[], [ClientUpdate("empty", 0, random_state(SHAPES, 0))]], ids=["none", "no examples"]
)
def test_nothing_to_average(updates: list[ClientUpdate]) -> None:
    with pytest.raises(ValueError, match="No client update with examples arrived in this round"):
        aggregate(updates)


def test_client_without_examples_does_not_count() -> None:
    updates = updates_of([4, 0, 12])
    assert_equal(aggregate(updates), formula([updates[0], updates[2]]))


def test_metrics_are_not_read() -> None:
    updates = updates_of(NUM_EXAMPLES)
    for update in updates:
        update.metrics["num_examples"] = update.metrics["train_loss"] = float("nan")
    assert_equal(aggregate(updates), formula(updates))


def test_state_and_updates_are_not_modified() -> None:
    state, updates = random_state(SHAPES, 1), updates_of(NUM_EXAMPLES)
    aggregator = FedAvg()
    aggregator.begin(state)
    for update in updates:
        aggregator.add(update)
    for tensor in aggregator.finish().values():
        tensor.fill_(float("nan"))  # the caller's from now on
    assert_equal(state, random_state(SHAPES, 1), rtol=0, atol=0)
    for update, fresh in zip(updates, updates_of(NUM_EXAMPLES), strict=True):
        assert update.num_examples == fresh.num_examples
        assert_equal(update.delta, fresh.delta, rtol=0, atol=0)


def test_mean_does_not_alias_the_next_round() -> None:
    aggregator = FedAvg()
    first = aggregate(updates_of(NUM_EXAMPLES), aggregator)
    kept = {key: tensor.clone() for key, tensor in first.items()}
    second = aggregate(updates_of(NUM_EXAMPLES, seed=1), aggregator)
    assert_equal(first, kept, rtol=0, atol=0)
    assert not {tensor.data_ptr() for tensor in first.values()} & {tensor.data_ptr() for tensor in second.values()}


def test_update_may_be_freed_after_add() -> None:
    updates = updates_of(NUM_EXAMPLES)
    expected = formula(updates)
    aggregator = FedAvg()
    aggregator.begin(random_state(SHAPES, 999))
    for update in updates:
        aggregator.add(update)
        for tensor in update.delta.values():
            tensor.fill_(float("nan"))
    assert_equal(aggregator.finish(), expected)


@pytest.mark.parametrize("call", [lambda rule: rule.finish(), lambda rule: rule.add(updates_of([5])[0])])
def test_finish_ends_the_round(call) -> None:
    """A second `finish` would divide the sums, which are the caller's means by then, once more."""
    aggregator, updates = FedAvg(), updates_of(NUM_EXAMPLES)
    with pytest.raises(RuntimeError, match="No round is open"):
        call(aggregator)
    mean = aggregate(updates, aggregator)
    with pytest.raises(RuntimeError, match="No round is open"):
        call(aggregator)
    assert_equal(mean, formula(updates))


def test_update_of_another_shape_is_refused_and_does_not_broadcast() -> None:
    updates = updates_of(NUM_EXAMPLES)
    updates[1].delta["head.bias"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"head.bias of client 'client_1' has the shape \(1,\) instead of \(3,\)"):
        aggregate(updates)


def test_integer_buffers_are_averaged() -> None:
    aggregator = FedAvg()
    aggregator.begin({"bn.num_batches_tracked": torch.tensor(3)})
    for client, (number, batches) in enumerate([(1, 4), (3, 8)]):
        aggregator.add(ClientUpdate(str(client), number, {"bn.num_batches_tracked": torch.tensor(batches)}))
    assert aggregator.finish()["bn.num_batches_tracked"].item() == 7


@given(num_examples=weights, seed=st.integers(0, 1000), data=st.data())
def test_order_of_clients_does_not_matter(num_examples: list[int], seed: int, data: st.DataObject) -> None:
    updates = updates_of(num_examples, seed)
    shuffled = data.draw(st.permutations(updates))
    assert_equal(aggregate(shuffled), formula(updates))


@given(num_examples=weights, seed=st.integers(0, 1000), factor=st.integers(1, 1000))
def test_only_relative_weights_matter(num_examples: list[int], seed: int, factor: int) -> None:
    updates = updates_of(num_examples, seed)
    scaled = updates_of([number * factor for number in num_examples], seed)
    assert_equal(aggregate(scaled), formula(updates))


@given(num_examples=weights, seed=st.integers(0, 1000))
def test_equal_updates_give_that_update(num_examples: list[int], seed: int) -> None:
    delta = random_state(SHAPES, seed)
    assert_equal(aggregate([ClientUpdate(str(i), n, delta) for i, n in enumerate(num_examples)]), delta)


def test_fedit_baseline_is_not_client_0_alone() -> None:
    """
    The averaging code of FLoRA's repository assigns the sum of its FedIT branch to a misspelt variable
    (`weighted_sindgle_weights`), so that the baseline is client 0 times its share, whatever the others sent. Here
    every client moves the mean, by its own share.
    """
    updates = updates_of(NUM_EXAMPLES)
    mean = aggregate(updates)
    for index, number in enumerate(NUM_EXAMPLES):
        moved = updates_of(NUM_EXAMPLES)
        for tensor in moved[index].delta.values():
            tensor += 1
        difference = {key: tensor - mean[key] for key, tensor in aggregate(moved).items()}
        share = number / sum(NUM_EXAMPLES)
        assert_equal(difference, {key: torch.full(shape, share) for key, shape in SHAPES.items()})


def test_fedit_averages_factors_not_products() -> None:
    """
    The documented error of FedIT: the product of the mean factors misses the covariance of the clients' factors,
    `sum_k p_k B_k A_k = B A + sum_k p_k (B_k - B)(A_k - A)` with the means `A`, `B`.
    """
    start, updates = random_state(SHAPES, 1), updates_of(NUM_EXAMPLES)
    aggregator = FedAvg()
    aggregator.begin(start)
    for update in updates:
        aggregator.add(update)
    mean = aggregator.finish()

    key_a, key_b = list(SHAPES)[:2]
    shares = [update.num_examples / sum(NUM_EXAMPLES) for update in updates]
    factors_a = [(start[key_a] + update.delta[key_a]).double() for update in updates]
    factors_b = [(start[key_b] + update.delta[key_b]).double() for update in updates]
    mean_a = sum(share * a for share, a in zip(shares, factors_a, strict=True))
    mean_b = sum(share * b for share, b in zip(shares, factors_b, strict=True))
    ours_a, ours_b = (start[key_a] + mean[key_a]).double(), (start[key_b] + mean[key_b]).double()
    torch.testing.assert_close(ours_a, mean_a, rtol=0, atol=3e-6)
    torch.testing.assert_close(ours_b, mean_b, rtol=0, atol=3e-6)

    clients = list(zip(shares, factors_b, factors_a, strict=True))
    mean_of_products = sum(share * b @ a for share, b, a in clients)
    covariance = sum(share * (b - mean_b) @ (a - mean_a) for share, b, a in clients)
    assert covariance.abs().max() > 0.01
    torch.testing.assert_close(mean_of_products - ours_b @ ours_a, covariance, rtol=0, atol=3e-5)


def test_name_in_the_config() -> None:
    assert METHODS["fedavg"].rule is FedAvg
