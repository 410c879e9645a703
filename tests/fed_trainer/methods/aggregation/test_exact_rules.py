# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Rules for products of factors, against dense float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fed_trainer.methods.aggregation import (
    METHODS,
    Aggregator,
    ClientUpdate,
    FedExLoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LoRAFair,
)
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.factors import FactorPair, truncate_ranks
from helpers.dense_clients import (
    ADAPTERS,
    HEAD,
    LORA,
    Layer,
    add,
    aggregate,
    assert_close,
    mean_of,
    mean_of_changes,
    randn,
    random_state,
    shares_of,
    updates_of,
)


NUM_EXAMPLES = (3, 50, 200)
adapters = pytest.mark.parametrize("layers", ADAPTERS.values(), ids=ADAPTERS)
weights = st.lists(st.integers(1, 1000), min_size=1, max_size=4)


def pairs_of(layers: tuple[Layer, ...]) -> list[FactorPair]:
    return [layer.pair() for layer in layers]


RULES = {"flora": FLoRA, "fedex_lora": FedExLoRA, "flexlora": FlexLoRA, "hetlora": HetLoRA, "lora_fair": LoRAFair}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# FLoRA and FedEx-LoRA: the model has the mean of the products


@adapters
@pytest.mark.parametrize("num_examples", [(7,), NUM_EXAMPLES], ids=["one client", "three clients"])
@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA])
def test_model_has_the_mean_of_the_products(rule, num_examples: tuple[int, ...], layers: tuple[Layer, ...]) -> None:
    state, updates = random_state(layers, "global"), updates_of(layers, num_examples)
    new, base = aggregate(rule(pairs_of(layers)), state, updates)
    for layer in layers:
        ours = base.get(layer.name, 0) + layer.change(new)
        assert_close(ours, mean_of_changes(layer, state, updates))
    assert_close(new[HEAD], mean_of(HEAD, state, updates))


@adapters
@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA])
def test_several_rounds_accumulate_in_the_base(rule, layers: tuple[Layer, ...]) -> None:
    state, aggregator = random_state(layers, "global"), rule(pairs_of(layers))
    base = {layer.name: torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64) for layer in layers}
    for round, num_examples in enumerate([NUM_EXAMPLES, (5, 1), (9,)], start=1):
        updates = updates_of(layers, num_examples, seed=round)
        expected = {layer.name: base[layer.name] + mean_of_changes(layer, state, updates) for layer in layers}
        state, added = aggregate(aggregator, state, updates, round)
        for layer in layers:
            base[layer.name] = base[layer.name] + added.get(layer.name, 0)
            assert_close(base[layer.name] + layer.change(state), expected[layer.name])


def test_fedit_is_not_exact_where_flora_and_fedex_are() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    new, _ = aggregate(METHODS["fedavg"].build(), state, updates)
    for layer in LORA:
        assert (layer.change(new) - mean_of_changes(layer, state, updates)).abs().max() > 0.1


# FLoRA


@adapters
def test_flora_restarts_without_a_change(layers: tuple[Layer, ...]) -> None:
    state, updates = random_state(layers, "global"), updates_of(layers, NUM_EXAMPLES)
    new, _ = aggregate(FLoRA(pairs_of(layers)), state, updates)
    for layer in layers:
        assert_close(layer.change(new), torch.zeros(layer.d_out, layer.d_in), tolerance=2e-6)


def test_flora_restart_is_random_per_round_and_module_and_the_same_everywhere() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    first, again, later, other_seed = (
        aggregate(FLoRA(pairs_of(LORA), seed=seed), state, updates, round)[0]
        for seed, round in [(0, 1), (0, 1), (0, 2), (1, 1)]
    )
    for layer in LORA:
        key_A, key_B = layer.keys
        assert torch.equal(first[key_A], again[key_A])
        assert not first[key_B].any()
        bound = layer.d_in**-0.5
        assert 0.3 * bound < first[key_A].abs().max() <= bound + 1e-6
        for other in (later, other_seed):
            assert (first[key_A] - other[key_A]).abs().max() > 0.01


def test_flora_stacks_clients_of_any_rank_and_scaling_with_weights_on_one_factor() -> None:
    state = random_state(LORA, "global")
    updates, ranks = [], {"c0": 1, "c1": 2, "c2": 3}
    for index, (client, rank) in enumerate(ranks.items()):
        scalings = {layer.name: 4 / (rank + 1) for layer in LORA}
        delta = random_state(LORA, client, rank)
        updates.append(ClientUpdate(client, NUM_EXAMPLES[index], delta, scalings=scalings))
    _, base = aggregate(FLoRA(pairs_of(LORA)), state, updates)
    for layer in LORA:
        expected = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)
        for share, update in zip(shares_of(updates), updates, strict=True):
            r, s_k = min(ranks[update.client], layer.r), update.scalings[layer.name]
            A = (state[layer.keys[0]][:r] + update.delta[layer.keys[0]]).double()
            B = state[layer.keys[1]].double()[:, :r] * layer.scaling / s_k + update.delta[layer.keys[1]].double()
            expected += share * s_k * B @ A
        assert_close(base[layer.name], expected)


