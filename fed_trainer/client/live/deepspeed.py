# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What DeepSpeed (ZeRO-1, 2, 3) holds of the trained parameters beside the model.

The parameters of the model are copies for the forward pass. The optimiser trains float32 masters, which are split over the
processes, and overwrites the copies at the end of a step. So a state is written into both: with the copies alone the first step of a
client would start from the masters of the client before it, with the masters alone its first loss would be that client's.

ZeRO-3 splits the copies too. What is split is gathered in few messages, and written without any, as every process has the whole state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


__all__ = ["DeepSpeedOptimizer", "gather", "is_split", "write_master", "write_split"]

ELEMENTS_PER_MESSAGE = 2**26  # 256 MiB of float32, whole on every GPU


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


def gather(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """
    Whole copies, on the CPU and by `id`, of the masters that have more in them than the parameters, and of those parameters that
    ZeRO-3 has split; all processes have to call it.
    """
    # in few messages: `deepspeed.utils` and `deepspeed.zero.GatheredParameters` send one or two per parameter
    parameters = list(tensors)
    split = [tensor for tensor in parameters if is_split(tensor)]
    fine = [tensor for tensor in parameters if not is_split(tensor) and _has_finer_master(tensor)]
    return _gather_split(split) | _gather_masters(fine)


def _gather_split(tensors: list[Any]) -> dict[int, torch.Tensor]:
    gathered = {}
    parts_of = {id(tensor): _part(tensor) for tensor in tensors}
    for batch in _messages(tensors, lambda tensor: (tensor.ds_process_group, parts_of[id(tensor)].dtype)):
        parts = torch.cat([parts_of[id(tensor)].to(tensor.device) for tensor in batch])
        group = batch[0].ds_process_group
        flat = parts.new_empty(torch.distributed.get_world_size(group) * len(parts))
        torch.distributed.all_gather_single(flat, parts, group=group)
        sizes = [tensor.ds_tensor.numel() for tensor in batch]
        for tensor, columns in zip(batch, flat.view(-1, len(parts)).split(sizes, dim=1), strict=True):
            gathered[id(tensor)] = columns.flatten()[: tensor.ds_numel].view(tensor.ds_shape).cpu()
    return gathered


def _gather_masters(tensors: list[Any]) -> dict[int, torch.Tensor]:
    """Of ZeRO-1 and 2, which split the joined masters anywhere: each process adds what it has of every one to zeros."""
    gathered: dict[int, torch.Tensor] = {}
    for batch in _messages(tensors, lambda tensor: tensor._dp_group):
        sizes = [tensor.numel() for tensor in batch]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=batch[0].device)
        for tensor, master in zip(batch, flat.split(sizes), strict=True):
            if tensor._hp_mapping is not None:  # of which this process has a part
                place = tensor._hp_mapping.lp_fragment_address
                master[place.start : place.start + place.numel] = tensor._hp_mapping.get_hp_fragment()
        torch.distributed.all_reduce(flat, group=batch[0]._dp_group)
        flat = flat.cpu()
        gathered |= {
            id(tensor): master.view_as(tensor) for tensor, master in zip(batch, flat.split(sizes), strict=True)
        }
    return gathered


def _messages(tensors: Iterable[Any], kind: Callable[[Any], Any]) -> list[list[Any]]:
    """`tensors` in groups of the same kind, of `ELEMENTS_PER_MESSAGE` or a little more."""
    messages: dict[Any, list[Any]] = {}
    totals: Counter[Any] = Counter()
    for tensor in tensors:
        of_kind = kind(tensor)
        messages.setdefault((of_kind, totals[of_kind] // ELEMENTS_PER_MESSAGE), []).append(tensor)
        totals[of_kind] += math.prod(tensor.ds_shape if is_split(tensor) else tensor.shape)
    return list(messages.values())


def write_split(tensor: Any, value: torch.Tensor) -> None:
    """Copy `value`, which every process has whole, into the part of a parameter that ZeRO-3 lets this process hold."""
    tensor.ds_tensor.copy_(_own_part(tensor, value))
    tensor.ds_secondary_tensor = None  # of hpZ, which would gather it instead; made anew, as after a step
    if tensor.numel() == tensor.ds_numel:  # it keeps whole copies of small ones
        tensor.copy_(value)


def is_split(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter that ZeRO-3 has split."""
    return hasattr(tensor, "ds_tensor")


def write_master(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, whole, into the master of a parameter; nothing if it has none."""
    if not _has_master(tensor):
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_split(tensor):
        safe_set_local_fp32_param(tensor, _own_part(tensor, value))
    else:
        safe_set_full_fp32_param(tensor, value)


def _part(tensor: Any) -> torch.Tensor:
    """What this process holds of a parameter that ZeRO-3 has split, or of its master."""
    if not _has_finer_master(tensor):
        return tensor.ds_tensor
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(tensor)


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


def _has_finer_master(tensor: torch.Tensor) -> bool:
    # a float32 copy equals its master after every step and every write, and the masters take a message
    return _has_master(tensor) and tensor.dtype != torch.float32
