# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint and a trainer belong to one run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from datasets import Dataset

from peft_scl.foreign_files import short_repr

from ..config import FederationArguments
from ..data.digests import client_digest, dataset_digest
from ..state.described import agree, difference
from .record import RECORD_NAME


__all__ = ["check_same_data", "check_same_run", "held_out_digests"]


_WHOLE = (
    "base_digest", "initial_digest", "peft_type", "num_trainable_parameters", "aggregation", "seed", "num_sampled",
)  # fmt: skip
_PARTS = ("peft_config", "settings", "federation")
_NONE = "nothing"


def check_same_run(record: dict[str, Any], ours: dict[str, Any], folder: str | os.PathLike) -> None:
    """
    Refuse a checkpoint of a run with other settings or arguments. What an older record does not hold is not compared.

    Args:
        record (`dict`):
            The record in the checkpoint.
        ours (`dict`):
            The record of the run that is to go on.
        folder (`str`):
            The checkpoint, for the message.

    Raises:
        ValueError: Naming what differs.
    """
    if not record.get("rounds"):
        raise ValueError(
            f"{str(folder)!r} has no {RECORD_NAME} with a finished round, so it is not a checkpoint of a federation. "
            "Pass a `checkpoint-<round>` folder, or use it as `initial_adapter`."
        )
    differing = [
        f"{name}: {difference(there, here) or f'{short_repr(there)} there, {short_repr(here)} here'}"
        for name, there, here in _pairs(record, ours)
        if not agree(there, here)
    ]
    differing += _client_differences(record["clients"], ours["clients"])
    if differing:
        raise ValueError(
            f"The checkpoint {str(folder)!r} belongs to another run ({'; '.join(differing)}). Resume with the "
            "settings it was started with, or choose another `output_dir`."
        )


def check_same_data(
    record: dict[str, Any],
    clients: Mapping[str, Dataset],
    eval_dataset: Any,
    by_client: bool,
    folder: str | os.PathLike,
) -> None:
    """
    Refuse a checkpoint of a run on other data: of the clients that have trained, and of the held-out sets that were
    evaluated on.

    Args:
        record (`dict`):
            The record in the checkpoint.
        clients (`Mapping[str, Dataset]`):
            Training data by client.
        eval_dataset (`Any`):
            Held-out data, as the trainer evaluates on it.
        by_client (`bool`):
            Whether that is by client.
        folder (`str`):
            The checkpoint, for the message.

    Raises:
        ValueError: Naming the clients or the held-out sets.
    """
    digests = {client: about["digest"] for client, about in record["clients"].items() if "digest" in about}
    changed = [
        f"the data of client {client!r}"
        for client, digest in digests.items()
        if client_digest(clients, client) != digest
    ]
    before = record.get("held_out")
    if before and eval_dataset is not None:
        now = held_out_digests(eval_dataset, by_client, before if by_client else None)
        names = sorted(before.keys() | now.keys())
        changed += [
            _of_held_out(name, before, now) for name in names if before.get(name, _NONE) != now.get(name, _NONE)
        ]
    if changed:
        others = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"The checkpoint {str(folder)!r} belongs to a run on other data: {', '.join(changed[:3])}{others} changed "
            "since. Resume with the data it was started with, or choose another `output_dir`."
        )


def held_out_digests(
    eval_dataset: Any, by_client: bool, known: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """
    The digests of the held-out sets by name (`""` for a single one) or client; `None` for a stream.

    Args:
        eval_dataset (`Any`):
            Held-out data, as the trainer evaluates on it.
        by_client (`bool`):
            Whether that is by client.
        known (`Mapping[str, str]`, *optional*):
            Of clients, only those that are in it too, and the names of the others.
    """
    if not isinstance(eval_dataset, Mapping):
        return {"": dataset_digest(eval_dataset)}
    if not by_client:
        return {name: dataset_digest(dataset) for name, dataset in eval_dataset.items()}
    wanted = eval_dataset.keys() if known is None else known.keys()
    return {name: client_digest(eval_dataset, name) if name in wanted else None for name in eval_dataset}


def _pairs(record: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is compared, one level deep, so that a difference can be named: name, there, here."""
    pairs = [(name, record[name], ours.get(name)) for name in _WHOLE if name in record]
    is_complete = "arguments" in record  # an older record holds some of the settings only
    defaults = {field.name: field.default for field in fields(FederationArguments) if field.default is not MISSING}
    for part in _PARTS:
        there = record.get(part, {})
        if is_complete and part == "federation":  # a setting that was not there yet had its default
            there = {name: defaults[name] for name in ours[part] if name in defaults} | there
        pairs += [(name, there[name], here) for name, here in ours[part].items() if name in there]
    if is_complete:
        theirs, own = record["arguments"], ours["arguments"]
        pairs += [(f"`{name}`", theirs.get(name), own.get(name)) for name in sorted(theirs.keys() | own.keys())]
    return pairs


def _client_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The first difference between the clients: other names, or other sizes or labels of one."""
    if there.keys() != here.keys():
        gone, new = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
        return [f"clients: {short_repr(gone)} only there, {short_repr(new)} only here"]
    for client in here:
        for figure in ("num_examples", "composition"):
            before, now = there[client].get(figure), here[client].get(figure)
            if now is None and here[client].get("is_elsewhere"):  # it is known once the client has joined
                continue
            if before != now:
                return [f"clients: {figure} of {client!r}, {short_repr(before)} there, {short_repr(now)} here"]
    return []


def _of_held_out(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    which = f"the held-out data {name!r}" if name else "the held-out data"
    if name not in now:
        return f"{which} (only there)"
    return which if name in before else f"{which} (only here)"