def test_flora_weights_are_not_squared() -> None:
    """The weight belongs on one factor of the stack; on both it would count twice."""
    layer = Layer("q_proj", 3, 2, 1, 1.0)
    state = {layer.keys[0]: torch.zeros(1, 3), layer.keys[1]: torch.zeros(2, 1)}
    delta = {layer.keys[0]: torch.ones(1, 3), layer.keys[1]: torch.ones(2, 1)}
    _, base = aggregate(FLoRA([layer.pair()]), state, [ClientUpdate(str(i), 1, delta) for i in range(4)])
    assert_close(base["q_proj"], torch.ones(2, 3))


# FedEx-LoRA


def test_fedex_adapter_is_the_mean_of_the_factors() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    new, _ = aggregate(FedExLoRA(pairs_of(LORA)), state, updates)
    for key, tensor in new.items():
        assert_close(tensor, mean_of(key, state, updates))


def test_fedex_residual_has_no_more_than_k_times_r_columns() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    rule = FedExLoRA(pairs_of(LORA))
    aggregate(rule, state, updates)
    for layer in LORA:
        assert rule.base_change[layer.name].num_columns <= len(updates) * layer.r


@pytest.mark.parametrize("max_rank", [1, 3])
def test_fedex_residual_cut_to_a_budget_is_its_best_approximation(max_rank: int) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    rule = FedExLoRA(pairs_of(LORA), max_rank=max_rank)
    _, base = aggregate(rule, state, updates)
    for layer in LORA:
        means = {key: mean_of(key, state, updates) for key in layer.keys}
        residual = mean_of_changes(layer, state, updates) - layer.scaling * means[layer.keys[1]] @ means[layer.keys[0]]
        u, values, vt = torch.linalg.svd(residual)
        best = u[:, :max_rank] @ torch.diag(values[:max_rank]) @ vt[:max_rank]
        assert rule.base_change[layer.name].num_columns == max_rank
        assert_close(base[layer.name], best)


@adapters
def test_fedex_leaves_the_base_alone_for_equal_updates(layers: tuple[Layer, ...]) -> None:
    state, update = random_state(layers, "global"), random_state(layers, "update")
    updates = [ClientUpdate(str(i), n, update) for i, n in enumerate(NUM_EXAMPLES)]
    new, base = aggregate(FedExLoRA(pairs_of(layers)), state, updates)
    for change in base.values():
        assert not change.any()
    for key, tensor in new.items():
        assert_close(tensor, (state[key] + update[key]), tolerance=1e-6)


def test_residual_of_nearly_equal_clients_does_not_drown_in_rounding() -> None:
    layer = Layer("q_proj", 6, 5, 2, 1.0)
    state = {key: 100 * tensor for key, tensor in random_state((layer,), "global").items()}
    updates = updates_of((layer,), (1, 1))
    for update in updates:
        update.delta = {key: 1e-4 * tensor for key, tensor in update.delta.items()}
    _, base = aggregate(FedExLoRA([layer.pair()]), state, updates)
    A, B = ([update.delta[key].double() for update in updates] for key in layer.keys)
    expected = (B[0] - B[1]) @ (A[0] - A[1]) / 4  # about 1e-8, of products of about 1e4
    torch.testing.assert_close(base["q_proj"], expected, rtol=1e-4, atol=0)


# FlexLoRA


@adapters
def test_flexlora_is_the_truncated_svd_of_the_mean_product(layers: tuple[Layer, ...]) -> None:
    state, updates = random_state(layers, "global"), updates_of(layers, NUM_EXAMPLES)
    new, base = aggregate(FlexLoRA(pairs_of(layers)), state, updates)
    assert base == {}
    for layer in layers:
        mean = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)
        for share, update in zip(shares_of(updates), updates, strict=True):
            A, B = layer.factors(add(state, update.delta))
            mean += share * layer.scaling * B @ A
        u, values, vt = torch.linalg.svd(mean)
        best = u[:, : layer.r] @ torch.diag(values[: layer.r]) @ vt[: layer.r]
        A, B = layer.factors(new)
        assert_close(layer.scaling * B @ A, best)


