# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Roles of tensors, and the methods that are nothing but roles: FFA-LoRA, FedSA-LoRA, RoLoRA, FedPer, FedBN."""

from __future__ import annotations

import inspect

import pytest
import torch

from fed_trainer.methods.aggregation import METHODS, ClientUpdate
from fed_trainer.methods.server_optimizers import FedAvgM
from fed_trainer.state.adapter_state import AdapterState, state_digest
from fed_trainer.state.roles import A_FACTORS, B_FACTORS, NORMS, TensorRoles
from helpers.dense_clients import (
    HEAD,
    LORA,
    SCL,
    Layer,
    assert_close,
    mean_of,
    randn,
    random_state,
    shares_of,
    updates_of,
)


NUM_EXAMPLES = (3, 50, 200)
METHODS_BY_ROLES = ("ffa_lora", "fedsa_lora", "rolora")


def one_round(name: str, round: int, states: list[AdapterState]) -> list[AdapterState]:
    """
    What the clients hold after a round of a method: each trains at random what is not frozen, from its own local
    tensors and the shared ones, and gets the new shared ones.
    """
    method = METHODS[name]
    roles, rule = method.roles(round), method.build()
    rule.begin(roles.split(states[0]).shared, round)
    after = []
    for index, state in enumerate(states):
        split = roles.split(state)
        delta = {key: randn(tuple(t.shape), f"{round} {index} {key[-12:]}") for key, t in split.shared.items()}
        rule.add(ClientUpdate(str(index), NUM_EXAMPLES[index], delta))
        trained = {key: t + randn(tuple(t.shape), f"{round} {index} local") for key, t in split.local.items()}
        after.append(split.frozen | trained)
    mean = rule.finish()
    shared = {key: tensor + mean[key] for key, tensor in roles.split(states[0]).shared.items()}
    return [state | shared for state in after]


@pytest.mark.parametrize(
    "key, kind",
    [
        ("base_model.model.layers.0.q_proj.lora_A.weight", "A"),
        ("base_model.model.layers.0.q_proj.lora_B.weight", "B"),
        ("base_model.model.embed.lora_embedding_A", "A"),
        ("base_model.model.embed.lora_embedding_B", "B"),
        ("base_model.model.layers.0.mlp.down_proj.scl_A.weight", "A"),
        ("base_model.model.layers.0.mlp.down_proj.scl_A.bias", "A"),
        ("base_model.model.layers.0.mlp.down_proj.scl_B.weight", "B"),
        ("base_model.model.layers.0.mlp.down_proj.scl_delta_A.weight", "A"),
        ("base_model.model.layers.0.mlp.down_proj.scl_delta.weight", None),
        ("base_model.model.lora_A_block.classifier.weight", None),
        (HEAD, None),
    ],
)
def test_factors_are_recognised_by_their_names(key: str, kind: str | None) -> None:
    roles = TensorRoles(frozen=(A_FACTORS,), local=(B_FACTORS,))
    assert roles.role(key) == {"A": "frozen", "B": "local", None: "shared"}[kind]


@pytest.mark.parametrize(
    "key, is_norm",
    [
        ("base_model.model.layers.0.input_layernorm.weight", True),
        ("base_model.model.encoder.LayerNorm.bias", True),
        ("base_model.model.ln_f.weight", True),
        ("base_model.model.bn1.running_mean", True),
        ("base_model.model.bn1.num_batches_tracked", True),
        ("base_model.model.column.weight", False),
        ("base_model.model.normal_head.dense.weight", False),
        (HEAD, False),
    ],
)
def test_norms_are_recognised_by_their_names(key: str, is_norm: bool) -> None:
    assert (TensorRoles(local=(NORMS,)).role(key) == "local") == is_norm


def test_split_keeps_the_tensors_themselves() -> None:
    state = random_state(LORA, 0)
    split = TensorRoles(frozen=(A_FACTORS,), local=(r"\.classifier\.",)).split(state)
    assert split.frozen.keys() == {layer.keys[0] for layer in LORA}
    assert split.shared.keys() == {layer.keys[1] for layer in LORA}
    assert split.local.keys() == {HEAD}
    assert all(part[key] is state[key] for part in split for key in part)


