# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run writes down about itself: `federation.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType


__all__ = ["RECORD_NAME", "composition", "peft_type_name", "read_record", "write_json"]


RECORD_NAME = "federation.json"


def composition(dataset: Dataset, label_column: str) -> dict[str, int]:
    """How often each value of `label_column` occurs, values as strings, in sorted order."""
    counts = Counter(str(value) for value in dataset[label_column])
    return dict(sorted(counts.items()))


def peft_type_name(peft_config: PeftConfig) -> str:
    """The name of the PEFT method, as in `"LORA"`."""
    return PeftType(peft_config.peft_type).value


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record in `folder`; empty if there is none."""
    path = Path(folder) / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write beside and rename, so that a reader, or a crash, never sees half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
