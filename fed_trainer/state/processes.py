# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the first of several processes does alone, while the others wait for it as long as it takes.

They wait in a process group of their own, over gloo: the group of a launch gives up after some minutes (10 for
NCCL, 30 for gloo), which a long aggregation or an upload may exceed.
"""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .adapter_state import AdapterState


__all__ = ["first_alone", "from_first", "is_first", "rest_at_exit", "told_by_first", "wait_for_first"]

T = TypeVar("T")

PATIENCE = timedelta(days=365)
SECONDS_OF_REST = 1.0


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not _are_several() or dist.get_rank() == 0


def wait_for_first() -> None:
    """Until all processes are here; nothing if there is one."""
    if _are_several():
        dist.barrier(group=_patient_group())


def from_first(compute: Callable[[], tuple[AdapterState, ...]]) -> tuple[AdapterState, ...]:
    """
    What `compute` returns in the first process, in all of them. All have to call it; only the first calls `compute`.

    Args:
        compute (`Callable`):
            Returns dictionaries of tensors on the CPU, of any dtype.

    Raises:
        RuntimeError: In the other processes, if `compute` has failed in the first, where the error itself is raised.
    """
    if not _are_several():
        return compute()
    parts: tuple[AdapterState, ...] = ()

    def layout() -> list[dict[str, Any]]:
        nonlocal parts
        parts = tuple({key: tensor.contiguous() for key, tensor in part.items()} for part in compute())
        return [{key: (tensor.shape, tensor.dtype) for key, tensor in part.items()} for part in parts]

    told = told_by_first(layout)
    if not is_first():
        parts = tuple({key: torch.empty(size, dtype=dtype) for key, (size, dtype) in part.items()} for part in told)
    for tensor in (tensor for part in parts for tensor in part.values()):
        if tensor.numel() > 0:
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=_patient_group())  # gloo lacks some dtypes
    return parts


def told_by_first(compute: Callable[[], T]) -> T:
    """
    What `compute` returns in the first process, in all of them. All have to call it; only the first calls `compute`.

    Args:
        compute (`Callable`):
            Returns what can be pickled.

    Raises:
        RuntimeError: In the other processes, if `compute` has failed in the first, where the error itself is raised.
    """
    if not _are_several():
        return compute()
    told: list[Any] = [None, None]
    error: BaseException | None = None
    if is_first():
        try:
            told[0] = compute()
        except BaseException as raised:  # an interrupt too: the others would wait for good
            error = raised
            told[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0, group=_patient_group())
    if error is not None:
        raise error
    result, failure = told
    if failure is not None:
        raise RuntimeError(f"The first process failed in what it does alone: {failure}")
    return result


def first_alone(act: Callable[[], None]) -> None:
    """
    Let the first process `act`; the others wait, and raise a `RuntimeError` if it fails there. All have to call it.
    """
    told_by_first(act)


def rest_at_exit() -> None:
    """
    Make this process, if it is one of several, rest before its interpreter ends.

    A thread of gloo lets go of the tensors of a collective a little after the collective is done, for which it
    needs the interpreter. If that is ending, Python stops the thread and thereby aborts the process, although all
    was done ([pytorch/pytorch#190489](https://github.com/pytorch/pytorch/issues/190489)). Closing the process group
    ends these threads only if nothing refers to the group any more, as the model does under DDP and DeepSpeed.
    """
    if _are_several():
        atexit.unregister(_rest)  # once, however many trainers there are
        atexit.register(_rest)


def _rest() -> None:
    time.sleep(SECONDS_OF_REST)  # other threads have the interpreter meanwhile


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _patient_group() -> dist.ProcessGroup:
    return _gloo_beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _gloo_beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Made once per launch; all processes have to come here together the first time."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
