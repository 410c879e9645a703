# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients with different numbers of steps or different layers."""

from __future__ import annotations

import pytest
import torch

from fed_trainer.methods.aggregation import ClientUpdate, FedAvg, FedNova
from helpers.dense_clients import HEAD, LORA, aggregate, assert_close, random_state, shares_of, updates_of


NUM_EXAMPLES, NUM_STEPS = (3, 50, 200), (1, 4, 9)


def updates_with_steps() -> list[ClientUpdate]:
    updates = updates_of(LORA, NUM_EXAMPLES)
    for update, steps in zip(updates, NUM_STEPS, strict=True):
        update.num_steps = steps
    return updates


def sgd_weights(num_steps: int, momentum: float) -> float:
    """How often the gradients of `num_steps` steps enter the update of SGD with momentum, by running it."""
    position = velocity = 0.0
    for _ in range(num_steps):
        velocity = momentum * velocity + 1.0
        position += velocity
    return position


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_normalises_by_the_weights_of_the_local_gradients(momentum: float) -> None:
    state, updates = random_state(LORA, "global"), updates_with_steps()
    new, _ = aggregate(FedNova(momentum), state, updates)
    steps = [sgd_weights(num_steps, momentum) for num_steps in NUM_STEPS]
    effective = sum(share * a for share, a in zip(shares_of(updates), steps, strict=True))
    for key, tensor in new.items():
        expected = state[key] + effective * sum(
            share * update.delta[key].double() / a
            for share, update, a in zip(shares_of(updates), updates, steps, strict=True)
        )
        assert_close(tensor, expected)


def test_fednova_of_equal_steps_is_fedavg() -> None:
    state, updates = random_state(LORA, "global"), updates_with_steps()
    for update in updates:
        update.num_steps = 7
    (nova, _), (average, _) = (aggregate(rule, state, updates) for rule in (FedNova(0.5), FedAvg()))
    for key, tensor in nova.items():
        assert_close(tensor, average[key], 1e-6)


def test_fednova_does_not_follow_the_client_that_steps_most() -> None:
    """Two clients with one gradient each, of which one takes ten steps: the mean direction is in the middle."""
    state = {HEAD: torch.zeros(1, 2)}
    updates = [
        ClientUpdate("a", 1, {HEAD: torch.tensor([[1.0, 0.0]])}, num_steps=1),
        ClientUpdate("b", 1, {HEAD: torch.tensor([[0.0, 10.0]])}, num_steps=10),
    ]
    new, _ = aggregate(FedNova(), state, updates)
    assert_close(new[HEAD], 5.5 * torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("num_steps", [None, 0])
def test_fednova_needs_the_number_of_steps(num_steps: int | None) -> None:
    state, updates = random_state(LORA, "global"), updates_with_steps()
    updates[1].num_steps = num_steps
    with pytest.raises(ValueError, match=f"client 'c1' reports `num_steps={num_steps}`"):
        aggregate(FedNova(), state, updates)


@pytest.mark.parametrize("momentum", [1.0, -0.1, "0.9"])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"`momentum` should be in \[0, 1\) but the value passed is {momentum!r}"):
        FedNova(momentum)


def test_tensor_is_averaged_over_the_clients_that_have_it() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    key = LORA[0].keys[0]
    del updates[2].delta[key]
    del updates[0].delta[HEAD]
    new, _ = aggregate(FedAvg(partial=True), state, updates)
    assert_close(new[key], state[key] + (3 * updates[0].delta[key] + 50 * updates[1].delta[key]).double() / 53)
    assert_close(new[HEAD], state[HEAD] + (50 * updates[1].delta[HEAD] + 200 * updates[2].delta[HEAD]).double() / 250)


def test_fednova_of_a_tensor_that_one_client_has_is_that_update() -> None:
    state, updates = random_state(LORA, "global"), updates_with_steps()
    del updates[0].delta[HEAD], updates[2].delta[HEAD]
    new, _ = aggregate(FedNova(partial=True), state, updates)
    assert_close(new[HEAD], state[HEAD] + updates[1].delta[HEAD])
    absent = random_state(LORA, "global")
    for update in updates:
        update.delta.pop(HEAD, None)
    new, _ = aggregate(FedNova(partial=True), absent, updates)
    assert torch.equal(new[HEAD], absent[HEAD])


def test_tensor_that_no_client_has_stays_as_it_is() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    for update in updates:
        del update.delta[HEAD]
    new, _ = aggregate(FedAvg(partial=True), state, updates)
    assert torch.equal(new[HEAD], state[HEAD])


def test_uniform_weights_do_not_look_at_numbers_of_examples() -> None:
    state, updates = random_state(LORA, "global"), updates_of(LORA, NUM_EXAMPLES)
    new, _ = aggregate(FedAvg(weights="uniform"), state, updates)
    for key, tensor in new.items():
        assert_close(tensor, state[key] + sum(update.delta[key].double() for update in updates) / 3)
