# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the local rounds ask of whatever runs the model, and the answers for one process and for DDP."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate.utils import reduce
from torch import nn

from ...config import FederationArguments
from ...state.adapter_state import AdapterState
from ...state.refusals import Refusal, refuse
from ..optimizer_state import read_optimizer, with_state
from .facts import Launch, LiveTensors, Setup


__all__ = ["Engine"]


class Engine:
    """
    One process, or several with DDP: each holds the whole model, and the optimiser trains its parameters themselves.

    An engine of another kind overrides what it does differently, and gets a line in the table `ENGINES`. All processes
    have to call `building`, `read` and `write` together.

    Args:
        state ([`~accelerate.state.PartialState`], *optional*):
            What Accelerate knows of the launch; one process if not given.
    """

    holds_weights: ClassVar[bool] = False
    """
    Whether what is trained is the engine's: parts, or masters of which the parameters are copies. Such a model is
    neither cast nor given other weights for an evaluation, it is saved through `LiveState.model_state_dict`, its
    optimiser is not the user's, and a checkpoint is loaded once the engine is there.
    """

    replaces_parameters: ClassVar[bool] = False
    """Whether it puts other objects in the place of the model's parameters."""

    can_break_off_forward: bool = True
    """Whether a forward pass can be left in all processes when it fails in one. Known once the engine is built."""

    launch_refusals: ClassVar[tuple[Refusal[Launch], ...]] = ()
    """What is refused of a launch that asks for it."""

    refusals: ClassVar[tuple[Refusal[Setup], ...]] = ()
    """What a federation cannot do with it."""

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self._initial_optimizer_state: dict[str, Any] | None = None

    @classmethod
    def is_asked_for(cls, launch: Launch) -> bool:
        """Whether the launcher or the arguments ask for it, whatever Accelerate has made of that."""
        return False

    @property
    def kind(self) -> str:
        """What Accelerate calls it; `"NO"` for a single process with nothing around the model."""
        return "NO" if self._state is None else self._state.distributed_type.value

    @property
    def plugin(self) -> Any:
        """The settings of the engine, as Accelerate keeps them."""
        return None

    @property
    def num_processes(self) -> int:
        """How many processes train a client together."""
        return 1 if self._state is None else self._state.num_processes

    @property
    def has_fixed_parameters(self) -> bool:
        """Whether it is told once and for all which parameters are trained."""
        return self.num_processes > 1

    @property
    def makes_masters(self) -> bool:
        """Whether it trains float32 masters, whatever the dtype of the model."""
        return False

    def over_processes(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        """The `"sum"` or `"mean"` of the `values` that the processes have; all have to ask."""
        if self.num_processes == 1:
            return values
        return reduce(values.to(self._state.device), reduction=reduction)

    def check(
        self,
        args: FederationArguments,
        model: nn.Module,
        live: LiveTensors,
        *,
        adds_to_base: bool,
        has_stages: bool,
        has_optimizer: bool,
    ) -> None:
        """
        Refuse what a federation cannot do with it, before it is built; for the arguments see [`Setup`].

        Raises:
            NotImplementedError: Naming the setting and what to use instead.
        """
        refuse(self.refusals, Setup(args, self.plugin, model, live, adds_to_base, has_stages, has_optimizer))

    # Building

    def building(self, live: LiveTensors, model: nn.Module) -> AbstractContextManager[Any]:
        """Within, `Trainer` wraps `model`, whose travelling tensors are `live`, and makes the optimiser."""
        return nullcontext()

    def built(self, wrapped: nn.Module, optimizer: Any) -> None:
        """
        Take what `Trainer` has made.

        Args:
            wrapped (`nn.Module`):
                The model as it is trained.
            optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
                Its optimiser, new.
        """
        self._initial_optimizer_state = copy.deepcopy(optimizer.state_dict())

    # The optimiser, from client to client

    def reset_optimizer(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], start: AdapterState | None
    ) -> None:
        """
        Make the optimiser what it was when it was new.

        Args:
            optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
                The optimiser.
            parameters (`Mapping[str, torch.nn.Parameter]`):
                What trains now, by key.
            start (`dict[str, torch.Tensor]`, *optional*):
                What `read_optimizer` gave, to go on with.
        """
        assert self._initial_optimizer_state is not None
        state = copy.deepcopy(self._initial_optimizer_state)
        if start is not None:
            state = with_state(state, start, optimizer.optimizer, parameters)
        optimizer.load_state_dict(state)

    def read_optimizer(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> AdapterState:
        """What the optimiser remembers of `parameters`, on the CPU."""
        assert self._initial_optimizer_state is not None
        return read_optimizer(optimizer.optimizer, parameters, self._initial_optimizer_state)

    def discard_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget what a step that was broken off has accumulated."""
        for parameter in parameters:
            parameter.grad = None

    # Tensors of the model

    def read(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each of `tensors`, whole and at its full precision; on any device, and not necessarily a copy."""
        for tensor in tensors:
            yield tensor.detach()

    def write(self, values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy into each tensor its value, which every process has whole."""
        for tensor, value in values:
            tensor.copy_(value)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """That of the whole tensor."""
        return tuple(tensor.shape)
