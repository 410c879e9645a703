# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Server optimisers against their formulas, one coordinate at a time in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save

from fed_trainer.methods.server_optimizers import (
    SERVER_OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedDyn,
    FedYogi,
    ServerOptimizer,
)
from fed_trainer.state.adapter_state import AdapterState
from helpers.states import random_state


SHAPES = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (4, 2)}
LR, B1, B2, TAU = 0.3, 0.8, 0.95, 0.02


DELTAS = [random_state(SHAPES, 10 + round, size=0.1 * round) for round in range(1, 6)]


def adagrad(v: float, d: float) -> float:
    return v + d * d


def adam(v: float, d: float) -> float:
    return B2 * v + (1 - B2) * d * d


def yogi(v: float, d: float) -> float:
    return v - (1 - B2) * d * d * math.copysign(1, v - d * d)


def by_formula(w: float, deltas: list[float], second_moment: Callable[[float, float], float]) -> float:
    """Algorithm 2 of Adaptive Federated Optimization."""
    m, v = 0.0, TAU * TAU
    for d in deltas:
        m = B1 * m + (1 - B1) * d
        v = second_moment(v, d)
        w = w + LR * m / (math.sqrt(v) + TAU)
    return w


def momentum_by_formula(w: float, deltas: list[float]) -> float:
    v = 0.0
    for d in deltas:
        v = B1 * v + d
        w = w + LR * v
    return w


OPTIMIZERS = {
    "sgd": (lambda: ServerOptimizer(LR), lambda w, deltas: w + LR * sum(deltas)),
    "fedavgm": (lambda: FedAvgM(LR, B1), momentum_by_formula),
    "fedadagrad": (lambda: FedAdagrad(LR, B1, TAU), lambda w, deltas: by_formula(w, deltas, adagrad)),
    "fedadam": (lambda: FedAdam(LR, B1, B2, TAU), lambda w, deltas: by_formula(w, deltas, adam)),
    "fedyogi": (lambda: FedYogi(LR, B1, B2, TAU), lambda w, deltas: by_formula(w, deltas, yogi)),
}
optimizers = pytest.mark.parametrize("build, formula", OPTIMIZERS.values(), ids=OPTIMIZERS)


def run(optimizer: ServerOptimizer, state: AdapterState, deltas: list[AdapterState]) -> AdapterState:
    for delta in deltas:
        state = optimizer.step(state, delta)
    return state


