# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a run writes down about itself: `federation.json`, and beside it `federation.jsonl` with a line per round, so
that a round costs a line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType

from peft_scl.foreign_files import read_json, read_json_lines

from ..data.client_datasets import column_by_client, rows_by_client
from ..state.described import storable
from .disk import replace_durably, sync, writing


__all__ = [
    "IN_LINES",
    "RECORD_NAME",
    "ROUNDS_NAME",
    "WHOLE",
    "RecordFiles",
    "client_sizes",
    "is_foreign_rounds_file",
    "peft_fields",
    "peft_type_name",
    "read_header",
    "read_record",
    "read_rounds",
    "write_json",
]


RECORD_NAME = "federation.json"
ROUNDS_NAME = "federation.jsonl"
# The `format` of a record that has its rounds in it: in memory, as it is published, in files of earlier versions ...
WHOLE = 1
# ... and of a `federation.json` that has them beside it
IN_LINES = 2


def client_sizes(clients: Mapping[str, Dataset], label_column: str | None) -> dict[str, dict[str, Any]]:
    """
    By client: `num_examples`, and `composition`, how often each value of `label_column` occurs (values as strings,
    sorted), or `None` if there is no such column.
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


class RecordFiles:
    """
    The record in the folder of a run: `federation.json` holds all of it but the rounds, which are lines of
    `federation.jsonl`.

    Args:
        folder (`Path`):
            The folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: list[str] = []
        self._header: dict[str, Any] | None = None  # as it was written last, without the clients

    def begin(self, record: Mapping[str, Any]) -> None:
        """
        Write the whole record in place of what was there: when a run starts, and when it is resumed, as rounds after
        the checkpoint are dropped.
        """
        self._lines = _lines(record["rounds"])
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / ROUNDS_NAME, "".join(self._lines))  # first: without it, the other is damaged
        self._write_header(record)

    def append(self, record: Mapping[str, Any], is_saved: bool) -> None:
        """
        Append the rounds that are new in `record`; they are on the disk when it returns.

        Args:
            record (`Mapping[str, Any]`):
                The record.
            is_saved (`bool`):
                Whether there is a checkpoint of the round, so that `federation.json` is to be up to date. Otherwise
                it is written only if it has changed, apart from the digests of clients that have trained for the
                first time.
        """
        lines = _lines(record["rounds"][len(self._lines) :])
        with writing(ROUNDS_NAME):
            with open(self.folder / ROUNDS_NAME, "a", encoding="utf-8") as file:
                file.writelines(lines)
            sync(self.folder / ROUNDS_NAME)
        self._lines += lines
        if is_saved or _without_clients(record) != self._header:
            self._write_header(record)

    def write(self, folder: Path, record: Mapping[str, Any]) -> None:
        """
        Write the whole record into any folder, such as a checkpoint. In that of the run the rounds that were appended
        stay as they are.
        """
        if folder.resolve() != self.folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            lines = [*self._lines, *_lines(record["rounds"][len(self._lines) :])]
            _write(folder / ROUNDS_NAME, "".join(lines))
            write_json(folder / RECORD_NAME, _header(record))
        elif self._header is None or not (folder / ROUNDS_NAME).is_file():
            self.begin(record)
        else:
            self._write_header(record)

    def _write_header(self, record: Mapping[str, Any]) -> None:
        write_json(self.folder / RECORD_NAME, _header(record))
        self._header = _without_clients(record)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The record of a run, with its `"rounds"`, wherever they are: beside `federation.json`, or in it, as in what is
    published and what earlier versions have written. A last round that was cut off, since the run died while it
    wrote it, is left out.

    Args:
        folder (`str` or `os.PathLike`):
            An `output_dir`, a checkpoint, or an adapter from the Hub.

    Returns:
        `dict[str, Any]`: The record; empty if there is none.

    Raises:
        ValueError: If a file cannot be read, or is not what a run writes.
    """
    record = read_header(folder)
    if record.get("format") == IN_LINES:
        record |= {"format": WHOLE, "rounds": read_rounds(Path(folder) / ROUNDS_NAME)}
    return record


def read_header(folder: str | os.PathLike) -> dict[str, Any]:
    """
    What `federation.json` holds, of most records all but the rounds; empty if there is none.

    Raises:
        ValueError: If it is no JSON, or holds no dictionary.
    """
    path = Path(folder) / RECORD_NAME
    return read_json(path) if path.is_file() else {}


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """
    The rounds in a `federation.jsonl`.

    Raises:
        ValueError: If it cannot be read, or its lines are not one round after the other, from the first.
    """
    rounds = read_json_lines(path)
    for number, entry in enumerate(rounds, start=1):
        if entry.get("round") != number:
            raise ValueError(
                f"The file {str(path)!r} cannot be used: line {number} is not round {number}. Restore it from where "
                "it came from."
            )
    return rounds


def is_foreign_rounds_file(folder: str | os.PathLike) -> bool:
    """
    Whether the `federation.jsonl` in `folder` is no run's: it holds something, and no `federation.json` beside it says
    so.

    Raises:
        ValueError: As `read_header`.
    """
    path = Path(folder) / ROUNDS_NAME
    if not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0):
        return False  # an empty one is that of a run that died before it wrote the other file
    return read_header(folder).get("format") != IN_LINES


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """
    Write strict JSON (see `storable`) beside and rename, so that a reader, or a crash, never sees half a file; on the
    disk when it returns.
    """
    _write(Path(path), _strict(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path.name):
        beside.write_text(text, encoding="utf-8")
        replace_durably(beside, path)


def _strict(content: Mapping[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except (TypeError, ValueError):  # a number that is not finite, or an object
        return json.dumps(storable(content), indent=indent, allow_nan=False)


def _lines(rounds: Iterable[Mapping[str, Any]]) -> list[str]:
    return [_strict(entry) + "\n" for entry in rounds]


def _header(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "rounds"} | {"format": IN_LINES}


def _without_clients(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _header(record).items() if name != "clients"}
