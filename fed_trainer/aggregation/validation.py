# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is checked of an update before it counts, so that one bad client costs its own update and not the round."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch

from ..adapter_state import AdapterState
from .base import ClientUpdate


__all__ = [
    "InvalidUpdateError",
    "TooFewClientsError",
    "first_not_finite",
    "require_clients",
    "state_digest",
    "validated",
]


LARGEST_VALUE = 1e15  # the product of two such values, weighted by a million examples, still is a float32


class InvalidUpdateError(ValueError):
    """
    An update that cannot be used.

    Args:
        client (`str`):
            Who sent it.
        reason (`str`):
            What is wrong with it, and what to do.
    """

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(f"The update of client {client!r} is left out: {reason}")
        self.client = client
        self.reason = reason


class TooFewClientsError(RuntimeError):
    """A round in which fewer than `min_clients` updates can be used."""


def validated(
    update: ClientUpdate,
    reference: AdapterState,
    seen: Collection[str] = (),
    base_digest: str | None = None,
    partial: bool = False,
) -> ClientUpdate:
    """
    The update itself, if it can be used.

    Args:
        update ([`ClientUpdate`]):
            What came in.
        reference (`dict[str, torch.Tensor]`):
            What the client was sent: its keys, shapes and dtypes are those of the delta. For a client of a smaller rank that
            is what [`truncate_ranks`] gives.
        seen (`Collection[str]`, *optional*):
            Clients whose update has been taken in this round.
        base_digest (`str`, *optional*):
            [`base_digest`] of the server's base model; compared if the update has one too.
        partial (`bool`, *optional*, defaults to `False`):
            Whether tensors may be missing.

    Raises:
        InvalidUpdateError: For a duplicate client, another base model, a number of examples or steps or a scaling that is none, a wrong key, shape or dtype, an empty
            tensor, or a value that is not finite.
    """
    reason = _fault(update, reference, seen, base_digest, partial)
    if reason is not None:
        raise InvalidUpdateError(update.client, reason)
    return update


def require_clients(taken: Collection[str], refused: Mapping[str, str], min_clients: int) -> None:
    """
    Refuse a round with too few usable updates; a round with none never passes.

    Args:
        taken (`Collection[str]`):
            Clients whose update was taken.
        refused (`Mapping[str, str]`):
            Why the others were left out, by client.
        min_clients (`int`):
            Updates that a round needs; at least one.

    Raises:
        TooFewClientsError: With the reasons.
    """
    needed = max(1, min_clients)
    if len(taken) < needed:
        reasons = (
            "; ".join(f"{client!r}: {reason}" for client, reason in refused.items()) or "no other client answered"
        )
        raise TooFewClientsError(
            f"Only {len(taken)} of at least {needed} clients sent an update that can be used. Left out: {reasons}"
        )


def state_digest(state: AdapterState) -> str:
    """
    SHA-256 of names, dtypes, shapes and all values: whether two machines hold the same frozen tensors, such as the `A` of
    FFA-LoRA.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(state: AdapterState) -> str | None:
    """Name of a tensor with a value that is not finite, if there is one."""
    return next((key for key, tensor in state.items() if tensor.numel() > 0 and not _is_finite(tensor)), None)


def _fault(
    update: ClientUpdate,
    reference: AdapterState,
    seen: Collection[str],
    base_digest: str | None,
    partial: bool,
) -> str | None:
    if update.client in seen:
        return "it has sent one in this round already. A client counts once per round."
    if base_digest is not None and update.base_digest is not None and update.base_digest != base_digest:
        return (
            f"it was trained on another base model (digest {update.base_digest[:12]}, expected {base_digest[:12]}). Load the same "
            "checkpoint on every machine."
        )
    if not _is_count(update.num_examples):
        return f"`num_examples` is {update.num_examples!r}, but it should be a positive integer: it is the weight in the mean."
    if update.num_steps is not None and not _is_count(update.num_steps):
        return f"`num_steps` is {update.num_steps!r}, but it should be a positive integer. Send what the local round counted."
    if update.num_tokens is not None and not _is_count(update.num_tokens):
        return f"`num_tokens` is {update.num_tokens!r}, but it should be a positive integer: it may be the weight in the mean."
    for module, scaling in (update.scalings or {}).items():
        if not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
            return (
                f"the scaling of {module} is {scaling!r}, but it should be positive and finite. Send `lora_alpha / r`."
            )
    unexpected, missing = (
        sorted(update.delta.keys() - reference.keys()),
        sorted(reference.keys() - update.delta.keys()),
    )
    if unexpected:
        return f"{len(unexpected)} tensors are not shared in this round (the first: {unexpected[0]}). Send what was received."
    if missing and (not partial or len(missing) == len(reference)):
        return f"{len(missing)} tensors are missing (the first: {missing[0]}). Send everything that is shared."
    for key, tensor in update.delta.items():
        expected = reference[key]
        if tensor.numel() == 0 and expected.numel() > 0:
            return f"{key} is empty, as read from a partitioned model (ZeRO-3, FSDP). Gather the parameters before reading."
        if tensor.shape != expected.shape:
            return f"{key} has the shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}. The PEFT configs differ."
        if tensor.dtype not in (expected.dtype, torch.float32):
            return f"{key} is {tensor.dtype}, expected {expected.dtype} or torch.float32. Cast it before sending."
        if tensor.numel() > 0 and not _is_finite(tensor):
            return f"{key} has values that are not finite. Lower `learning_rate`, or set `max_grad_norm`."
        if tensor.numel() > 0 and tensor.abs().max() > LARGEST_VALUE:
            return (
                f"{key} has values beyond {LARGEST_VALUE:.0e}, whose weighted sum may overflow. Lower `learning_rate`."
            )
    return None


def _is_count(value: object) -> bool:
    """Whether it is a positive integer that a float64 holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**53


def _is_finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a mask: extremes are infinite if any value is, and NaN if any value is."""
    lowest, highest = tensor.aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())
