# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
How large the values of an update may be, so that what is computed from it is finite and the other updates still count.

A float32 has 24 bits. Beside a value that is `2^12` times as large, another keeps 12 of them; beside one that is
`2^24` times as large, none. Limits are therefore relative to what is there: the largest value of the state, and at
least 1, as `B` starts at zero.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ...state.adapter_state import AdapterState


__all__ = [
    "LARGEST_FACTOR",
    "LARGEST_VALUE",
    "MOST_STEPS",
    "ROOM",
    "STATISTICS_ROOM",
    "largest_product",
    "largest_value",
    "relative_limit",
    "value_limits",
]

LARGEST_VALUE = 1e15  # the product of two such values, weighted by a million examples, still is a float32
# so is the product of three: of two factors, and of one with the norm of such a product as its weight
LARGEST_FACTOR = 1e8
ROOM = 2.0**12
STATISTICS_ROOM = 2.0**24  # what follows the data, not the state: running statistics, products, mean gradients
DTYPE_ROOM = 16  # a model computes sums of its weights
MOST_STEPS = 2**20  # of one local round


def largest_value(state: AdapterState) -> float:
    """The largest magnitude among the floating-point values of finite tensors; 0 if there are none."""
    extremes = [torch.stack(t.detach().aminmax()).abs().max() for t in state.values() if is_measured(t)]
    return max((float(extreme) for extreme in extremes), default=0.0)


def relative_limit(state: AdapterState, room: float = ROOM) -> float:
    """`room` times the largest value of `state`, or times 1, as far as every dtype in it has room for."""
    limit = room * max(1.0, largest_value(state))
    return min([limit, *(dtype_limit(tensor.dtype) for tensor in state.values() if tensor.is_floating_point())])


def value_limits(state: AdapterState, limit: float, statistics: Collection[str]) -> dict[str, float]:
    """
    By tensor of `state` the largest magnitude that its delta may have.

    Args:
        state (`dict[str, torch.Tensor]`):
            What the clients were sent.
        limit (`float`):
            [`Aggregator.largest_value`] of the rule.
        statistics (`Collection[str]`):
            Running statistics and counts, which follow the data: beside their own values.
    """
    return {
        key: min(LARGEST_VALUE, STATISTICS_ROOM * max(1.0, float(tensor.double().abs().max())))
        if key in statistics and tensor.numel() > 0
        else limit
        for key, tensor in state.items()
    }


def largest_product(scaling: float, A: torch.Tensor, B: torch.Tensor) -> float:
    """A bound on the values of `scaling B A`: the longest row of `B` times the longest column of `A`."""
    return float(abs(scaling) * B.double().norm(dim=1).max() * A.double().norm(dim=0).max())


def product_limit(dtypes: Sequence[torch.dtype], present: float) -> float:
    """
    What a product of factors may reach beside weights of these dtypes, and beside the largest product that there is.
    """
    return min([STATISTICS_ROOM * max(1.0, present), *(dtype_limit(dtype) for dtype in dtypes)])


def dtype_limit(dtype: torch.dtype) -> float:
    """What a dtype can hold, with room for the sums that a model takes."""
    return torch.finfo(dtype).max / DTYPE_ROOM if dtype.is_floating_point else float("inf")


def is_measured(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0