def test_flexlora_gives_each_client_the_best_approximation_of_its_rank() -> None:
    layer = Layer("q_proj", 7, 6, 4, 0.5)
    state, updates = random_state((layer,), "global"), updates_of((layer,), NUM_EXAMPLES)
    new, _ = aggregate(FlexLoRA([layer.pair()]), state, updates)
    u, values, vt = torch.linalg.svd(mean_of_changes(layer, state, updates))
    for rank in (1, 2, 3, 4):
        s_k = 2 / rank
        sent = truncate_ranks(new, [layer.pair()], rank, {"q_proj": s_k})
        ours = s_k * sent[layer.keys[1]].double() @ sent[layer.keys[0]].double()
        assert_close(ours, u[:, :rank] @ torch.diag(values[:rank]) @ vt[:rank])


def test_flexlora_takes_clients_of_mixed_ranks_and_scalings() -> None:
    layer = Layer("q_proj", 7, 6, 4, 0.5)
    state, updates = random_state((layer,), "global"), []
    expected = torch.zeros(6, 7, dtype=torch.float64)
    for index, (rank, n) in enumerate(zip((1, 2, 4), NUM_EXAMPLES, strict=True)):
        s_k = 2 / rank
        delta = random_state((layer,), index, rank)
        updates.append(ClientUpdate(str(index), n, delta, scalings={"q_proj": s_k}))
        A = state[layer.keys[0]][:rank].double() + delta[layer.keys[0]].double()
        B = state[layer.keys[1]][:, :rank].double() * layer.scaling / s_k + delta[layer.keys[1]].double()
        expected += n / sum(NUM_EXAMPLES) * s_k * B @ A
    new, _ = aggregate(FlexLoRA([layer.pair()]), state, updates)
    u, values, vt = torch.linalg.svd(expected)
    assert_close(layer.change(new), u[:, :4] @ torch.diag(values[:4]) @ vt[:4])


def test_flexlora_leaves_no_direction_that_cannot_be_trained() -> None:
    """A mean product of rank 1 leaves three of four directions: `B` is zero there, so `A` must not be."""
    layer = Layer("q_proj", 7, 6, 4, 0.5)
    state = random_state((layer,), "global")
    zero = {key: -tensor for key, tensor in state.items()}
    one = dict(zero)
    one[layer.keys[0]] = zero[layer.keys[0]] + torch.ones(4, 7)
    one[layer.keys[1]] = zero[layer.keys[1]] + torch.ones(6, 4)
    for delta, rank in [(zero, 0), (one, 1)]:
        new, _ = aggregate(FlexLoRA([layer.pair()]), state, [ClientUpdate("a", 5, delta)])
        A, B = new[layer.keys[0]], new[layer.keys[1]]
        assert (A.norm(dim=1) > 0.1).all()
        assert B[:, rank:].abs().max() < 1e-6
        assert_close(layer.change(new), layer.change(add(state, delta)))


# HetLoRA and zero-padding


@adapters
def test_hetlora_weights_factors_by_the_norms_of_the_products(layers: tuple[Layer, ...]) -> None:
    state, updates = random_state(layers, "global"), updates_of(layers, NUM_EXAMPLES)
    new, _ = aggregate(HetLoRA(pairs_of(layers)), state, updates)
    locals_ = [add(state, update.delta) for update in updates]
    norms = [sum(layer.change(local).square().sum() for layer in layers).sqrt() for local in locals_]
    for key, tensor in new.items():
        mean = sum(norm * local[key].double() for norm, local in zip(norms, locals_, strict=True)) / sum(norms)
        assert_close(tensor, mean)


@pytest.mark.parametrize("weighting", ["norm", "examples"])
def test_hetlora_pads_smaller_ranks_with_zeros(weighting: str) -> None:
    layer = Layer("q_proj", 7, 5, 3, 1.5)
    state, updates, padded, weights = random_state((layer,), "global"), [], [], []
    for index, (rank, n) in enumerate(zip((1, 3, 2), NUM_EXAMPLES, strict=True)):
        delta = random_state((layer,), index, rank)
        updates.append(ClientUpdate(str(index), n, delta))
        A, B = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
        A[:rank] = state[layer.keys[0]][:rank] + delta[layer.keys[0]]
        B[:, :rank] = state[layer.keys[1]][:, :rank] + delta[layer.keys[1]]
        padded.append((A, B))
        weights.append((B @ A).norm() if weighting == "norm" else n)
    new, _ = aggregate(HetLoRA([layer.pair()], weighting), state, updates)
    for position in (0, 1):
        mean = sum(w * factors[position] for w, factors in zip(weights, padded, strict=True)) / sum(weights)
        assert_close(new[layer.keys[position]], mean)


