# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows that take the place of PEFT's in its `pytest.mark.parametrize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from peft_scl import SclConfig

from .settings import CUSTOM_MODELS, DEFAULTS, SETTINGS, TRANSFORMER_FULL_RANK


Rows = list[Any]  # of what pytest.param returns, which has no public type


def scl_rows(argnames: str | Iterable[str], rows: Iterable[Any], settings: Iterable[str]) -> Rows | None:
    """
    Rows with `SclConfig` in place of PEFT's `rows`.

    Args:
        argnames (`str` or `Iterable[str]`): The argument names of the mark.
        rows (`Iterable`): The values of the mark.
        settings (`Iterable[str]`): Names of the settings to make rows for.

    Returns:
        `list` or `None`: The new rows, each marked `scl_setting(name)`; `None` if the mark does not give a config
        class.
    """
    names = tuple(name.strip() for name in argnames.split(",")) if isinstance(argnames, str) else tuple(argnames)
    if names not in _ROWS:
        return None
    return _ROWS[names](list(rows), tuple(settings))


def _row(setting: str, *values: Any, label: str = "") -> Any:
    identifier = f"{setting}-{label}" if label else setting
    return pytest.param(*values, id=identifier, marks=pytest.mark.scl_setting(setting))


def _class_alone(rows: Rows, settings: tuple[str, ...]) -> Rows:
    return [_row(DEFAULTS, SclConfig)] if DEFAULTS in settings else []


def _config_file(rows: Rows, settings: tuple[str, ...]) -> Rows:
    return [
        _row(name, SclConfig, SETTINGS[name].config_kwargs(TRANSFORMER_FULL_RANK))
        for name in settings
        if name != DEFAULTS
    ]


def _transformers(rows: Rows, settings: tuple[str, ...]) -> Rows:
    # the tests of a file share a task type, and the targets are left to the method
    task_types = {row[1]["task_type"] for row in map(_values, rows) if "task_type" in row[1]}
    common = {"target_modules": None, **({"task_type": task_types.pop()} if task_types else {})}
    return [
        _row(name, SclConfig, {**common, **SETTINGS[name].config_kwargs(TRANSFORMER_FULL_RANK)})
        for name in settings
        if name != DEFAULTS
    ]


def _custom_models(rows: Rows, settings: tuple[str, ...]) -> Rows:
    return [
        _row(name, f"SCL {name} {label}", model.model_id, SclConfig, model.config_kwargs(SETTINGS[name]), label=label)
        for name in settings
        if name != DEFAULTS
        for label, model in CUSTOM_MODELS.items()
        if model.suits(SETTINGS[name])
    ]


def _two_adapters(rows: Rows, settings: tuple[str, ...]) -> Rows:
    new = []
    for name in settings:
        if name == DEFAULTS:
            continue
        lin0, lin1 = (
            {**CUSTOM_MODELS[layer].config_kwargs(SETTINGS[name]), "init_weights": False} for layer in ("lin0", "lin1")
        )
        new.append(_row(name, f"SCL {name} Same", "scl", SclConfig, lin0, dict(lin0), label="same"))
        new.append(_row(name, f"SCL {name} Different", "scl", SclConfig, lin0, lin1, label="different"))
    return new


def _values(row: Any) -> Any:
    return getattr(row, "values", row)  # a pytest.param holds its values, a plain row is them


_ROWS: dict[tuple[str, ...], Callable[[Rows, tuple[str, ...]], Rows]] = {
    ("config_cls",): _class_alone,
    ("config_class", "mandatory_kwargs"): _config_file,
    ("config_cls", "config_kwargs"): _transformers,
    ("test_name", "model_id", "config_cls", "config_kwargs"): _custom_models,
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): _two_adapters,
}
