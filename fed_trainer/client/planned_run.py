# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run will ask of its clients, by its YAML: before a model is loaded, and before anybody serves it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedRewardConfig,
    FederatedTaskConfig,
    FederationArguments,
    json_mapping,
)
from ..federation.sampling import ClientSampler
from ..methods.aggregation import METHODS
from ..methods.aggregation.base import weights_of
from ..methods.objectives import LOCAL_OBJECTIVES


__all__ = ["planned_run"]

CONFIGS: dict[str, type[FederationArguments]] = {
    "sft": FederatedConfig,
    "dpo": FederatedDPOConfig,
    "reward": FederatedRewardConfig,
    "task": FederatedTaskConfig,
}


def planned_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """
    What [`describe_run`] will say of a run, as far as that is known.

    Args:
        content (`Mapping[str, Any]`):
            The dictionary of a `RUN.yaml`: fields of the config, `trainer` (`"sft"` if not given),
            `model_name_or_path`, `clients` (a list, or how many). What else there is, is not looked at.

    Returns:
        `dict[str, Any]`: For [`Policy.violations`] with `is_plan=True`. The settings have the defaults of the config
        for what the YAML does not say.

    Raises:
        ValueError: For a trainer that there is not, clients that are none, more clients per round than there are, or
            options that are no dictionary.
    """
    trainer = content.get("trainer", "sft")
    if trainer not in CONFIGS:
        raise ValueError(f"`trainer` should be one of {sorted(CONFIGS)} but the value passed is {trainer!r}")
    settings = _defaults(CONFIGS[trainer]) | dict(content)
    for name in ("aggregation_kwargs", "client_settings"):
        settings[name] = json_mapping(name, settings.get(name))
    num_clients, per_round = _number_of_clients(content.get("clients")), settings["clients_per_round"]
    run = {
        "trainer": trainer,
        "base_model": _name_of_model(content.get("model_name_or_path")),
        "num_rounds": settings["num_rounds"],
        "num_clients": num_clients,
        "num_sampled": None,
        "weights": _weights(settings),
        "settings": settings,
    }
    if num_clients is not None:
        run["num_sampled"] = ClientSampler([str(number) for number in range(num_clients)], per_round, 0).num_sampled
    elif type(per_round) is int:
        run["num_sampled"] = per_round
    return run


def _defaults(config: type[FederationArguments]) -> dict[str, Any]:
    """By field, for those that have one; not by making a config, which asks for the devices of this machine."""
    missing = dataclasses.MISSING
    return {field.name: field.default for field in dataclasses.fields(config) if field.default is not missing}


def _name_of_model(model: Any) -> str | None:
    """Of a local folder only the name, as in the record."""
    if not isinstance(model, str):
        return None
    return os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model


def _number_of_clients(clients: Any) -> int | None:
    if isinstance(clients, Sequence) and not isinstance(clients, str):
        clients = len(clients)
    if clients is None:
        return None
    if type(clients) is not int or clients < 1:
        raise ValueError(f"`clients` should be names, or how many there are, but the value passed is {clients!r}")
    return clients


def _weights(settings: Mapping[str, Any]) -> str | None:
    """As [`weights_of`] the rule, which some methods set for the local objective; `None` if there is no such rule."""
    objective, method = (
        LOCAL_OBJECTIVES.get(str(settings["local_objective"])),
        METHODS.get(str(settings["aggregation"])),
    )
    if objective is not None and objective.uniform:
        return "uniform"
    if method is None:
        return None
    try:
        return weights_of(method.build([], **(settings["aggregation_kwargs"] or {})))
    except (TypeError, ValueError):  # options of which the run itself will say what is wrong
        return None