def test_hetlora_averages_what_clients_of_other_scalings_do() -> None:
    """`s_k B_k A_k` is `s (s_k / s B_k) A_k` in the scaling of the server."""
    layer = Layer("q_proj", 7, 5, 3, 1.5)
    state, delta = random_state((layer,), "global"), random_state((layer,), 0, rank=2)
    new, _ = aggregate(HetLoRA([layer.pair()]), state, [ClientUpdate("a", 4, delta, scalings={"q_proj": 0.6})])
    A = (state[layer.keys[0]][:2] + delta[layer.keys[0]]).double()
    B = state[layer.keys[1]][:, :2].double() * 1.5 / 0.6 + delta[layer.keys[1]].double()
    assert_close(layer.change(new), 0.6 * B @ A)


def test_hetlora_sum_starts_from_zero_and_not_from_the_old_global() -> None:
    """
    Trap: a sum that starts from the old global adapter keeps directions that no client has any more, and doubles
    others.
    """
    layer = Layer("q_proj", 7, 5, 3, 1.5)
    state = random_state((layer,), "global")
    updates = [ClientUpdate(str(i), 1, random_state((layer,), i, rank=2)) for i in range(2)]
    new, _ = aggregate(HetLoRA([layer.pair()]), state, updates)
    assert state[layer.keys[0]][2].abs().max() > 0.1
    assert not new[layer.keys[0]][2].any()
    assert not new[layer.keys[1]][:, 2].any()


def test_hetlora_refuses_a_round_without_any_product() -> None:
    layer = LORA[0]
    state = random_state((layer,), "global")
    zero = {key: -tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="product that is not zero"):
        aggregate(HetLoRA([layer.pair()]), state, [ClientUpdate("a", 5, zero)])


# LoRA-FAIR


@adapters
@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_lora_fair_is_the_closed_form_of_ridge_regression(ridge: float, layers: tuple[Layer, ...]) -> None:
    state, updates = random_state(layers, "global"), updates_of(layers, NUM_EXAMPLES)
    new, base = aggregate(LoRAFair(pairs_of(layers), ridge), state, updates)
    assert base == {}
    for layer in layers:
        locals_ = [layer.factors(add(state, update.delta)) for update in updates]
        A, B, dW = (
            sum(p * x for p, x in zip(shares_of(updates), tensors, strict=True))
            for tensors in zip(*[(A, B, B @ A) for A, B in locals_], strict=True)
        )
        dB = (dW - B @ A) @ A.T @ torch.linalg.inv(A @ A.T + ridge * torch.eye(layer.r, dtype=torch.float64))
        new_A, new_B = layer.factors(new)
        assert_close(new_A, A)
        assert_close(new_B, B + dB)


def test_lora_fair_comes_closer_to_the_mean_of_the_products_than_fedit() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    fair, _ = aggregate(LoRAFair(pairs_of(LORA), 1e-6), state, updates)
    fedit, _ = aggregate(METHODS["fedavg"].build(), state, updates)
    for layer in LORA:
        target = mean_of_changes(layer, state, updates)
        assert (layer.change(fair) - target).norm() < 0.9 * (layer.change(fedit) - target).norm()


# Properties of all


@rules
@settings(deadline=None, max_examples=15)
@given(num_examples=weights, seed=st.integers(0, 100), data=st.data())
def test_order_of_clients_does_not_matter(rule, num_examples: list[int], seed: int, data: st.DataObject) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, num_examples, seed)
    assert_same_model(rule, state, updates, data.draw(st.permutations(updates)))


@rules
@settings(deadline=None, max_examples=15)
@given(num_examples=weights, seed=st.integers(0, 100), factor=st.integers(2, 1000))
def test_only_relative_weights_matter(rule, num_examples: list[int], seed: int, factor: int) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, num_examples, seed)
    assert_same_model(rule, state, updates, updates_of(LORA, [n * factor for n in num_examples], seed))


@rules
@settings(deadline=None, max_examples=10)
@given(num_examples=weights, seed=st.integers(0, 100))
def test_equal_updates_give_that_model(rule, num_examples: list[int], seed: int) -> None:
    state, delta = random_state(LORA, "global"), random_state(LORA, seed)
    updates = [ClientUpdate(str(i), n, delta) for i, n in enumerate(num_examples)]
    new, base = aggregate(rule(pairs_of(LORA)), state, updates)
    for layer in LORA:
        assert_close(base.get(layer.name, 0) + layer.change(new), layer.change(add(state, delta)), tolerance=1e-4)


def assert_same_model(rule, state: AdapterState, ones: list[ClientUpdate], others: list[ClientUpdate]) -> None:
    (new, base), (new_too, base_too) = (aggregate(rule(pairs_of(LORA)), state, updates) for updates in (ones, others))
    for layer in LORA:
        one = base.get(layer.name, 0) + layer.change(new)
        assert_close(base_too.get(layer.name, 0) + layer.change(new_too), one, tolerance=1e-4)
    assert_close(new_too[HEAD], new[HEAD])