@pytest.mark.parametrize(
    "roles, message",
    [
        (TensorRoles(local=("clasifier",)), "pattern 'clasifier' matches none of the 5 tensors"),
        (TensorRoles(local=("lora",), frozen=("lora_A",)), "is local and frozen at once"),
        (TensorRoles(local=("lora",), default="frozen"), "No tensor of the adapter is shared"),
    ],
    ids=["typo", "ambiguous", "nothing shared"],
)
def test_settings_that_do_not_fit_the_adapter_are_refused(roles: TensorRoles, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roles.split(random_state(LORA, 0))


def test_joined_roles_have_the_patterns_of_both_and_the_default_that_was_set() -> None:
    method, user = TensorRoles(shared=(A_FACTORS,), default="local"), TensorRoles(frozen=(r"\.classifier\.",))
    expected = TensorRoles(shared=(A_FACTORS,), frozen=(r"\.classifier\.",), default="local")
    assert method.joined(user) == user.joined(method) == expected
    assert method.joined(TensorRoles(default="local")) == method
    assert TensorRoles(local=("a", "b")).joined(TensorRoles(local=("c",))).local == ("a", "b", "c")
    split = expected.split(random_state(LORA, 0))
    assert split.shared.keys() == {layer.keys[0] for layer in LORA}
    assert split.local.keys() == {layer.keys[1] for layer in LORA}
    assert split.frozen.keys() == {HEAD}


def test_roles_with_two_defaults_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="cannot be local by one setting and frozen by the other"):
        TensorRoles(default="local").joined(TensorRoles(default="frozen"))


@pytest.mark.parametrize("role", ["shared", "local", "frozen"])
@pytest.mark.parametrize("value", ["classifier", None])
def test_string_in_the_place_of_a_tuple_is_refused(role: str, value: str | None) -> None:
    """Each of its characters would count as a pattern, and match about everything."""
    with pytest.raises(ValueError, match=f"`{role}` should be a tuple of patterns but the value passed is {value!r}"):
        TensorRoles(**{role: value})


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="'shared', 'local' or 'frozen' but the value passed is 'private'"):
        TensorRoles(default="private")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a regular expression"):
        TensorRoles(local=("(",))
    with pytest.raises(ValueError, match="The pattern 1 is not a regular expression"):
        TensorRoles(local=(1,))  # type: ignore[arg-type]


# The methods


@pytest.mark.parametrize("layers", [LORA, SCL], ids=["lora", "scl"])
def test_ffa_lora_is_the_mean_of_the_products(layers: tuple[Layer, ...]) -> None:
    state = random_state(layers, "global")
    shared = METHODS["ffa_lora"].roles(1).split(state).shared
    updates = updates_of(layers, NUM_EXAMPLES)
    for update in updates:
        update.delta = {key: update.delta[key] for key in shared}
    rule = METHODS["ffa_lora"].build()
    rule.begin(shared)
    for update in updates:
        rule.add(update)
    mean = rule.finish()
    new = state | {key: state[key] + tensor for key, tensor in mean.items()}
    for layer in layers:
        locals_ = [state | {key: state[key] + t for key, t in update.delta.items()} for update in updates]
        expected = sum(p * layer.change(local) for p, local in zip(shares_of(updates), locals_, strict=True))
        assert_close(layer.change(new), expected)
    assert sum(tensor.numel() for tensor in shared.values()) < sum(tensor.numel() for tensor in state.values())


def test_ffa_lora_needs_the_same_frozen_factor_everywhere() -> None:
    """
    Trap: in the repository of the SCL authors every client draws its own `A`. The mean of `B` then fits none of them;
    the digest of the frozen tensors tells.
    """
    layer = LORA[0]
    states = [random_state((layer,), f"client {index}") for index in range(2)]
    frozen = [METHODS["ffa_lora"].roles(1).split(state).frozen for state in states]
    assert state_digest(frozen[0]) != state_digest(frozen[1])
    assert state_digest(frozen[0]) == state_digest({key: tensor.clone() for key, tensor in frozen[0].items()})

    exact = sum(layer.change(state) for state in states) / 2
    mean_B = sum(state[layer.keys[1]] for state in states) / 2
    for state in states:
        assert (layer.change(state | {layer.keys[1]: mean_B}) - exact).norm() > 0.3 * exact.norm()


