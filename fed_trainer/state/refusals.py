# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Refusals as tables: rows of a condition and the sentence that is raised where it holds, the first one that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar


__all__ = ["Refusal", "refuse"]

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Refusal(Generic[Facts]):
    """
    A row of such a table.

    Args:
        applies (`Callable`):
            Whether what it is told is refused.
        sentence (`str` or `Callable`):
            What was given, why it cannot work, what to do; or a function of the same argument that says so.
        error (`type[Exception]`, *optional*, defaults to `NotImplementedError`):
            What is raised.
    """

    applies: Callable[[Facts], Any]
    sentence: str | Callable[[Facts], str]
    error: type[Exception] = NotImplementedError


def refuse(rows: Iterable[Refusal[Facts]], facts: Facts) -> None:
    """
    Raise the first of `rows` that applies to `facts`, if one does. The conditions are asked in order.

    Raises:
        Exception: That of the row.
    """
    for row in rows:
        if row.applies(facts):
            raise row.error(row.sentence if isinstance(row.sentence, str) else row.sentence(facts))
