# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What FSDP2 (`fully_shard`) makes of the parameters.

It replaces every parameter of the model by a `DTensor`, of which each process holds a part; the optimiser trains the
parts. For a forward pass the parts are gathered into whole copies, and the last pass without a backward pass, as in an
evaluation, may leave such copies behind: a state that is written only into the parts would not be seen by the next
forward pass.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ...state.refusals import Refusal
from .base import Engine
from .facts import DDP, Launch, LiveTensors, Setup


__all__ = ["FSDP2"]


def _is_fsdp1(launch: Launch) -> bool:
    plugin = launch.args.fsdp_plugin_args or {}  # of `fsdp_config`; the launcher sets the environment
    return int(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) == 1


_LAUNCHES: tuple[Refusal[Launch], ...] = (
    Refusal(
        _is_fsdp1,
        "FSDP1 is not supported: it joins the parameters of a layer into one, in which an adapter is not found. Set "
        "`fsdp_version: 2`: `accelerate launch --config_file recipes/accelerate/fsdp2.yaml <script>`.",
    ),
    Refusal(
        lambda launch: launch.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU),
        lambda launch: (
            "FSDP was asked for, but Accelerate enables it for several processes on GPUs only and here runs "
            f"{launch.distributed_type.value}: nothing would be split. Without GPUs, launch DDP with `accelerate "
            "launch --config_file recipes/accelerate/ddp.yaml <script> --use_cpu true`, or split the model with "
            "`DS_ACCELERATOR=cpu accelerate launch --config_file recipes/accelerate/zero3.yaml <script> "
            "--ddp_backend gloo`."
        ),
        ValueError,
    ),
    Refusal(
        lambda launch: launch.is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"),  # set for `fsdp_config` too
        "`fsdp_cpu_ram_efficient_loading: true` leaves the base model of all processes but the first empty, and each "
        "computes the start of the adapter and a digest from it. Set it to `false`.",
    ),
)


def _trains_the_head(setup: Setup) -> bool:
    model: Any = setup.model
    head = model.get_output_embeddings()
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())


_REFUSALS: tuple[Refusal[Setup], ...] = (
    Refusal(
        lambda setup: setup.plugin.activation_checkpointing,
        "`fsdp_activation_checkpointing: true` puts modules into the model under whose names PEFT does not find the "
        "adapter: it would save an empty one. Set it to `false`; `gradient_checkpointing=True` of the configuration "
        "saves the same memory.",
    ),
    Refusal(
        lambda setup: setup.args.torch_compile,
        "`torch_compile=True` puts another model in the place of the one that is saved under FSDP2. Leave it out.",
    ),
    Refusal(
        lambda setup: not isinstance(setup.model, PeftModel),
        f"FSDP2 splits the whole model, and its parts would have to be gathered for every client. {DDP}.",
    ),
    Refusal(
        lambda setup: setup.trains_a_prompt,
        f"PEFT computes a prompt when it saves it, which it cannot from the parts that FSDP2 leaves it. {DDP}.",
    ),
    Refusal(
        _trains_the_head,
        "The output layer is trained, but TRL takes its weight past FSDP2 to compute the loss, so that every "
        f"process would train its part on its own rows only. Leave it out of `modules_to_save`. Or: {DDP}.",
    ),
    Refusal(
        lambda setup: setup.live.buffers,
        lambda setup: (
            f"{min(setup.live.buffers)} is a running statistic, of which FSDP2 leaves each process its own, so they "
            f"would go apart. {DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.adds_to_base,
        lambda setup: (
            f"`aggregation={setup.args.aggregation!r}` adds to base weights, which FSDP2 has split. {DDP}, or use "
            "'fedavg'."
        ),
    ),
    Refusal(
        lambda setup: setup.has_stages,
        lambda setup: (
            f"`aggregation={setup.args.aggregation!r}` trains base weights in its first stage, which FSDP2 has split. "
            f"{DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.args.local_objective is not None,
        lambda setup: (
            f"`local_objective={setup.args.local_objective!r}` adds to gradients, of which FSDP2 leaves each process "
            f"a part. {DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.args.keep_optimizer_state,
        "`keep_optimizer_state=True` keeps what the optimiser remembers, of which FSDP2 leaves each process a part. "
        f"{DDP}.",
    ),
)


class FSDP2(Engine):
    """Parameters are replaced by parts of them, which are gathered to be read."""

    holds_weights = True
    replaces_parameters = True
    has_fixed_parameters = True
    can_break_off_forward = False  # it gathers the parts
    launch_refusals: ClassVar[tuple[Refusal[Launch], ...]] = _LAUNCHES
    refusals: ClassVar[tuple[Refusal[Setup], ...]] = _REFUSALS

    def __init__(self, state: Any = None) -> None:
        super().__init__(state)
        self._gathering: list[FSDPModule] = []  # the modules that gather their parameters, each its own

    @classmethod
    def is_asked_for(cls, launch: Launch) -> bool:
        return launch.is_set("ACCELERATE_USE_FSDP") or bool(launch.args.fsdp)

    @property
    def plugin(self) -> Any:
        return self._state.fsdp_plugin

    @property
    def makes_masters(self) -> bool:
        return self._state.mixed_precision != "no"

    @contextmanager
    def building(self, live: LiveTensors, model: nn.Module) -> Iterator[None]:
        names = {id(tensor): name for name, tensor in _named_tensors(model).items()}
        name_of = {key: names[id(tensor)] for key, tensor in live.tensors.items()}
        yield
        tensors = _named_tensors(model)
        live.take_over({key: tensors[name] for key, name in name_of.items()})
        self._gathering = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def read(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor in super().read(tensors):
            if isinstance(tensor, DTensor):
                parts: Any = tensor.to(tensor.device_mesh.device_type)  # they may be offloaded to the CPU
                yield parts.full_tensor()
            else:
                yield tensor

    def write(self, values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for module in self._gathering:
            module.reshard()  # the next forward pass gathers the parameters anew
        super().write(_own_part(tensor, value) for tensor, value in values)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of `model`, by names that FSDP2 does not change."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _own_part(tensor: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What this process holds of `tensor`, and of the `value` that it is to have."""
    if not isinstance(tensor, DTensor):
        return tensor, value
    part = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.to_local(), part.to_local()