def test_fedsa_lora_shares_the_first_factor_and_nothing_else() -> None:
    states = [random_state(LORA, "global") for _ in NUM_EXAMPLES]
    after = one_round("fedsa_lora", 2, one_round("fedsa_lora", 1, states))
    for layer in LORA:
        key_A, key_B = layer.keys
        assert all(torch.equal(state[key_A], after[0][key_A]) for state in after)
        assert not torch.equal(after[1][key_B], after[0][key_B])
    assert not torch.equal(after[1][HEAD], after[0][HEAD])
    assert METHODS["fedsa_lora"].roles(1) == METHODS["fedsa_lora"].roles(2)


def test_rolora_trains_the_factors_in_turn_starting_with_the_second() -> None:
    states = [random_state(LORA, "global") for _ in NUM_EXAMPLES]
    for round in (1, 2, 3, 4):
        after = one_round("rolora", round, states)
        for layer in LORA:
            frozen, trained = layer.keys if round % 2 == 1 else layer.keys[::-1]
            assert torch.equal(after[0][frozen], states[0][frozen])
            assert not torch.equal(after[0][trained], states[0][trained])
            assert torch.equal(after[0][trained], after[1][trained])
        states = after


@pytest.mark.parametrize("round", [1, 2])
def test_rolora_is_the_mean_of_the_products_in_every_round(round: int) -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    shared = METHODS["rolora"].roles(round).split(state).shared
    rule = METHODS["rolora"].build()
    rule.begin(shared)
    for update in updates:
        update.delta = {key: update.delta[key] for key in shared}
        rule.add(update)
    new = state | {key: state[key] + tensor for key, tensor in rule.finish().items()}
    for layer in LORA:
        locals_ = [state | {key: state[key] + t for key, t in update.delta.items()} for update in updates]
        expected = sum(p * layer.change(local) for p, local in zip(shares_of(updates), locals_, strict=True))
        assert_close(layer.change(new), expected)


def test_fedper_keeps_the_head_and_averages_the_rest() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    shared = TensorRoles(local=(r"\.classifier\.",)).split(state).shared
    assert HEAD not in shared
    rule = METHODS["fedavg"].build()
    rule.begin(shared)
    for update in updates:
        rule.add(update)
    for key, tensor in rule.finish().items():
        assert_close(state[key] + tensor, mean_of(key, state, updates))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_which_tensors_are_shared(name: str) -> None:
    state = random_state(LORA, 0)
    split = METHODS[name].roles(1).split(state)
    assert split.shared
    if name not in METHODS_BY_ROLES:
        assert split.shared.keys() == state.keys()


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_subsets_of_layers_where_the_rule_has_the_option(name: str) -> None:
    assert METHODS[name].takes_layers == ("partial" in inspect.signature(METHODS[name].rule).parameters)


def test_rules_that_set_the_factors_take_no_server_optimiser() -> None:
    refusing = {name for name, method in METHODS.items() if not method.takes_server_optimizer}
    assert refusing == {"flora", "fedex_lora", "flexlora", "hetlora", "lora_fair"}


def test_momentum_would_bring_back_what_hetlora_has_set_to_zero() -> None:
    """Why it takes no server optimiser: both factors of a pruned direction overshoot, and their product is back."""
    layer = LORA[0]
    rule, optimizer = METHODS["hetlora"].build([layer.pair()]), FedAvgM()
    state = random_state((layer,), "global")
    for round in (1, 2):
        rule.begin(state, round)
        rule.add(ClientUpdate("a", 5, random_state((layer,), round, rank=1)))
        delta = rule.finish()
        assert not (state[layer.keys[0]] + delta[layer.keys[0]])[1:].any()
        state = optimizer.step(state, delta)
    assert (state[layer.keys[1]][:, 1:] @ state[layer.keys[0]][1:]).abs().max() > 0.1