@settings(deadline=None, max_examples=20)
@given(num_examples=weights, seed=st.integers(0, 100))
def test_flora_and_fedex_equal_the_mean_of_products_for_any_weights(num_examples: list[int], seed: int) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, num_examples, seed)
    for rule in (FLoRA, FedExLoRA):
        new, base = aggregate(rule(pairs_of(LORA)), state, updates)
        for layer in LORA:
            ours = base.get(layer.name, 0) + layer.change(new)
            assert_close(ours, mean_of_changes(layer, state, updates), tolerance=1e-4)


@rules
def test_rounds_are_independent_and_updates_may_be_freed(rule) -> None:
    state, aggregator = random_state(LORA, "global"), rule(pairs_of(LORA))
    aggregator.begin(state)
    aggregator.add(updates_of(LORA, (9,), seed="abandoned")[0])
    expected, expected_base = aggregate(rule(pairs_of(LORA)), state, updates_of(LORA, NUM_EXAMPLES))

    aggregator.begin(state)
    for update in updates_of(LORA, NUM_EXAMPLES):
        aggregator.add(update)
        for tensor in update.delta.values():
            tensor.fill_(float("nan"))
    new = add(state, aggregator.finish())
    assert all(torch.equal(new[key], tensor) for key, tensor in expected.items())
    for module, (left, right) in aggregator.base_change.items():
        assert torch.equal(left.double() @ right.double(), expected_base[module])
    assert all(torch.equal(tensor, random_state(LORA, "global")[key]) for key, tensor in state.items())


@rules
def test_round_without_clients_raises(rule) -> None:
    with pytest.raises(ValueError, match="nothing to"):
        aggregate(rule(pairs_of(LORA)), random_state(LORA, "global"), [])


@rules
def test_both_factors_must_be_shared(rule) -> None:
    state = random_state(LORA, "global")
    del state[LORA[0].keys[1]]
    with pytest.raises(ValueError, match=r"combines both factors of every pair, but \S*q_proj.lora_B.weight"):
        rule(pairs_of(LORA)).begin(state)


@rules
def test_adapter_without_a_head_is_fine(rule) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    for entry in (state, *(update.delta for update in updates)):
        del entry[HEAD]
    new, _ = aggregate(rule(pairs_of(LORA)), state, updates)
    assert new.keys() == state.keys()


@rules
def test_bfloat16_adapters_are_combined_in_float32(rule) -> None:
    def in_bfloat16(state: AdapterState) -> AdapterState:
        return {key: tensor.to(torch.bfloat16) for key, tensor in state.items()}

    state, updates = in_bfloat16(random_state(LORA, "global")), updates_of(LORA, NUM_EXAMPLES)
    for update in updates:
        update.delta = in_bfloat16(update.delta)
    same = {key: tensor.float() for key, tensor in state.items()}
    same_updates = [
        ClientUpdate(u.client, u.num_examples, {k: t.float() for k, t in u.delta.items()}) for u in updates
    ]
    new, base = aggregate(rule(pairs_of(LORA)), state, updates)
    expected, expected_base = aggregate(rule(pairs_of(LORA)), same, same_updates)
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    for key, tensor in expected.items():
        assert_close(new[key], tensor, tolerance=1e-6)
    for module, change in expected_base.items():
        assert_close(base[module], change, tolerance=1e-6)


@rules
def test_finish_ends_the_round(rule) -> None:
    aggregator = rule(pairs_of(LORA))
    aggregate(aggregator, random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES))
    for call in (aggregator.finish, lambda: aggregator.add(updates_of(LORA, (5,))[0])):
        with pytest.raises(RuntimeError, match="No round is open"):
            call()


@rules
@pytest.mark.parametrize("position", [0, 1], ids=["A", "B"])
def test_refused_update_leaves_nothing_behind(rule, position: int) -> None:
    """The round goes on without a client whose last tensors turn out not to fit."""
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    expected, expected_base = aggregate(rule(pairs_of(LORA)), state, updates)
    key = LORA[-1].keys[position]
    lacking, misshapen = updates_of(LORA, (40, 60), seed="bad")
    del lacking.delta[key]
    misshapen.delta[key] = misshapen.delta[key][1:]
    aggregator = rule(pairs_of(LORA))
    aggregator.begin(state)
    for update in updates:
        aggregator.add(update)
        with pytest.raises(ValueError, match=f"client 'c0' lacks the tensor {key}, and the rule combines both"):
            aggregator.add(lacking)
        with pytest.raises(ValueError, match="from client 'c1' have the shapes|client 'c1' differs in mlp.up"):
            aggregator.add(misshapen)
    new = add(state, aggregator.finish())
    assert all(torch.equal(new[key], tensor) for key, tensor in expected.items())
    for module, (left, right) in aggregator.base_change.items():
        assert torch.equal(left.double() @ right.double(), expected_base[module])


