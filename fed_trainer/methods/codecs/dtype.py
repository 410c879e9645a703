# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping

import torch

from ...state.adapter_state import AdapterState
from ...state.client_errors import ClientError
from .base import Step


__all__ = ["WIRE_DTYPES", "DtypeStep"]

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGN = -(2**15)  # of a number of 16 bits, read as an integer


class DtypeStep(Step):
    """
    Sends tensors of wider floating dtypes in a narrower one; others, such as counts, are sent as they are.

    Stochastic rounding (Croci et al., 2022, https://royalsocietypublishing.org/doi/10.1098/rsos.211631) goes to either
    neighbour with a probability that makes the mean the value itself, so the mean over clients has no bias. To the
    nearest there is less noise, but the same error everywhere.

    Args:
        dtype (`str`):
            `"float32"`, `"bfloat16"` or `"float16"`.
        rounding (`str`, *optional*, defaults to `"stochastic"`):
            `"stochastic"` or `"nearest"`.
    """

    def __init__(self, dtype: str, rounding: str = "stochastic") -> None:
        if dtype not in WIRE_DTYPES:
            raise ValueError(f"`dtype` should be one of {list(WIRE_DTYPES)} but the value passed is {dtype!r}")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"`rounding` should be 'stochastic' or 'nearest' but the value passed is {rounding!r}")
        self.dtype, self.rounding = WIRE_DTYPES[dtype], rounding
        self.unbiased = rounding == "stochastic"

    def encode(self, state: AdapterState, seed: int) -> AdapterState:
        generator = torch.Generator().manual_seed(seed)
        encoded = {}
        for key, tensor in state.items():
            if not self._narrows(tensor.dtype):
                encoded[key] = tensor
                continue
            if tensor.numel() > 0 and tensor.abs().max() > torch.finfo(self.dtype).max:
                raise ClientError(
                    f"{key} has values beyond {torch.finfo(self.dtype).max:.3g}, which {self.dtype} cannot hold. Set "
                    "`wire_dtype='bfloat16'`, or lower `learning_rate`."
                )
            nearest = tensor.to(self.dtype)
            encoded[key] = nearest if self.rounding == "nearest" else _drawn(tensor, nearest, generator)
        return encoded

    def decode(self, state: AdapterState, like: Mapping[str, torch.Tensor]) -> AdapterState:
        return {
            key: tensor.to(like[key].dtype) if self._was_narrowed(tensor, like.get(key)) else tensor
            for key, tensor in state.items()
        }

    def _narrows(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize > self.dtype.itemsize

    def _was_narrowed(self, tensor: object, before: torch.Tensor | None) -> bool:
        is_plain = type(tensor) is torch.Tensor and tensor.dtype == self.dtype
        return is_plain and before is not None and self._narrows(before.dtype)


def _drawn(value: torch.Tensor, nearest: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Either neighbour of `value` in the dtype of `nearest`, of 16 bits, with the mean `value`."""
    exact, near = value.double(), nearest.double()
    other = _neighbour(nearest, up=near < exact)
    far = other.double()
    # of a value that is representable the distance to the other side does not matter: its share is 0
    share = torch.where(near == exact, 0.0, (exact - near) / (far - near))
    draws = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    return torch.where((draws < share) & far.isfinite(), other, nearest)


def _neighbour(tensor: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The next number above or below, of a dtype of 16 bits with a sign bit."""
    bits = tensor.view(torch.int16).int()
    ordered = torch.where(bits < 0, SIGN - bits, bits)  # in the order of the numbers, with one zero
    moved = ordered + torch.where(up, 1, -1)
    return torch.where(moved < 0, SIGN - moved, moved).to(torch.int16).view(tensor.dtype)
