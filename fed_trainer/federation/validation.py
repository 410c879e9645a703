# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is checked of an update before it counts, so that one bad client costs its own update and not the round."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..methods.aggregation.base import ClientUpdate
from ..methods.aggregation.limits import LARGEST_VALUE, MOST_STEPS
from ..state.adapter_state import AdapterState, foreign_kind


__all__ = ["InvalidUpdateError", "TooFewClientsError", "first_not_finite", "require_clients", "validated"]


NAMELESS = "(no name)"


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
    sampled: Collection[str] | None = None,
    limits: Mapping[str, float] | None = None,
    most_steps: int = MOST_STEPS,
    sends: Mapping[str, torch.dtype] | None = None,
    numbers: Collection[str] = ("num_examples",),
) -> ClientUpdate:
    """
    The update, if it can be used: itself, or with its tensors detached if they are parts of a graph. Whatever came in,
    nothing else is raised.

    Args:
        update ([`ClientUpdate`]):
            What came in.
        reference (`dict[str, torch.Tensor]`):
            What the client was sent: its keys, shapes and dtypes are those of the delta. For a client of a smaller
            rank that is what [`truncate_ranks`] gives.
        seen (`Collection[str]`, *optional*):
            Clients whose update has been taken in this round.
        base_digest (`str`, *optional*):
            [`base_digest`] of the server's base model; compared if the update has one too.
        partial (`bool`, *optional*, defaults to `False`):
            Whether tensors may be missing.
        sampled (`Collection[str]`, *optional*):
            Clients of the round; any if not given.
        limits (`Mapping[str, float]`, *optional*):
            The largest magnitude by tensor ([`value_limits`]).
        most_steps (`int`, *optional*):
            The most local steps that a client may report.
        sends (`Mapping[str, torch.dtype]`, *optional*):
            Names and dtypes of the numbers beside the delta ([`LocalObjective.sends`]).
        numbers (`Collection[str]`, *optional*):
            The numbers that the rule reads ([`Aggregator.numbers`]); a client may keep its number of examples to
            itself if that is none of them.

    Raises:
        InvalidUpdateError: For a client of another round, a duplicate, another base model, a number of examples or
            steps or a scaling that is none, what is no dictionary of plain tensors in memory, a wrong key, shape or
            dtype, an empty tensor, or a value that is not finite or too large.
    """
    client = _client_of(update)
    reason = (
        _fault_of_fields(update, seen, base_digest, sampled, most_steps, numbers)
        or _fault_of_names("tensors", update.delta, reference, partial)
        or _fault_of_tensors(update.delta, reference, limits or {})
        or _fault_of_names("numbers beside the update", update.extras, sends or {}, False)
        or _fault_of_tensors(
            update.extras, {key: torch.empty((), dtype=dtype) for key, dtype in (sends or {}).items()}
        )
    )
    if reason is not None:
        raise InvalidUpdateError(client, reason)
    if any(tensor.requires_grad for tensor in update.delta.values()):
        return replace(update, delta={key: tensor.detach() for key, tensor in update.delta.items()})
    return update


def _client_of(update: object) -> str:
    """The client's name in an update of any kind."""
    client = update.client if isinstance(update, ClientUpdate) else None
    return client if isinstance(client, str) else NAMELESS


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


def first_not_finite(state: AdapterState) -> str | None:
    """Name of a tensor with a value that is not finite, if there is one."""
    return next((key for key, tensor in state.items() if tensor.numel() > 0 and not _is_finite(tensor)), None)


