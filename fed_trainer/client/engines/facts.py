# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What refusals of engines are decided by: how the run was launched, and what is to be trained with the engine."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments
from transformers.utils import strtobool

from ...config import FederationArguments
from ...state.adapter_state import AdapterState
from ...state.refusals import Refusal


__all__ = ["DDP", "Launch", "LiveTensors", "Setup", "alone_of_several"]

DDP = "Launch DDP with `--config_file recipes/accelerate/ddp.yaml`"


class LiveTensors(Protocol):
    """What an engine is told of [`LiveState`]."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def buffers(self) -> Collection[str]: ...

    def take_over(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def read(self) -> AdapterState: ...

    def write(self, state: AdapterState) -> None: ...


@dataclass(frozen=True)
class Launch:
    """
    How a run was launched.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments, which know what Accelerate has made of the launch.
    """

    args: TrainingArguments

    def is_set(self, variable: str) -> bool:
        """Whether the launcher has set a variable of the environment to true."""
        return bool(strtobool(os.environ.get(variable, "false")))

    @property
    def distributed_type(self) -> DistributedType:
        """What Accelerate runs."""
        state: Any = self.args.distributed_state
        return state.distributed_type

    @property
    def is_one_process(self) -> bool:
        """Whether Accelerate sees this process alone."""
        state: Any = self.args.distributed_state
        return state.num_processes == 1

    @property
    def num_started(self) -> int:
        """The processes that the launcher says it has started."""
        return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Setup:
    """
    What is to be trained, before the engine is built.

    Args:
        args ([`FederationArguments`]):
            The settings.
        plugin (`Any`):
            The settings of the engine, as Accelerate keeps them.
        model (`nn.Module`):
            The model.
        live ([`LiveState`]):
            Its tensors.
        adds_to_base (`bool`):
            Whether the rule adds to base weights.
        has_stages (`bool`):
            Whether the rule trains other parameters later on.
        has_optimizer (`bool`):
            Whether the user has given an optimiser.
    """

    args: FederationArguments
    plugin: Any
    model: nn.Module
    live: LiveTensors
    adds_to_base: bool
    has_stages: bool
    has_optimizer: bool

    @property
    def trains_a_prompt(self) -> bool:
        """Of a [`~peft.PeftModel`]: whether its adapter is a prompt, which PEFT computes when it saves it."""
        model: Any = self.model
        return model.active_peft_config.is_prompt_learning


def alone_of_several(way: str) -> Refusal[Launch]:
    """Of several processes each sees itself alone; `way` is what to add to the arguments where there are no GPUs."""
    return Refusal(
        lambda launch: launch.num_started > 1 and launch.is_one_process,
        lambda launch: (
            f"The launcher started {launch.num_started} processes, but Accelerate sees one: each would train alone "
            f"and write over the others. Without GPUs, add `{way}` to the arguments of the script."
        ),
        ValueError,
    )
