# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether and where the weight of a module can be read outside of its forward."""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers.pytorch_utils import Conv1D

from .started import StartedLinear


__all__ = ["is_at_hand", "offload_hook"]


def is_at_hand(module: nn.Module) -> bool:
    """
    Whether the weight of a module can be read outside of its forward: it is not sharded, partitioned, offloaded or
    quantised. FSDP puts another module around it, or another class in its place, and frees the storage.
    """
    weight: Any = module.weight
    return (
        type(module) in (nn.Linear, Conv1D, StartedLinear)
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.numel() > 0
        and not weight.is_meta
        and weight.untyped_storage().size() > 0
    )


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that brings the weight of `module` to its device for each forward, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None
