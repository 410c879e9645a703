# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The fields of a policy, and what each may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from peft_scl.foreign_files import short_repr

from ..methods.aggregation import METHODS
from ..state.checks import check_flag, check_integer, check_number


__all__ = ["REQUIREMENTS", "TRAINERS", "MayLeave", "PolicyFields", "built"]

TRAINERS = ("sft", "dpo", "reward", "task")
REQUIREMENTS = ("clipping", "noise", "secure_aggregation")
"""What a policy can require of the privacy of a run. This version offers none of it."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class MayLeave:
    """
    What may leave the client beside its update.

    Args:
        example_counts (`bool`, *optional*, defaults to `True`):
            The numbers of examples and of tokens, and what tells them. Without them clients are weighted alike.
        label_counts (`bool`, *optional*, defaults to `False`):
            How often each value of `label_column` occurs.
        metrics (`bool`, *optional*, defaults to `True`):
            Figures of the training and of evaluations, and how long the work takes.
        client_name (`bool`, *optional*, defaults to `False`):
            Whether the name of the client may be published. The coordinator knows it in any case.
    """

    example_counts: bool = True
    label_counts: bool = False
    metrics: bool = True
    client_name: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_flag(f"may_leave.{entry.name}", getattr(self, entry.name))

    @property
    def closed(self) -> frozenset[str]:
        """What may not leave."""
        return frozenset(entry.name for entry in fields(self) if not getattr(self, entry.name))


@dataclass(frozen=True)
class PolicyFields:
    """
    What a client takes part in, and what may leave it. A run that asks for more is refused by the client.

    Args:
        base_models (`list[str]`, *optional*):
            Base models: ids, in which `*`, `?` and `[...]` are those of `fnmatch`, or digests ([`base_digest`], 64
            hexadecimal digits). One that matches suffices. Any if not given.
        trainers (`list[str]`, *optional*):
            Some of `"sft"`, `"dpo"`, `"reward"`, `"task"`. Any if not given.
        most_rounds (`int`, *optional*):
            The most rounds of a run. No bound if not given, as with all numbers here.
        most_local_steps (`int`, *optional*):
            The most optimiser steps of this client in a round.
        fewest_clients_per_round (`int`, *optional*):
            The fewest clients among whose updates that of this client is hidden: those that are sampled in a round,
            and those without whom it fails (`min_clients`).
        largest_upload_mib (`float`, *optional*):
            The largest update, in MiB.
        aggregations (`list[str]`, *optional*):
            Names of aggregation rules, as in `aggregation` of the run. Any if not given.
        requires (`list[str]`, *optional*):
            Some of `"clipping"`, `"noise"`, `"secure_aggregation"`. This version offers none of them, so every run is
            refused.
        may_leave ([`MayLeave`] or `dict`, *optional*):
            What may leave beside the update.
        needs_signed, needs_encrypted (`bool`, *optional*, defaults to `False`):
            Whether packets have to be signed, and encrypted between this client and the coordinator.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with a base model may run here.

    Raises:
        ValueError: For a value of the wrong type, an unknown name, or an empty list that would refuse every run.
    """

    base_models: tuple[str, ...] | None = None
    trainers: tuple[str, ...] | None = None
    most_rounds: int | None = None
    most_local_steps: int | None = None
    fewest_clients_per_round: int | None = None
    largest_upload_mib: float | None = None
    aggregations: tuple[str, ...] | None = None
    requires: tuple[str, ...] | None = None
    may_leave: MayLeave = field(default_factory=MayLeave)
    needs_signed: bool = False
    needs_encrypted: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._set("base_models", _names("base_models", self.base_models))
        self._set("trainers", _names("trainers", self.trainers, TRAINERS))
        self._set("aggregations", _names("aggregations", self.aggregations, METHODS))
        self._set("requires", _names("requires", self.requires, REQUIREMENTS, may_be_empty=True))
        for name in ("most_rounds", "most_local_steps", "fewest_clients_per_round"):
            check_integer(name, getattr(self, name), 1, optional=True)
        if self.largest_upload_mib is not None:
            check_number(
                "largest_upload_mib", self.largest_upload_mib, lambda size: size > 0, "a positive number of MiB"
            )
        for name in ("needs_signed", "needs_encrypted", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.may_leave, MayLeave):
            self._set("may_leave", built(MayLeave, self.may_leave, "may_leave"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def built(kind: type[Kind], content: Any, what: str) -> Kind:
    names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is {short_repr(content)}, but it should be a dictionary with some of {names}.")
    unknown = [name for name in content if name not in names]
    if unknown:
        raise ValueError(f"{what} has the field `{unknown[0]}`, which there is not. There are {names}.")
    return kind(**content)


def _names(
    name: str, value: Any, choices: Collection[str] | None = None, may_be_empty: bool = False
) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(
            f"`{name}` should be a list of texts but the value passed is {short_repr(value)}. Put a digest between "
            "quotation marks, which YAML may take for a number."
        )
    unknown = [entry for entry in value if choices is not None and entry not in choices]
    if unknown:
        raise ValueError(f"`{name}` names {unknown[0]!r}, which there is not. There are {sorted(choices or ())}.")
    if not value and not may_be_empty:
        raise ValueError(f"`{name}` is an empty list, which would refuse every run. Leave it out for no bound.")
    return tuple(value)
