# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from transformers import TrainingArguments

from ...state.adapter_state import AdapterState
from ...state.checks import check_number
from ..server_optimizers import ServerOptimizer


__all__ = ["LocalObjective", "ServerHalf"]


class ServerHalf:
    """
    What the server does for a local objective: it sends something along, and remembers of the updates that count.

    This class does nothing, as most objectives are the clients' alone. The tensors are in float32 on the CPU.

    Attributes:
        remembers_clients (`bool`):
            Whether it remembers something of single clients, which checkpoints of earlier versions do not hold.
    """

    remembers_clients: bool = False

    def to_client(self, client: str) -> AdapterState:
        """What a client is sent beside the shared tensors, keyed like these."""
        return {}

    def rank_of(self, client: str) -> int | None:
        """The rank that the client has from now on, if the objective changes ranks."""
        return None

    def fault_of(self, sent: AdapterState, delta: AdapterState) -> str | None:
        """
        Why the server cannot go on with what a client sent, if it cannot.

        Args:
            sent (`dict[str, torch.Tensor]`):
                Finite numbers under the names and of the dtypes of [`LocalObjective`]'s `sends`.
            delta (`dict[str, torch.Tensor]`):
                The client's update, of what it trains.
        """
        return None

    def begin_round(self) -> None:
        """Before the first client of a round: nothing is left of a round that was broken off."""

    def accept(self, client: str, sent: AdapterState, delta: AdapterState) -> None:
        """
        The client's update counts: enter it into what holds from `end_round` on.

        Args:
            client (`str`):
                Its name.
            sent (`dict[str, torch.Tensor]`):
                What `to_server` gave.
            delta (`dict[str, torch.Tensor]`):
                The client's update, of what it trains.
        """

    def end_round(self) -> None:
        """After the last client of a round."""

    def state_dict(self) -> AdapterState:
        """What the server remembers between rounds, as flat names for safetensors; copies."""
        return {}

    def load_state_dict(self, state: AdapterState) -> None:
        """
        Take over a `state_dict`.

        Raises:
            ValueError: If it is that of another objective.
        """
        if state:
            raise ValueError(other_objective(next(iter(state)), self))


class LocalObjective:
    """
    A term of the clients' gradients, with what a client remembers of it between rounds; the server's half is
    another object (`server_half`), and the two meet in what is sent.

    It acts on the parameters that train in the round and are shared. What is remembered is in float32 on the CPU,
    keyed like the adapter; the parameters may be on any device and of any floating dtype.

    Attributes:
        keeps_client_state (`bool`):
            Whether `finish` returns tensors that have to be kept with the client.
        uniform (`bool`):
            Whether the method weights its clients alike, whatever their numbers of examples.
        sends (`dict[str, torch.dtype]`):
            Numbers that a client sends beside its update, see `to_server`.
        is_personal (`bool`):
            Whether it belongs to a second local round of each client, which trains a model of the client's own and
            sends nothing.
        changes_ranks (`bool`):
            Whether clients come to have ranks of their own.
        follows_factors (`bool`):
            Whether it goes on with the adapter of the client from the round before.
        needs_all_tensors (`bool`):
            Whether it is defined over all tensors of every client.
        needs_exact_updates (`bool`):
            Whether the two halves draw conclusions from the same update, so that it must not be rounded on the way.
    """

    keeps_client_state: bool = False
    uniform: bool = False
    sends: Mapping[str, torch.dtype] = MappingProxyType({})
    is_personal: bool = False
    changes_ranks: bool = False
    follows_factors: bool = False
    needs_all_tensors: bool = False
    needs_exact_updates: bool = False

    def __init__(self) -> None:
        self._start: AdapterState = {}
        self._client_state: AdapterState = {}
        self._received: AdapterState = {}
        self._constants: dict[str, tuple[torch.Tensor, ...]] = {}  # of the round, next to the parameters

    def check(self, args: TrainingArguments) -> None:
        """
        Refuse settings under which the method is not what its name says; before the run.

        Raises:
            ValueError: Naming the setting and what to set instead.
        """
        if args.mixed_precision == "fp16":
            raise ValueError(
                f"{type(self).__name__} adds to the gradients of a client, but `fp16` trains with gradients that "
                "are scaled by a factor of their own. Set `bf16=True`, or neither."
            )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """As `check`, for the optimiser of the local rounds, once it exists."""

    def server_half(self) -> ServerHalf:
        """The server's part of the objective."""
        return ServerHalf()

    def server_optimizer(self, num_clients: int) -> ServerOptimizer | None:
        """The server's step, if the objective has one of its own; `num_clients` is the number of all clients."""
        return None

    def first_memory(self, rank: int | None, shared: AdapterState) -> AdapterState | None:
        """
        What a client remembers before its first round.

        Args:
            rank (`int`, *optional*):
                The rank that it begins with, if it is not that of the adapter.
            shared (`dict[str, torch.Tensor]`):
                The tensors that are shared in the round: not both factors of a pair with every rule.
        """
        return None

    def begin(
        self, start: AdapterState, client_state: AdapterState | None, received: AdapterState | None = None
    ) -> None:
        """
        Begin the local round of one client.

        Args:
            start (`dict[str, torch.Tensor]`):
                The shared tensors the client was sent; not changed.
            client_state (`dict[str, torch.Tensor]`, *optional*):
                What `finish` gave in the last round of the client that was accepted; `None` if there is none.
            received (`dict[str, torch.Tensor]`, *optional*):
                What [`ServerHalf`] sent along.
        """
        self._start, self._client_state, self._received = start, client_state or {}, received or {}
        self._constants = {}

    def add_gradients(self, parameters: dict[str, nn.Parameter], lr: float) -> None:
        """
        Add to the gradients of an optimiser step: after its last backward, before gradient clipping.

        Args:
            parameters (`dict[str, torch.nn.Parameter]`):
                Those that train in this round. A parameter without a gradient gets one.
            lr (`float`):
                The learning rate of the step.
        """
        for key, parameter in parameters.items():
            if key not in self._start:
                continue
            if key not in self._constants:  # copied once per round
                self._constants[key] = tuple(
                    constant.to(parameter.device, torch.float32) for constant in self._constants_of(key)
                )
            add_gradient(parameter, self._gradient(parameter.detach(), *self._constants[key]))

    def finish(self, delta: AdapterState) -> AdapterState:
        """
        What the client has to remember after its local round. Nothing changes until `accept`.

        Args:
            delta (`dict[str, torch.Tensor]`):
                The client's update, on the shared tensors.
        """
        return {}

    def to_server(self) -> AdapterState:
        """After `finish`: what the client sends beside its update, the numbers that `sends` names."""
        return {}

    def _constants_of(self, key: str) -> tuple[torch.Tensor, ...]:
        """What stays the same during a local round, for one parameter."""
        raise NotImplementedError

    def _gradient(self, value: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """What is added to the gradient of one parameter, from its value and its constants in float32."""
        raise NotImplementedError

    def _remembered(self, key: str) -> torch.Tensor:
        """The client's tensor, zero at first."""
        if key in self._client_state:
            return self._client_state[key]
        return torch.zeros_like(self._start[key], dtype=torch.float32)


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True)  # not the constant itself, which later steps need
    else:
        parameter.grad.add_(gradient)


def check_positive(name: str, value: object) -> None:
    check_number(name, value, lambda number: number > 0, "positive and finite")


def other_objective(entry: str, objective: ServerHalf) -> str:
    return (
        f"The state has {entry!r}, which {type(objective).__name__} does not keep. Resume with the local objective "
        "the run was started with."
    )
