# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run writes down about itself: `federation.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType

from peft_scl.foreign_files import read_json

from ..data.client_datasets import column_by_client, rows_by_client
from ..state.described import storable
from .disk import replace_durably, writing


__all__ = [
    "RECORD_NAME",
    "client_sizes",
    "peft_fields",
    "peft_type_name",
    "read_record",
    "write_json",
]


RECORD_NAME = "federation.json"


def client_sizes(clients: Mapping[str, Dataset], label_column: str | None) -> dict[str, dict[str, Any]]:
    """
    By client: `num_examples`, and `composition`, how often each value of `label_column` occurs (values as strings, sorted), or `None`
    if there is no such column.
    """
    sizes: dict[str, dict[str, Any]] = {
        client: {"num_examples": num_rows, "composition": None} for client, num_rows in rows_by_client(clients).items()
    }
    if label_column is not None:
        for client, values in column_by_client(clients, label_column):
            sizes[client]["composition"] = dict(sorted(Counter(map(str, values)).items()))
    return sizes


def peft_type_name(peft_config: PeftConfig) -> str:
    """The name of the PEFT method, as in `"LORA"`."""
    return PeftType(peft_config.peft_type).value


def peft_fields(peft_config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config as JSON keeps them, without where it was used."""
    skipped = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    fields = {key: value for key, value in peft_config.to_dict().items() if key not in skipped}
    return json.loads(
        json.dumps(fields, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The record in `folder`; empty if there is none.

    Raises:
        ValueError: If it is no JSON, or holds no dictionary.
    """
    path = Path(folder) / RECORD_NAME
    return read_json(path) if path.is_file() else {}


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """
    Write strict JSON (see `storable`) beside and rename, so that a reader, or a crash, never sees half a file; on the
    disk when it returns.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError):  # a number that is not finite, or an object
        text = json.dumps(storable(content), indent=1, allow_nan=False)
    with writing(path.name):
        beside.write_text(text + "\n", encoding="utf-8")
        replace_durably(beside, path)
