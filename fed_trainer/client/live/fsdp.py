# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What FSDP2 (`fully_shard`) makes of the parameters.

It replaces every parameter of the model by a `DTensor`, of which each process holds a part; the optimiser trains the parts. For a
forward pass the parts are gathered into whole copies, and the last pass without a backward pass, as in an evaluation, may leave
such copies behind: a state that is written only into the parts would not be seen by the next forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


__all__ = ["discard_whole_copies", "named_tensors", "sharded_modules", "whole", "write_whole"]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of `model`, by names that FSDP2 does not change."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that gather their parameters, each its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def discard_whole_copies(modules: Iterable[FSDPModule]) -> None:
    """Let the next forward pass of `modules` gather the parameters anew."""
    for module in modules:
        module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, gathered from all processes if they hold parts of it; then all have to call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    parts: Any = tensor.to(tensor.device_mesh.device_type)  # they may be offloaded to the CPU
    return parts.full_tensor()


def write_whole(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, which every process has whole, into `tensor` or into the part of it that this process holds."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.copy_(value)
