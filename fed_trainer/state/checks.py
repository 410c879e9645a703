# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of settings that may come from a YAML file, where a number can turn out to be a string."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real


__all__ = ["check_flag", "check_integer", "check_number"]


def check_number(name: str, value: object, is_valid: Callable[[float], bool], description: str) -> None:
    """Refuse what is not a finite real number in the range that `description` names."""
    if (
        not isinstance(value, Real)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not is_valid(float(value))
    ):
        raise ValueError(f"`{name}` should be {description} but the value passed is {value!r}")


def check_integer(name: str, value: object, least: int, optional: bool = False) -> None:
    """Refuse what is not an integer of at least `least` (nor `None`, if `optional`)."""
    if optional and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        either = " or None" if optional else ""
        raise ValueError(
            f"`{name}` should be an integer of at least {least}{either} but the value passed is {value!r}"
        )


def check_flag(name: str, value: object) -> None:
    """Refuse what is not a boolean: the string `"false"` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` should be True or False but the value passed is {value!r}")
