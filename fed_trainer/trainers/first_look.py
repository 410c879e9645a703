# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The one row of the clients' data that a trainer looks at when it is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from datasets import Dataset

from ..federation.validation import TooFewClientsError


__all__ = ["telling_row"]


# what TRL tells formats by: whether a column is there, and whether its value is a text or a list of messages
_FORMAT_COLUMNS = frozenset({
    "prompt", "completion", "messages", "conversations", "chosen", "rejected",
    "input_ids", "chosen_ids", "rejected_ids",
})  # fmt: skip
_CHUNK = 100  # rows read at once


def telling_row(clients: Mapping[str, Dataset], text_field: str | None = None) -> Dataset:
    """
    One row of which no part that tells its format is missing. Trainers learn from the data that they are made with
    what it is (texts or messages, with or without images, ...), and that must not depend on what the first client
    happens to hold.

    Args:
        clients (`Mapping[str, Dataset]`):
            Data by client.
        text_field (`str`, *optional*):
            Name of the column of plain text.

    Returns:
        `Dataset`: of one row, the first that tells; if none does, the first that can be read.

    Raises:
        TooFewClientsError: If no row of any client can be read.
    """
    columns = _FORMAT_COLUMNS | ({text_field} if text_field is not None else set())
    readable = error = None
    for dataset in clients.values():
        for position, tells in _positions(dataset, columns):
            if not tells and readable is not None:
                continue
            row = dataset.select([position])
            try:
                next(iter(row))
            except Exception as unreadable:  # an image that is damaged, ...
                error = unreadable
                continue
            if tells:
                return row
            readable = row
    if readable is None:
        raise TooFewClientsError(
            f"None of the {len(clients)} clients has a row that can be read, so there is nothing to train on. The "
            "last attempt is above."
        ) from error
    return readable


def _positions(dataset: Dataset, columns: Collection[str]) -> Iterator[tuple[int, bool]]:
    """The positions of all rows, each with whether the row tells."""
    known = [name for name in dataset.column_names if name in columns]
    if dataset.format["type"] == "custom" or not known:  # a transform makes other columns
        yield from ((position, True) for position in range(len(dataset)))
        return
    plain = dataset.select_columns(known).with_format(None)
    for start in range(0, len(plain), _CHUNK):
        values = plain[start : start + _CHUNK]
        for offset in range(len(values[known[0]])):
            yield start + offset, not any(_is_missing(values[name][offset]) for name in known)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, list) and (not value or value[0] is None))
