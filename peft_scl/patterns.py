# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Regular expressions of others, before they are used: those that could match for hours are refused.

`re` tries one way after the other. The number of ways through a pattern is bounded from its parts: those of a sequence
multiply, those of alternatives add up, an open-ended repetition can end at every place of the text. A repetition of
what is itself open to several ways, as in `(a+)+`, has exponentially many.
"""

from __future__ import annotations

import itertools
import math
import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any


__all__ = ["PLACES", "check_pattern"]

PLACES = 100  # characters of a module's name
MOST_WAYS = 2.0 * PLACES**4  # four open-ended repetitions; most of the ways are far shorter than the text
LONGEST = 10_000

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_pattern(pattern: str, what: str, factor: float = 1.0) -> None:
    """
    Refuse what is no regular expression, or one that could take too long on names of modules.

    Args:
        pattern (`str`):
            The regular expression.
        what (`str`):
            What it is, the subject of the error message.
        factor (`float`, *optional*, defaults to 1):
            By how many ways whoever uses it puts others around it.

    Raises:
        ValueError: Naming `what` and the pattern.
    """
    shown = repr(pattern) if len(pattern) <= 80 else f"{pattern[:77]!r}..."
    if len(pattern) > LONGEST:
        raise ValueError(f"{what} {shown} has {len(pattern)} characters. Name the modules literally, in a list.")
    try:
        ways = _ways(_parser.parse(pattern)) * factor
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{what} {shown} is not a regular expression ({error}). Escape special characters, or name the modules in "
            "a list."
        ) from error
    if ways > MOST_WAYS:
        raise ValueError(
            f"{what} {shown} could be matched in too many ways, so that a single name may take hours: repetitions "
            "stand within each other, or too many in a row. Name the modules literally, in a list."
        )


def _ways(parts: Any) -> float:
    return math.prod(_ways_of(kind.name, value) for kind, value in parts)


def _ways_of(kind: str, value: Any) -> float:
    if kind in _REPEATS:
        least, most, body = value
        return _repeated(_ways(body), least, most)
    if kind == "BRANCH":
        return _alternatives(value[1])
    if kind == "SUBPATTERN":
        return _ways(value[-1])
    if kind == "ATOMIC_GROUP":
        return _ways(value)
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1])
    if kind == "GROUPREF_EXISTS":
        return _ways(value[1]) + _ways(value[2] or [])
    return 1.0


def _repeated(ways: float, least: int, most: int) -> float:
    if most is _parser.MAXREPEAT or most > PLACES:
        return math.inf if ways > 1 else PLACES
    if ways > MOST_WAYS:
        return math.inf
    if ways == 1:
        return most - least + 1
    return math.inf if most > 30 else sum(ways**count for count in range(least, most + 1))


def _alternatives(branches: Any) -> float:
    """One way, if all are literal and none begins another; otherwise those of all."""
    literal = sorted(text for text in map(_literal, branches) if text is not None)
    is_distinct = not any(later.startswith(earlier) for earlier, later in itertools.pairwise(literal))
    if len(literal) == len(branches) and is_distinct:
        return 1.0
    return sum(_ways(branch) for branch in branches)


def _literal(branch: Any) -> str | None:
    if all(kind.name == "LITERAL" for kind, _ in branch):
        return "".join(chr(code) for _, code in branch)
    return None