@pytest.mark.parametrize("rule", [FLoRA, FlexLoRA, HetLoRA])
def test_scalings_that_lack_a_module_are_refused(rule) -> None:
    update = ClientUpdate("a", 5, random_state(LORA, 1), scalings={LORA[0].name: 2.0})
    with pytest.raises(ValueError, match="The `scalings` of client 'a' lack mlp.up"):
        aggregate(rule(pairs_of(LORA)), random_state(LORA, 0), [update])


def test_client_of_another_scaling_in_bfloat16_starts_from_what_it_was_sent() -> None:
    """It is sent `B` rescaled and rounded; the server must not add its delta to the exact one."""
    layer, s_k = Layer("q_proj", 7, 6, 2, 1.5), {"q_proj": 0.7}
    state = {key: tensor.to(torch.bfloat16) for key, tensor in random_state((layer,), "global").items()}
    sent = truncate_ranks(state, [layer.pair()], 2, s_k)
    zero = {key: torch.zeros_like(tensor) for key, tensor in sent.items()}
    _, base = aggregate(FLoRA([layer.pair()]), state, [ClientUpdate("a", 5, zero, scalings=s_k)])
    assert_close(base["q_proj"], 0.7 * sent[layer.keys[1]].double() @ sent[layer.keys[0]].double(), 1e-6)


def test_truncated_factors_are_copies() -> None:
    state = random_state(LORA, "global")
    for rank in (1, 3):
        for pad in (False, True):
            sent = truncate_ranks(state, pairs_of(LORA), rank, pad=pad)
            for layer in LORA:
                for key in layer.keys:
                    sent[key].fill_(float("nan"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in random_state(LORA, "global").items())


def test_chorus_trap_fedex_residual_carries_the_scaling() -> None:
    """Trap: chorus-fl folds the residual without `alpha / r`."""
    layer, double = Layer("q_proj", 7, 5, 2, 1.0), Layer("q_proj", 7, 5, 2, 2.0)
    (_, single), (_, scaled) = (
        aggregate(FedExLoRA([one.pair()]), random_state((one,), "global"), updates_of((one,), NUM_EXAMPLES))
        for one in (layer, double)
    )
    assert_close(scaled["q_proj"], 2 * single["q_proj"], 1e-6)


# Embeddings, which PEFT starts with `A = 0` and a normal `B`


EMBED = FactorPair("embed", "e.lora_embedding_A", "e.lora_embedding_B", 0.5, transposed=True)


def test_flora_restarts_embeddings_as_peft_starts_them() -> None:
    """
    With `A` of 1 / sqrt(vocabulary) and `B = 0`, each token would read a column of tiny entries, and hardly learn.
    """
    state = {EMBED.key_A: torch.zeros(2, 1000), EMBED.key_B: randn((6, 2), "B")}
    delta = {EMBED.key_A: randn((2, 1000), "delta"), EMBED.key_B: torch.zeros(6, 2)}
    new, base = aggregate(FLoRA([EMBED]), state, [ClientUpdate("a", 5, delta)])
    assert not new[EMBED.key_A].any()
    assert 0.3 < new[EMBED.key_B].std() < 2
    assert not torch.equal(new[EMBED.key_B], state[EMBED.key_B])
    assert_close(base["embed"], 0.5 * state[EMBED.key_B].double() @ delta[EMBED.key_A].double())


def test_flexlora_leaves_no_direction_of_an_embedding_that_cannot_be_trained() -> None:
    state = {EMBED.key_A: torch.zeros(3, 11), EMBED.key_B: randn((6, 3), "B")}
    delta = {EMBED.key_A: torch.zeros(3, 11), EMBED.key_B: torch.zeros(6, 3)}
    delta[EMBED.key_A][:, 4] = 1.0  # one token was seen, so the product has rank 1
    new, _ = aggregate(FlexLoRA([EMBED]), state, [ClientUpdate("a", 5, delta)])
    A, B = new[EMBED.key_A], new[EMBED.key_B]
    assert_close(B @ A, state[EMBED.key_B] @ delta[EMBED.key_A])
    assert all(A[index].any() or B[:, index].any() for index in range(3))


# Subsets of layers


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA, FlexLoRA, LoRAFair])
def test_round_in_which_only_the_head_was_trained_counts(rule) -> None:
    state, (update,) = random_state(LORA, "global"), updates_of(LORA, (5,))
    update.delta = {HEAD: update.delta[HEAD]}
    new, base = aggregate(rule(pairs_of(LORA), partial=True), state, [update])
    assert base == {}
    assert_close(new[HEAD], state[HEAD] + update.delta[HEAD])
    assert all(torch.equal(new[key], state[key]) for layer in LORA for key in layer.keys)


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA, FlexLoRA, LoRAFair])
def test_module_is_aggregated_over_the_clients_that_have_it(rule) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    for key in LORA[0].keys:
        del updates[1].delta[key]
    new, base = aggregate(rule(pairs_of(LORA), partial=True), state, updates)
    for layer, theirs in [(LORA[0], [updates[0], updates[2]]), (LORA[1], updates)]:
        alone = [
            ClientUpdate(u.client, u.num_examples, {key: u.delta[key] for key in (*layer.keys, HEAD)}) for u in theirs
        ]
        only = {key: state[key] for key in (*layer.keys, HEAD)}
        expected, expected_base = aggregate(rule([layer.pair()]), only, alone)
        ours = base.get(layer.name, 0) + layer.change(new)
        assert_close(ours, expected_base.get(layer.name, 0) + layer.change(expected))
    assert_close(new[HEAD], mean_of(HEAD, state, updates))


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA, FlexLoRA, LoRAFair])
def test_module_that_no_client_has_stays_as_it_is(rule) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    for update in updates:
        for key in LORA[0].keys:
            del update.delta[key]
    new, base = aggregate(rule(pairs_of(LORA), partial=True), state, updates)
    assert LORA[0].name not in base
    for key in LORA[0].keys:
        assert torch.equal(new[key], state[key])


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA, FlexLoRA, LoRAFair])
def test_head_that_no_client_has_stays_as_it_is(rule) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    for update in updates:
        del update.delta[HEAD]
    new, _ = aggregate(rule(pairs_of(LORA), partial=True), state, updates)
    assert torch.equal(new[HEAD], state[HEAD])


