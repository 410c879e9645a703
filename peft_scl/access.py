# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a module can be bypassed, and where its weight is."""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers.pytorch_utils import Conv1D

from .started import StartedLinear


__all__ = ["has_hooks", "is_at_hand", "offload_hook"]


def is_at_hand(module: nn.Module) -> bool:
    """
    Whether the weight of a module can be read outside of its forward: it is not sharded, partitioned, offloaded or
    quantised, and nobody watches the forward. FSDP puts another module around it, or another class in its place, and
    frees the storage.
    """
    weight: Any = module.weight
    return (
        type(module) in (nn.Linear, Conv1D, StartedLinear)
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.numel() > 0
        and not weight.is_meta
        and weight.untyped_storage().size() > 0
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """
    Whether something happens when `module` is called, beside its forward; pruning, for one, makes the weight there.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that brings the weight of `module` to its device for each forward, if there is one."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None
