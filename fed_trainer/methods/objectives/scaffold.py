# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ...state.adapter_state import AdapterState
from ...state.client_errors import ClientError
from ..aggregation.limits import STATISTICS_ROOM, largest_value, relative_limit
from .base import LocalObjective, ServerHalf, other_objective


__all__ = ["Scaffold", "check_plain_sgd"]


class Scaffold(LocalObjective):
    """
    SCAFFOLD, option II (Karimireddy et al., 2019, https://huggingface.co/papers/1910.06378): `g <- g - c_k + c` in
    every local step, then `c_k <- c_k - c - Delta_k / (K eta)`, which is the mean of the gradients the client took,
    and `c <- c + 1/N sum_k (c_k_new - c_k)` over the clients of the round, with `N` the number of *all* clients.
    Both start at zero.

    `K eta` is the sum of the learning rates of the local steps, so that schedules are allowed. The local optimiser
    has to be plain SGD without clipping: only then is an update made of gradients.

    The server sends `c` along. A client keeps its `c_k` and sends `K eta`, one number: with the update it gives
    `c_k_new - c_k = -c - Delta_k / (K eta)`.

    Args:
        num_clients (`int`):
            Number of all clients.
    """

    keeps_client_state = True
    uniform = True
    needs_exact_updates = True
    sends: Mapping[str, torch.dtype] = MappingProxyType({"sum_of_lrs": torch.float32})

    def __init__(self, num_clients: int) -> None:
        super().__init__()
        if num_clients < 1:
            raise ValueError(f"`num_clients` should be at least 1 but the value passed is {num_clients!r}")
        self.num_clients = num_clients

    def server_half(self) -> ServerHalf:
        return ScaffoldServer(self.num_clients)

    def check(self, args: TrainingArguments) -> None:
        super().check(args)
        for name, value, needed in (
            ("optim", args.optim, OptimizerNames.SGD),
            ("optim_args", args.optim_args, None),  # SGD has nothing else than momentum and weight decay
            ("weight_decay", args.weight_decay, 0.0),
            ("max_grad_norm", args.max_grad_norm, 0.0),
        ):
            if value != needed:
                raise ValueError(
                    "SCAFFOLD reads the mean gradient off a client's update, which only plain SGD without clipping "
                    f"allows, but `{name}` is {_plain(value)!r}. Set `{name}={_plain(needed)!r}`, or use 'fedavg' "
                    "with a server optimiser."
                )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        check_plain_sgd(optimizer)

    def begin(
        self, start: AdapterState, client_state: AdapterState | None, received: AdapterState | None = None
    ) -> None:
        super().begin(start, client_state, received)
        self._sum_of_lrs = 0.0

    def add_gradients(self, parameters: dict[str, nn.Parameter], lr: float) -> None:
        super().add_gradients(parameters, lr)
        self._sum_of_lrs += lr

    def _constants_of(self, key: str) -> tuple[torch.Tensor, ...]:
        return (self._correction(key),)

    def _gradient(self, value: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        return constants[0]

    def _correction(self, key: str) -> torch.Tensor:
        """`c - c_k`"""
        own = self._remembered(key)
        return self._received[key] - own if key in self._received else -own

    def finish(self, delta: AdapterState) -> AdapterState:
        if not self._sum_of_lrs > 0:
            raise ClientError(
                "SCAFFOLD divides a client's update by the sum of the learning rates of its steps, but that is "
                f"{self._sum_of_lrs!r}. Choose `warmup_steps` below the number of local steps."
            )
        trained = {key: -self._correction(key) - delta[key].float() / self._sum_of_lrs for key in self._constants}
        return self._client_state | trained

    def to_server(self) -> AdapterState:
        return {"sum_of_lrs": torch.tensor(self._sum_of_lrs, dtype=torch.float32)}


class ScaffoldServer(ServerHalf):
    """
    The server's half of SCAFFOLD: the control `c`, the mean of those of all clients.

    Args:
        num_clients (`int`):
            Number of all clients.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self._control: AdapterState = {}
        self._changes: AdapterState = {}  # of the round

    def to_client(self, client: str) -> AdapterState:
        return self._control

    def fault_of(self, sent: AdapterState, delta: AdapterState) -> str | None:
        total = float(sent["sum_of_lrs"])
        if not total > 0:
            return (
                f"the sum of its learning rates is {total}, but SCAFFOLD divides by it. Send that of the local steps."
            )
        limit = relative_limit(self._control, STATISTICS_ROOM)
        if largest_value(delta) / total > limit:
            return (
                f"its mean gradient, the update over {total:.3g}, has values beyond {limit:.3g}, of which the "
                "control of the server would not recover. Lower `learning_rate`."
            )
        return None

    def begin_round(self) -> None:
        self._changes = {}

    def accept(self, client: str, sent: AdapterState, delta: AdapterState) -> None:
        total = float(sent["sum_of_lrs"])
        for key, tensor in delta.items():
            change = tensor.float() / -total
            if key in self._control:
                change -= self._control[key]
            self._changes[key] = self._changes[key] + change if key in self._changes else change

    def end_round(self) -> None:
        for key, change in self._changes.items():
            share = change / self.num_clients
            self._control[key] = self._control[key] + share if key in self._control else share
        self._changes = {}

    def state_dict(self) -> AdapterState:
        return {f"control.{key}": tensor.clone() for key, tensor in self._control.items()}

    def load_state_dict(self, state: AdapterState) -> None:
        control = {}
        for entry, tensor in state.items():
            name, _, key = entry.partition(".")
            if name != "control":
                raise ValueError(other_objective(entry, self))
            control[key] = tensor.to(torch.float32, copy=True)
        self._control, self._changes = control, {}


def check_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse local optimisers for which the control variates of SCAFFOLD are not gradients.

    Raises:
        ValueError: For anything but SGD with one learning rate, without momentum and weight decay.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(
            "SCAFFOLD reads the mean gradient off a client's update, which only plain SGD allows: "
            f"{type(optimizer).__name__} scales its steps. Set `optim='sgd'`, or use 'fedavg' with a server optimiser."
        )
    for group in optimizer.param_groups:
        used = [name for name in ("momentum", "weight_decay") if group[name] != 0]
        if used:
            raise ValueError(
                f"SCAFFOLD reads the mean gradient off a client's update, but `{used[0]}={group[used[0]]}` adds to "
                "it. Set it to 0."
            )
    lrs = {group["lr"] for group in optimizer.param_groups}
    if len(lrs) > 1:
        raise ValueError(
            "SCAFFOLD divides a client's update by its learning rate, but the optimiser has several: "
            f"{sorted(lrs)}. Give all parameters one."
        )


def _plain(value: object) -> object:
    return value.value if isinstance(value, OptimizerNames) else value