# Bounded memory


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA, FlexLoRA])
def test_cutting_back_keeps_memory_bounded_and_is_exact_up_to_the_rank(rule) -> None:
    """All clients move within the same two directions, so four columns hold everything, whatever their number."""
    layer = Layer("q_proj", 9, 8, 2, 0.5)
    state = {key: torch.zeros_like(tensor) for key, tensor in random_state((layer,), "global").items()}
    updates = updates_of((layer,), [1] * 12)
    A = randn((2, 9), "direction")
    for index, update in enumerate(updates):
        update.delta[layer.keys[0]] = randn((2, 2), f"mix {index}") @ A
    exact, base = aggregate(rule([layer.pair()]), state, updates)
    bounded, bounded_base = aggregate(rule([layer.pair()], max_columns=4), state, updates)
    assert_close(
        bounded_base.get("q_proj", 0) + layer.change(bounded), base.get("q_proj", 0) + layer.change(exact), 1e-4
    )


class LargestTensor(TorchDispatchMode):
    """Number of entries of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: setattr(self, "numel", max(self.numel, tensor.numel())), result)
        return result


@rules
def test_no_rule_forms_the_product_of_the_factors(rule) -> None:
    layer = Layer("q_proj", 90, 80, 2, 0.5)
    state, updates = random_state((layer,), "global"), updates_of((layer,), NUM_EXAMPLES)
    with LargestTensor() as largest:
        aggregator = rule([layer.pair()])
        aggregator.begin(state)
        for update in updates:
            aggregator.add(update)
        aggregator.finish()
    assert 90 * 2 <= largest.numel <= 90 * 2 * (len(updates) + 1)


# Refusals


@pytest.mark.parametrize("rule", [FedExLoRA, LoRAFair])
def test_means_of_factors_refuse_other_ranks_and_scalings(rule) -> None:
    state = random_state(LORA, "global")
    with pytest.raises(ValueError, match="client 'a' differs in mlp.up"):
        aggregate(rule(pairs_of(LORA)), state, [ClientUpdate("a", 1, random_state(LORA, 1, rank=2))])
    scalings = {layer.name: 2 * layer.scaling for layer in LORA}
    with pytest.raises(ValueError, match="client 'a' differs in q_proj"):
        aggregate(rule(pairs_of(LORA)), state, [ClientUpdate("a", 1, random_state(LORA, 1), scalings=scalings)])


@pytest.mark.parametrize("rule", [FLoRA, FlexLoRA, HetLoRA])
def test_larger_rank_than_the_global_one_is_refused(rule) -> None:
    wider = tuple(Layer(layer.name, layer.d_in, layer.d_out, layer.r + 1, layer.scaling) for layer in LORA)
    with pytest.raises(ValueError, match="global rank must be the largest"):
        aggregate(rule(pairs_of(LORA)), random_state(LORA, 0), [ClientUpdate("a", 1, random_state(wider, 1))])


@pytest.mark.parametrize("kind", ["federa", "scl"])
@pytest.mark.parametrize("rule", [FLoRA, FlexLoRA, HetLoRA])
def test_factors_with_a_start_have_one_rank(rule, kind: str) -> None:
    layers = ADAPTERS[kind]
    state = random_state(layers, "global")
    with pytest.raises(ValueError, match="start from the principal part of the base weight"):
        aggregate(rule(pairs_of(layers)), state, [ClientUpdate("a", 1, random_state(layers, 1, rank=2))])
    with pytest.raises(ValueError, match="start from the principal part of the base weight"):
        truncate_ranks(state, pairs_of(layers), 1)
    scalings = {layer.name: 2 * layer.scaling for layer in layers}
    with pytest.raises(ValueError, match="start from the principal part of the base weight"):
        aggregate(rule(pairs_of(layers)), state, [ClientUpdate("a", 1, random_state(layers, 1), scalings=scalings)])
    with pytest.raises(ValueError, match="start from the principal part of the base weight"):
        truncate_ranks(state, pairs_of(layers), 3, scalings)


@pytest.mark.parametrize("rule", [FLoRA, FedExLoRA])
def test_rules_that_add_to_the_base_refuse_modules_that_cannot_take_it(rule) -> None:
    pair = FactorPair("lm_head", "A", "B", 1.0, unfoldable="its base weight is tied")
    with pytest.raises(ValueError, match="adds to the base weights, but for lm_head its base weight is tied"):
        rule([pair])


def test_update_that_lacks_a_tensor_is_refused_unless_asked_for() -> None:
    state, (update,) = random_state(LORA, "global"), updates_of(LORA, (5,))
    del update.delta[HEAD]
    rule: Aggregator = METHODS["fedavg"].build()
    with pytest.raises(ValueError, match="client 'c0' lacks the tensor base_model.model.classifier.weight"):
        aggregate(rule, state, [update])


# Ranks


def test_padded_ranks_change_nothing_but_the_shapes() -> None:
    state = random_state(LORA, "global")
    short = truncate_ranks(state, pairs_of(LORA), 1)
    padded = truncate_ranks(state, pairs_of(LORA), 1, pad=True)
    for layer in LORA:
        for key in layer.keys:
            assert padded[key].shape == state[key].shape
        assert torch.equal(layer.change(padded), layer.change(short))
    assert padded[HEAD] is state[HEAD]


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 but the value passed is 0"):
        truncate_ranks(random_state(LORA, "global"), pairs_of(LORA), 0)


# Settings


@pytest.mark.parametrize(
    "build, message",
    [
        # zero columns would be no residual, and a negative number cuts from the other end
        (lambda: FedExLoRA([], max_rank=0), "`max_rank` should be an integer of at least 1 or None .* is 0"),
        (lambda: FedExLoRA([], max_rank="4"), "`max_rank` should be an integer of at least 1 or None .* is '4'"),
        (lambda: FedExLoRA([], max_columns=-1), "`max_columns` should be an integer of at least 1 or None .* is -1"),
        (lambda: FLoRA([], max_columns=0), "`max_columns` should be an integer of at least 1 or None .* is 0"),
        (lambda: FLoRA([], seed="a"), "`seed` should be an integer of at least 0 but the value passed is 'a'"),
        (lambda: FlexLoRA([], max_columns=2.0), "`max_columns` should be an integer of at least 1 or None .* is 2.0"),
        (lambda: LoRAFair([], ridge="0.1"), "`ridge` should be positive and finite but the value passed is '0.1'"),
        (lambda: LoRAFair([], ridge=math.inf), "`ridge` should be positive and finite but the value passed is inf"),
        (lambda: LoRAFair([], ridge=math.nan), "`ridge` should be positive and finite but the value passed is nan"),
        (lambda: LoRAFair([], ridge=0), "`ridge` should be positive and finite but the value passed is 0"),
        (lambda: HetLoRA([], weighting="norms"), "`weighting` should be one of .* is 'norms'"),
        (lambda: HetLoRA([], weighting=["norm"]), r"`weighting` should be one of .* is \['norm'\]"),
        (lambda: FLoRA([], partial="false"), "`partial` should be True or False but the value passed is 'false'"),
        (
            lambda: METHODS["fedavg"].build(weights="rows"),
            "`weights` should be one of .* but the value passed is 'rows'",
        ),
    ],
)
def test_settings_out_of_range_or_of_a_wrong_type_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