def _fault_of_fields(
    update: ClientUpdate,
    seen: Collection[str],
    base_digest: str | None,
    sampled: Collection[str] | None,
    most_steps: int,
    numbers: Collection[str],
) -> str | None:
    if not isinstance(update, ClientUpdate) or not isinstance(update.client, str):
        return "it is no `ClientUpdate` with the name of a client. Send one."
    if sampled is not None and update.client not in sampled:
        return "it was not sampled in this round. Send an update when asked for it."
    if update.client in seen:
        return "it has sent one in this round already. A client counts once per round."
    if update.base_digest is not None and not isinstance(update.base_digest, str):
        return (
            f"its digest of the base model is of type {type(update.base_digest).__name__}. Send what `base_digest` "
            "returns."
        )
    if base_digest is not None and update.base_digest is not None and update.base_digest != base_digest:
        return (
            f"it was trained on another base model (digest {update.base_digest[:12]}, expected "
            f"{base_digest[:12]}). Load the same checkpoint on every machine."
        )
    is_withheld = update.num_examples is None and "num_examples" not in numbers
    if not is_withheld and not _is_count(update.num_examples):
        return (
            f"`num_examples` is {_shown(update.num_examples)}, but it should be a positive integer: it is the "
            "weight in the mean."
        )
    if update.num_steps is not None and not (_is_count(update.num_steps) and update.num_steps <= most_steps):
        return (
            f"`num_steps` is {_shown(update.num_steps)}, but it should be a positive integer of at most "
            f"{most_steps}. Send what the local round counted."
        )
    if update.num_tokens is not None and not _is_count(update.num_tokens):
        return (
            f"`num_tokens` is {_shown(update.num_tokens)}, but it should be a positive integer: it may be the "
            "weight in the mean."
        )
    return _fault_of_scalings(update.scalings)


def _fault_of_scalings(scalings: object) -> str | None:
    if scalings is not None and not isinstance(scalings, dict):
        return (
            f"`scalings` is of type {type(scalings).__name__}, but it should be a dictionary by module. Send "
            "`lora_alpha / r`."
        )
    for module, scaling in (scalings or {}).items():
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
            return (
                f"the scaling of {_shown(module, _text)} is {_shown(scaling)}, but it should be positive and "
                "finite. Send `lora_alpha / r`."
            )
    return None


def _fault_of_names(what: str, state: object, expected: Mapping[str, object], partial: bool) -> str | None:
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return (
            f"the {what} are of type {type(state).__name__}, but should be a dictionary by name. Send what was "
            "received."
        )
    unexpected, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    if unexpected:
        return (
            f"{len(unexpected)} {what} are not shared in this round (the first: {_shown(unexpected[0], _text)}). "
            "Send what was received."
        )
    if missing and (not partial or len(missing) == len(expected)):
        return f"{len(missing)} {what} are missing (the first: {missing[0]}). Send everything that is shared."
    return None


def _fault_of_tensors(
    state: AdapterState, reference: AdapterState, limits: Mapping[str, float] | None = None
) -> str | None:
    for key, tensor in state.items():
        expected = reference[key]
        if (kind := foreign_kind(tensor)) is not None:
            return f"{key} is {kind}, but it should be a plain tensor in memory. Send what `LiveState.read` returns."
        if tensor.numel() == 0 and expected.numel() > 0:
            return (
                f"{key} is empty, as read from a partitioned model (ZeRO-3, FSDP). Gather the parameters before "
                "reading."
            )
        if tensor.shape != expected.shape:
            return (
                f"{key} has the shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}. The PEFT configs "
                "differ."
            )
        if tensor.dtype not in (expected.dtype, torch.float32):
            return f"{key} is {tensor.dtype}, expected {expected.dtype} or torch.float32. Cast it before sending."
        if tensor.numel() == 0:
            continue
        if not _is_finite(tensor):
            return f"{key} has values that are not finite. Lower `learning_rate`, or set `max_grad_norm`."
        limit = min(LARGEST_VALUE, (limits or {}).get(key, LARGEST_VALUE))
        if tensor.detach().abs().max() > limit:
            return (
                f"{key} has values beyond {limit:.3g}, beside which the other updates and the state would not "
                "count, or their sum may overflow. Lower `learning_rate`."
            )
    return None


def _text(value: str) -> str:
    return ascii(value)[1:-1]


def _shown(value: object, show: Callable[[Any], str] = repr) -> str:
    """What a client sent, short; not the text of an object, which may be anything."""
    if not isinstance(value, (str, int, float, type(None))):
        return f"of type {type(value).__name__}"
    text = show(value) if not isinstance(value, int) or abs(value) < 2**256 else "an integer of many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_count(value: object) -> bool:
    """Whether it is a positive integer that a float64 holds exactly."""
    return type(value) is int and 1 <= value <= 2**53


def _is_finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a mask: extremes are infinite if any value is, and NaN if any value is."""
    lowest, highest = tensor.detach().aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())
