# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What DeepSpeed (ZeRO-1, 2, 3) holds of the trained parameters beside the model.

The parameters of the model are copies for the forward pass. The optimiser trains float32 masters, which are split over the
processes, and overwrites the copies at the end of a step. So a state is written into both: with the copies alone the first step of a
client would start from the masters of the client before it, with the masters alone its first loss would be that client's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


__all__ = ["DeepSpeedOptimizer", "read_master", "write_master"]


class DeepSpeedOptimizer:
    """
    The optimiser of a DeepSpeed engine that is kept from client to client.

    Args:
        engine (`deepspeed.DeepSpeedEngine`):
            An engine of ZeRO stage 1, 2 or 3.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._optimizer = engine.optimizer.optimizer
        self.can_discard_gradients = engine.zero_optimization_stage() < 3 and not self._zero.cpu_offload
        """Whether a forward pass can be broken off: ZeRO-3 gathers weights in it, and offloading keeps gradients elsewhere."""

    def reset(self) -> None:
        """Forget the moments: the next step makes them anew, as the first one did. They are not saved anywhere."""
        self._optimizer.state.clear()

    def discard_gradients(self) -> None:
        """Forget what was accumulated for a step that was broken off, as DeepSpeed does for one that has overflowed."""
        if not self.can_discard_gradients:
            return  # it is only left between steps
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        self._zero.all_grad_tensors.clear()


def read_master(tensor: torch.Tensor) -> torch.Tensor | None:
    """
    The float32 master of a parameter, whole, or `None` if there is nothing more in it than in the parameter; all processes have
    to call it.
    """
    # A float32 copy equals its master after every step and every write, and the master takes a message per parameter.
    if not _has_master(tensor) or tensor.dtype == torch.float32:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(tensor)


def write_master(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, whole, into the master of a parameter; nothing if it has none."""
    if not _has_master(tensor):
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(tensor, "_z3_optimizer"):
        safe_set_local_fp32_param(tensor, _own_part(tensor, value))
    else:
        safe_set_full_fp32_param(tensor, value)


def _own_part(tensor: Any, value: torch.Tensor) -> torch.Tensor:
    """
    What ZeRO-3 has this process hold of `value`: parts of the same size, the last ones filled up with zeros.

    `safe_set_full_fp32_param` does not fill up, and fails if the number of elements is no multiple of that of the processes.
    """
    size = tensor.ds_tensor.numel()
    start = size * torch.distributed.get_rank(tensor.ds_process_group)
    part = value.flatten()[start : start + size]
    return nn.functional.pad(part, (0, size - len(part)))


def _has_master(tensor: torch.Tensor) -> bool:
    # set by ZeRO-1 and 2, and by ZeRO-3, once the engine has been built; ZeRO-3 also marks what is not trained
    return tensor.requires_grad and (hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer"))
