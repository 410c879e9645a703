# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a client adds to its own gradient, as functions on gradients: FedProx, SCAFFOLD (option II), FedDyn.

All of them run between `backward` and the optimiser step, over the trainable tensors that are shared.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .adapter_state import AdapterState


__all__ = [
    "add_control_variates",
    "add_dynamic_regularizer",
    "add_proximal_term",
    "check_plain_sgd",
    "next_client_control",
    "next_client_correction",
    "next_server_control",
]


def add_proximal_term(parameters: dict[str, torch.nn.Parameter], start: AdapterState, mu: float) -> None:
    """
    FedProx (Li et al., 2018, https://huggingface.co/papers/1812.06127): adds the gradient `mu (v - w)` of `mu / 2 ||v - w||^2`, with
    `w` the adapter the round started from. A parameter without a gradient gets one.
    """
    for key, parameter in parameters.items():
        _add_gradient(parameter, mu * (parameter.detach() - start[key].to(parameter)))


def add_control_variates(
    parameters: dict[str, torch.nn.Parameter], client_control: AdapterState, server_control: AdapterState
) -> None:
    """SCAFFOLD (Karimireddy et al., 2019, https://huggingface.co/papers/1910.06378): `g <- g - c_k + c`."""
    for key, parameter in parameters.items():
        _add_gradient(parameter, (server_control[key] - client_control[key]).to(parameter))


def next_client_control(
    client_control: AdapterState, server_control: AdapterState, delta: AdapterState, sum_of_lrs: float
) -> AdapterState:
    """
    SCAFFOLD, option II: `c_k <- c_k - c + (x - y) / (K eta)`, with `delta = y - x` the client's update and `sum_of_lrs` = `K eta`, the
    sum of the learning rates of its steps. That is the mean of the gradients it took, because it took them with plain SGD
    ([`check_plain_sgd`]).
    """
    if not sum_of_lrs > 0:
        raise ValueError(f"`sum_of_lrs` should be positive but the value passed is {sum_of_lrs!r}")
    return {
        key: control - server_control[key] - delta[key].to(control) / sum_of_lrs
        for key, control in client_control.items()
    }


def next_server_control(
    server_control: AdapterState, changes: Iterable[AdapterState], num_clients: int
) -> AdapterState:
    """SCAFFOLD: `c <- c + 1/N sum_k (c_k_new - c_k)` over the clients of the round, with `N` the number of all clients."""
    total = {key: control.clone() for key, control in server_control.items()}
    for change in changes:
        for key, tensor in total.items():
            tensor.add_(change[key], alpha=1 / num_clients)
    return total


def check_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse local optimisers for which the control variates of SCAFFOLD are not gradients.

    Raises:
        ValueError: For anything but SGD without momentum and weight decay.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(
            f"SCAFFOLD reads the mean gradient off a client's update, which only plain SGD allows: {type(optimizer).__name__} scales "
            "its steps. Set `optim='sgd'`, or use 'fedavg' with a server optimiser."
        )
    for group in optimizer.param_groups:
        used = [name for name in ("momentum", "weight_decay") if group[name] != 0]
        if used:
            raise ValueError(
                f"SCAFFOLD reads the mean gradient off a client's update, but `{used[0]}={group[used[0]]}` adds to it. Set it to 0."
            )


def add_dynamic_regularizer(
    parameters: dict[str, torch.nn.Parameter], start: AdapterState, correction: AdapterState, alpha: float
) -> None:
    """
    FedDyn (Acar et al., 2021, https://huggingface.co/papers/2111.04263): adds the gradient `- h_k + alpha (v - w)`; the server's half
    is [`~fed_trainer.server_optimizers.FedDyn`].
    """
    for key, parameter in parameters.items():
        _add_gradient(
            parameter, alpha * (parameter.detach() - start[key].to(parameter)) - correction[key].to(parameter)
        )


def next_client_correction(correction: AdapterState, delta: AdapterState, alpha: float) -> AdapterState:
    """FedDyn: `h_k <- h_k - alpha Delta_k`, from `h_k = 0`."""
    return {key: tensor - alpha * delta[key].to(tensor) for key, tensor in correction.items()}


@torch.no_grad()
def _add_gradient(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
