# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of evaluations and clients: which are the user's, and their means over the clients that have them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


__all__ = [
    "FIGURES_WITHHELD",
    "TRAINING_METRICS",
    "ClientMeans",
    "evaluations",
    "held_out_metrics",
    "is_finite_number",
    "is_shown",
    "mean_over_clients",
    "means_over_clients",
    "without_speed",
]


TRAINING_METRICS = "training_metrics"  # in the figures of a client: what the trainer logs beside the loss
FIGURES_WITHHELD = "figures_withheld"  # set, and alone, in the place of figures that may not leave a client

# what `Trainer.evaluate` measures of itself rather than of the model, behind the prefix of the data set
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
# likewise with `skip_memory_metrics=False`, whatever the data set
_MEMORY = frozenset(f"eval_mem_{where}_{what}_delta" for where in ("cpu", "gpu") for what in ("alloc", "peaked"))
# of TRL's trainers, in records that do not say which they had
_OLD_SIDE_METRICS = frozenset(
    f"eval_{name}"
    for name in (
        "entropy", "mean_token_accuracy", "num_tokens", "logits/chosen", "logits/rejected", "rewards/chosen",
        "rewards/rejected", "logps/chosen", "logps/rejected", "min_reward", "mean_reward", "max_reward",
    )
)  # fmt: skip


class ClientMeans(NamedTuple):
    """
    Means over clients.

    Args:
        means (`dict[str, float]`):
            By metric, over the clients that have a finite number for it; NaN if none has, and one has a number.
        num_clients (`dict[str, int]`):
            By metric, how many have.
        without (`dict[str, dict[str, str]]`):
            By metric and client, what stood in the place of a number.
    """

    means: dict[str, float]
    num_clients: dict[str, int]
    without: dict[str, dict[str, str]]


def is_finite_number(value: Any) -> bool:
    """Whether a mean can be taken of it."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def is_shown(value: Any) -> bool:
    """Whether a value of a record is a number, as strict JSON holds it."""
    return isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")


def mean_over_clients(values: Mapping[str, float], weights: Mapping[str, float | None]) -> float:
    """
    The mean, weighted by the numbers of examples. If one of the clients does not say its own (`None`), all of them
    weigh alike.
    """
    known = {client: weight for client in values if (weight := weights[client]) is not None}
    if len(known) < len(values):
        known = dict.fromkeys(values, 1)
    return sum(known[client] * value for client, value in values.items()) / sum(known.values())


def means_over_clients(figures: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float | None]) -> ClientMeans:
    """
    The means of all metrics, each over the clients that have it.

    Args:
        figures (`Mapping[str, Mapping[str, Any]]`):
            By client, what was measured: numbers, or what a user's `compute_metrics` has returned in their place.
        weights (`Mapping[str, float]`):
            By client, the number of its examples; `None` if it does not say it.
    """
    result = ClientMeans({}, {}, {})
    for name in dict.fromkeys(name for measured in figures.values() for name in measured):
        values = {client: measured[name] for client, measured in figures.items() if name in measured}
        if not any(isinstance(value, (int, float)) for value in values.values()):
            continue  # a list at every client, say, is no figure that has a mean
        usable = {client: value for client, value in values.items() if is_finite_number(value)}
        result.means[name] = mean_over_clients(usable, weights) if usable else math.nan
        result.num_clients[name] = len(usable)
        if len(usable) < len(figures):
            result.without[name] = {
                client: _what_it_is(values[client]) if client in values else "missing"
                for client in figures
                if client not in usable
            }
    return result


def without_speed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What was measured of a model, of what `Trainer.evaluate` returns for one data set."""
    speed = {f"{prefix}_{name}" for name in _SPEED} | _MEMORY | {"epoch"}
    return {name: value for name, value in metrics.items() if name not in speed}


def held_out_metrics(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    """As `evaluations`, the finite numbers only: what a curve can be drawn of."""
    return {
        number: {name: value for name, value in metrics.items() if is_finite_number(value)}
        for number, metrics in evaluations(record).items()
    }


def evaluations(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """
    What the evaluations measured by round, 0 before training, of the rounds that were evaluated: the losses first,
    then the figures of `compute_metrics`, without the speed of the evaluation and what TRL logs along (it is in the
    record). Numbers that are not finite are `"nan"`, `"inf"` and `"-inf"`.
    """
    measured = {0: record["start"]["eval"]} | {entry["round"]: entry["eval"] for entry in record["rounds"]}
    side = frozenset(record.get("side_metrics", _OLD_SIDE_METRICS))
    held_out = record.get("held_out")  # by name, or by client
    names = None if held_out is None else [name for name in held_out if name]
    if names is not None and all(name in record["clients"] for name in names):
        names = []  # the figures are means over the clients, and not called by them
    result = {}
    for number, metrics in measured.items():
        if metrics is None:
            continue
        left_out = side | _speed_names(metrics, names)
        result[number] = {
            key: metrics[key]
            for key in sorted(metrics, key=lambda key: not key.endswith("loss"))
            if key.startswith("eval_") and key not in left_out and is_shown(metrics[key])
        }
    return result


def _speed_names(metrics: Mapping[str, Any], held_out: Iterable[str] | None) -> frozenset[str]:
    """The whole names of what measures the evaluation itself, by the prefixes of the data sets."""
    prefixes = {"eval"} | {f"eval_{name}" for name in held_out or ()}
    if held_out is None:  # an older record does not name them
        prefixes |= {
            name.removesuffix("_runtime")
            for name in metrics
            if name.endswith("_runtime") and f"{name.removesuffix('_runtime')}_loss" in metrics
        }
    names = {f"{prefix}_{name}" for prefix in prefixes for name in _SPEED}
    return frozenset(names) | _MEMORY


def _what_it_is(value: Any) -> str:
    if value is None or isinstance(value, float):
        return str(value)
    return f"a {type(value).__name__}"
