# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Local objectives against their gradients, and on quadratics whose optimum is known."""

from __future__ import annotations

import pytest
import torch

from fed_trainer.adapter_state import AdapterState
from fed_trainer.local_objectives import (
    add_control_variates,
    add_dynamic_regularizer,
    add_proximal_term,
    check_plain_sgd,
    next_client_control,
    next_client_correction,
    next_server_control,
)
from fed_trainer.server_optimizers import FedDyn


SHAPES = {"A": (2, 3), "B": (4,)}
# clients with different curvatures and optima: FedAvg with several local steps does not end at the common optimum
CURVATURES, OPTIMA = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0])
COMMON_OPTIMUM = float((CURVATURES * OPTIMA).sum() / CURVATURES.sum())


def random_state(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def parameters_of(state: AdapterState) -> dict[str, torch.nn.Parameter]:
    return {key: torch.nn.Parameter(tensor.clone()) for key, tensor in state.items()}


def loss_of(parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    return sum(parameter.sin().sum() for parameter in parameters.values())  # any smooth function


def gradients(parameters: dict[str, torch.nn.Parameter]) -> AdapterState:
    return {key: parameter.grad.clone() for key, parameter in parameters.items()}


def test_proximal_term_is_the_gradient_of_the_penalty() -> None:
    start, mu = random_state(0), 0.3
    ours, expected = parameters_of(random_state(1)), parameters_of(random_state(1))
    loss_of(ours).backward()
    add_proximal_term(ours, start, mu)
    penalty = mu / 2 * sum((parameter - start[key]).square().sum() for key, parameter in expected.items())
    (loss_of(expected) + penalty).backward()
    for key, gradient in gradients(expected).items():
        torch.testing.assert_close(ours[key].grad, gradient)


def test_parameter_without_a_gradient_is_pulled_back_too() -> None:
    start, parameters = random_state(0), parameters_of(random_state(1))
    add_proximal_term(parameters, start, 2.0)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, 2 * (random_state(1)[key] - start[key]))


def test_dynamic_regulariser_is_the_gradient_of_its_terms() -> None:
    start, correction, alpha = random_state(0), random_state(2), 0.3
    ours, expected = parameters_of(random_state(1)), parameters_of(random_state(1))
    loss_of(ours).backward()
    add_dynamic_regularizer(ours, start, correction, alpha)
    terms = sum(
        alpha / 2 * (parameter - start[key]).square().sum() - (correction[key] * parameter).sum()
        for key, parameter in expected.items()
    )
    (loss_of(expected) + terms).backward()
    for key, gradient in gradients(expected).items():
        torch.testing.assert_close(ours[key].grad, gradient)


def test_control_variates_replace_the_drift_of_the_client_by_that_of_all() -> None:
    own, server, parameters = random_state(3), random_state(4), parameters_of(random_state(1))
    loss_of(parameters).backward()
    plain = gradients(parameters)
    add_control_variates(parameters, own, server)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, plain[key] - own[key] + server[key])


@pytest.mark.parametrize("lrs", [[0.1] * 4, [0.2, 0.1, 0.05]], ids=["constant", "schedule"])
def test_next_client_control_is_the_mean_gradient_of_the_round(lrs: list[float]) -> None:
    start, own, server = random_state(0), random_state(3), random_state(4)
    parameters = parameters_of(start)
    mean = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
    for lr in lrs:
        optimizer = torch.optim.SGD(parameters.values(), lr=lr)
        optimizer.zero_grad()
        loss_of(parameters).backward()
        for key, gradient in gradients(parameters).items():
            mean[key] += lr / sum(lrs) * gradient
        add_control_variates(parameters, own, server)
        optimizer.step()
    delta = {key: parameter.detach() - start[key] for key, parameter in parameters.items()}
    for key, control in next_client_control(own, server, delta, sum(lrs)).items():
        torch.testing.assert_close(control, mean[key], rtol=0, atol=1e-5)


def test_next_server_control_divides_by_all_clients_and_not_by_those_of_the_round() -> None:
    control, changes = random_state(0), [random_state(1), random_state(2)]
    new = next_server_control(control, iter(changes), num_clients=10)
    for key, tensor in new.items():
        torch.testing.assert_close(tensor, control[key] + (changes[0][key] + changes[1][key]) / 10)
        assert torch.equal(control[key], random_state(0)[key])


@pytest.mark.parametrize(
    "build, message",
    [
        (torch.optim.Adam, "only plain SGD allows: Adam scales its steps"),
        (torch.optim.AdamW, "only plain SGD allows: AdamW scales its steps"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "`momentum=0.9` adds to it"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), "`weight_decay=0.01` adds to it"),
    ],
)
def test_scaffold_refuses_optimisers_whose_updates_are_not_gradients(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plain_sgd(build([torch.nn.Parameter(torch.zeros(1))]))


def test_scaffold_takes_plain_sgd() -> None:
    check_plain_sgd(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))


def test_sum_of_learning_rates_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`sum_of_lrs` should be positive but the value passed is 0.0"):
        next_client_control(random_state(0), random_state(0), random_state(0), 0.0)


# Where the rounds end, on two quadratics


def local_steps(client: int, start: float, correct=lambda parameters: None, lr: float = 0.1, steps: int = 10) -> float:
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (CURVATURES[client] / 2 * (parameter - OPTIMA[client]) ** 2).sum().backward()
        correct({"w": parameter})
        optimizer.step()
    return parameter.item()


def state_of(value: float) -> AdapterState:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def test_fedavg_ends_beside_the_common_optimum_and_scaffold_and_feddyn_at_it() -> None:
    fedavg = scaffold = 0.0
    for _ in range(100):
        fedavg = sum(local_steps(client, fedavg) for client in (0, 1)) / 2
    assert abs(fedavg - COMMON_OPTIMUM) > 0.2

    server, own = state_of(0.0), [state_of(0.0), state_of(0.0)]
    for _ in range(100):
        deltas, changes = [], []
        for client in (0, 1):
            local = local_steps(
                client,
                scaffold,
                lambda p, c=client: add_control_variates(p, own[c], server),  # noqa: B023
            )
            deltas.append(local - scaffold)
            new = next_client_control(own[client], server, state_of(deltas[-1]), sum_of_lrs=10 * 0.1)
            changes.append({"w": new["w"] - own[client]["w"]})
            own[client] = new
        server = next_server_control(server, changes, num_clients=2)
        scaffold += sum(deltas) / 2
    assert scaffold == pytest.approx(COMMON_OPTIMUM, abs=1e-6)

    alpha, optimizer, state = 1.0, FedDyn(1.0, num_clients=2), state_of(0.0)
    corrections = [state_of(0.0), state_of(0.0)]
    for _ in range(100):
        deltas = []
        for client in (0, 1):
            start = state["w"].item()
            local = local_steps(
                client,
                start,
                lambda p, c=client, s=state: add_dynamic_regularizer(p, s, corrections[c], alpha),
                steps=50,
            )
            deltas.append(local - start)
            corrections[client] = next_client_correction(corrections[client], state_of(local - start), alpha)
        state = optimizer.step(state, state_of(sum(deltas) / 2))
    assert state["w"].item() == pytest.approx(COMMON_OPTIMUM, abs=1e-3)
