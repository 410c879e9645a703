# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The small dictionary of tensors that travels: read from a live model, written to it, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from peft_scl.foreign_files import check_shapes


__all__ = [
    "AdapterState",
    "check_same_layout",
    "first_lacking",
    "foreign_kind",
    "state_bytes",
    "state_digest",
    "subtract",
]


AdapterState = dict[str, torch.Tensor]  # on CPU, contiguous, keyed as PEFT saves it


def first_lacking(layout: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> str | None:
    """In words, the first tensor of `layout` that is not in `saved` with its shape."""
    for key, shape in layout.items():
        if key not in saved:
            return f"{sum(name not in saved for name in layout)} tensors are missing (the first: {key})"
        if saved[key] != shape:
            return f"{key} has the shape {saved[key]} instead of {shape}"
    return None


def subtract(local: AdapterState, start: AdapterState) -> AdapterState:
    """`local - start` per tensor, in the dtype of `start`."""
    return {key: local[key] - tensor for key, tensor in start.items()}


def state_bytes(state: AdapterState) -> int:
    """Bytes of the tensors, without any framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def check_same_layout(state: AdapterState, reference: AdapterState, source: str) -> None:
    """
    Raise unless `state` has the keys and shapes of `reference`, and plain tensors of values that are finite in its
    dtypes.

    Args:
        state (`dict[str, torch.Tensor]`):
            What came in.
        reference (`dict[str, torch.Tensor]`):
            What is expected.
        source (`str`):
            Where `state` came from, the subject of the error message (`"The update of client 'a'"`).

    Raises:
        ValueError: Naming `source`, the first offending tensor and what is wrong with it.
    """
    check_plain(state, source)
    found, expected = ({key: tuple(tensor.shape) for key, tensor in part.items()} for part in (state, reference))
    check_shapes(found, expected, source)
    for key, tensor in state.items():
        dtype = reference[key].dtype
        if not (is_trainable_kind(tensor.dtype) and dtype.is_floating_point) and tensor.dtype != dtype:
            raise ValueError(
                f"{source} does not fit: {key} is {tensor.dtype}, which cannot stand for the {dtype} of the model. "
                "It was not written by a training run."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source} has values that are not finite in {key}. Lower `learning_rate`, or set `max_grad_norm`."
            )
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(
                f"{source} has values in {key} that {dtype}, in which the model holds it, cannot represent. Load "
                "the model in a wider dtype."
            )


def check_plain(state: AdapterState, source: str) -> None:
    """
    Raises:
        ValueError: If something in `state` is no plain tensor in memory.
    """
    for key, value in state.items():
        if (kind := foreign_kind(value)) is not None:
            raise ValueError(f"{source} does not fit: {key} is {kind}, but it should be a plain tensor in memory.")


def is_trainable_kind(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can be what training gave: not float8, whose values are nothing without a scale."""
    return dtype.is_floating_point and dtype.itemsize > 1


def foreign_kind(tensor: object) -> str | None:
    """What something is, if it is no tensor whose values can be read as they are."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):  # a subclass may answer what it likes
        return f"of type {type(tensor).__name__}"
    assert isinstance(tensor, torch.Tensor)
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"of the layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type!r}"
    if tensor.is_quantized or tensor.is_complex():
        return f"of the dtype {tensor.dtype}"
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + reach) * tensor.itemsize:
        return "without the memory that it claims"
    return None


def state_digest(state: AdapterState) -> str:
    """
    SHA-256 of names, dtypes, shapes and all values: whether two machines hold the same frozen tensors, such as the
    `A` of FFA-LoRA.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