@optimizers
def test_several_rounds_follow_the_formula(build, formula) -> None:
    ours = run(build(), random_state(SHAPES, 0), DELTAS)
    for key, start in random_state(SHAPES, 0).items():
        for index, w in enumerate(start.flatten().tolist()):
            expected = formula(w, [delta[key].flatten()[index].item() for delta in DELTAS])
            assert ours[key].flatten()[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_second_moment_is_that_of_the_delta_and_not_of_the_momentum() -> None:
    """
    Trap: OpenFedLLM squares the momentum. After a first delta of 0 and a second of 1, only `D^2` tells them apart
    fully.
    """
    delta = [{"w": torch.tensor([value])} for value in (1.0, 0.0)]
    ours = run(FedAdam(1.0, 0.9, 0.99, 1e-3), {"w": torch.zeros(1)}, delta)["w"].item()
    m1, v1 = 0.1, 0.99 * 1e-6 + 0.01
    m2, v2 = 0.09, 0.99 * v1
    right = m1 / (math.sqrt(v1) + 1e-3) + m2 / (math.sqrt(v2) + 1e-3)
    trap_v1 = 0.99 * 1e-6 + 0.01 * m1**2
    trap_v2 = 0.99 * trap_v1 + 0.01 * m2**2
    trap = m1 / (math.sqrt(trap_v1) + 1e-3) + m2 / (math.sqrt(trap_v2) + 1e-3)
    assert ours == pytest.approx(right, rel=1e-5)
    assert abs(right - trap) > 1


def test_second_moment_starts_at_tau_squared_and_has_no_bias_correction() -> None:
    ours = FedAdam(1.0, 0.9, 0.99, tau=0.5).step({"w": torch.zeros(1)}, {"w": torch.tensor([1.0])})["w"].item()
    assert ours == pytest.approx(0.1 / (math.sqrt(0.99 * 0.25 + 0.01) + 0.5), rel=1e-6)


def test_momentum_is_a_sum_and_not_an_average() -> None:
    """Trap: with an average `(1 - beta) Delta` the steps would be ten times smaller."""
    optimizer, state = FedAvgM(1.0, 0.9), {"w": torch.zeros(1)}
    first = optimizer.step(state, {"w": torch.ones(1)})
    assert first["w"].item() == pytest.approx(1.0)
    state = run(optimizer, first, [{"w": torch.ones(1)}] * 200)
    assert optimizer.step(state, {"w": torch.ones(1)})["w"].item() - state["w"].item() == pytest.approx(10, rel=1e-3)


def test_every_name_selects_the_optimiser_of_that_name() -> None:
    """
    Trap: OpenFedLLM knows FedAdagrad by two spellings, of which the right one raises and the wrong one runs FedAvg.
    """
    assert {name: cls.__name__.lower() for name, cls in SERVER_OPTIMIZERS.items() if name != "sgd"} == {
        name: name for name in ("fedavgm", "fedadagrad", "fedadam", "fedyogi")
    }
    assert SERVER_OPTIMIZERS["sgd"] is ServerOptimizer
    steps = {name: cls(lr=0.1).step(random_state(SHAPES, 0), DELTAS[0]) for name, cls in SERVER_OPTIMIZERS.items()}
    second = {
        name: run(cls(lr=0.1), random_state(SHAPES, 0), DELTAS[:3])["x.lora_A.weight"]
        for name, cls in SERVER_OPTIMIZERS.items()
    }
    assert all(state.keys() == SHAPES.keys() for state in steps.values())
    names = list(second)
    assert not any(torch.equal(second[a], second[b]) for a in names for b in names if a < b)


def test_feddyn_cannot_be_chosen_without_its_local_objective() -> None:
    assert FedDyn not in SERVER_OPTIMIZERS.values()


def test_plain_step_with_rate_one_is_the_mean_itself() -> None:
    stepped = ServerOptimizer().step(random_state(SHAPES, 0), DELTAS[0])
    assert all(torch.equal(stepped[key], tensor + DELTAS[0][key]) for key, tensor in random_state(SHAPES, 0).items())


@optimizers
def test_state_dict_continues_a_run_bit_for_bit(build, formula) -> None:
    whole = run(build(), random_state(SHAPES, 0), DELTAS)
    first = build()
    state = run(first, random_state(SHAPES, 0), DELTAS[:2])
    saved = first.state_dict()
    run(first, state, DELTAS[2:])  # must not move what was saved
    second = build()
    second.load_state_dict(load(save(saved)))  # through safetensors
    resumed = run(second, state, DELTAS[2:])
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def test_state_of_another_optimiser_is_refused() -> None:
    adam = FedAdam()
    adam.step(random_state(SHAPES, 0), DELTAS[0])
    with pytest.raises(ValueError, match="'second_moment.x.lora_A.weight', which FedAvgM does not keep"):
        FedAvgM().load_state_dict(adam.state_dict())


def test_state_of_an_optimiser_with_fewer_moments_is_refused() -> None:
    """FedAvgM and FedAdam both have a momentum, but not the same."""
    momentum = FedAvgM()
    momentum.step(random_state(SHAPES, 0), DELTAS[0])
    with pytest.raises(
        ValueError, match="The state has no 'second_moment' for some of its tensors, which FedAdam keeps"
    ):
        FedAdam().load_state_dict(momentum.state_dict())
    FedAdam().load_state_dict({})  # of a run before its first step


def test_integer_buffers_are_rounded_and_not_truncated() -> None:
    state, delta = {"n": torch.tensor(100)}, {"n": torch.tensor(6.9999995)}
    assert ServerOptimizer().step(state, delta)["n"].item() == 107
    assert ServerOptimizer().step({"n": torch.tensor(9)}, {"n": torch.tensor(-1.2)})["n"].item() == 8


@optimizers
def test_inputs_are_not_changed_and_outputs_are_new(build, formula) -> None:
    state, delta = random_state(SHAPES, 0), random_state(SHAPES, 1)
    optimizer = build()
    stepped = optimizer.step(state, delta)
    for tensor in stepped.values():
        tensor.fill_(float("nan"))
    assert all(torch.equal(tensor, random_state(SHAPES, 0)[key]) for key, tensor in state.items())
    assert all(torch.equal(tensor, random_state(SHAPES, 1)[key]) for key, tensor in delta.items())
    assert all(torch.isfinite(tensor).all() for tensor in optimizer.state_dict().values())


@optimizers
def test_tensors_without_a_delta_stay_with_their_moments(build, formula) -> None:
    """RoLoRA trains the factors in turn: the momentum of one must wait while the other is trained."""
    key, other = SHAPES
    alternating, state = build(), random_state(SHAPES, 0)
    for delta in DELTAS:
        state = alternating.step(state, {key: delta[key]})
        state = alternating.step(state, {other: delta[other]})
    together = run(build(), random_state(SHAPES, 0), DELTAS)
    assert all(torch.equal(state[name], tensor) for name, tensor in together.items())


@optimizers
def test_dtype_of_the_state_is_kept_and_moments_are_float32(build, formula) -> None:
    state = {key: tensor.to(torch.bfloat16) for key, tensor in random_state(SHAPES, 0).items()}
    optimizer = build()
    assert {tensor.dtype for tensor in run(optimizer, state, DELTAS).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in optimizer.state_dict().values()} <= {torch.float32}


def test_feddyn_follows_the_formula_with_some_of_the_clients() -> None:
    alpha, num_clients, sampled = 0.3, 8, [2, 3, 2, 1, 8]
    optimizer, state = FedDyn(alpha, num_clients), {"w": torch.tensor([0.5])}
    w, h = 0.5, 0.0
    for count, delta in zip(sampled, (0.2, -0.1, 0.4, 0.3, -0.2), strict=True):
        state = optimizer.step(state, {"w": torch.tensor([delta])}, num_sampled=count)
        h = h - alpha / num_clients * count * delta
        w = w + delta - h / alpha
        assert state["w"].item() == pytest.approx(w, rel=1e-5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ServerOptimizer(0.0), "`lr` should be positive and finite but the value passed is 0.0"),
        (lambda: ServerOptimizer("0.1"), "`lr` should be positive and finite but the value passed is '0.1'"),
        (lambda: ServerOptimizer(math.inf), "`lr` should be positive and finite but the value passed is inf"),
        (lambda: FedAvgM(beta=1.0), r"`beta` should be in \[0, 1\) but the value passed is 1.0"),
        (lambda: FedAdam(beta2=-0.1), r"`beta2` should be in \[0, 1\) but the value passed is -0.1"),
        (lambda: FedYogi(tau=0.0), "`tau` should be positive and finite but the value passed is 0.0"),
        (lambda: FedDyn(0.0, 5), "`alpha` should be positive and finite but the value passed is 0.0"),
        (lambda: FedDyn(0.1, 0), "`num_clients` should be an integer of at least 1 but the value passed is 0"),
    ],
)
def test_settings_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
