# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Digests of what datasets hold: equal for equal rows, whether they lie in memory or on disk, in one piece or as a
selection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.formatting import query_table

from ..state.described import described
from .client_datasets import ClientDatasets, one_of_each_source


__all__ = ["client_digest", "dataset_digest", "described_transforms"]


ROWS_AT_ONCE = 1024
# TRL computes them with the reference, whose rounding depends on the machine
_COMPUTED = frozenset({"ref_chosen_logps", "ref_rejected_logps"})


def client_digest(clients: Mapping[str, Any], client: str) -> str | None:
    """The digest of one client's rows; see `dataset_digest`."""
    if isinstance(clients, ClientDatasets):  # without the `Dataset`, which takes longer to make than its rows to read
        return _digest(clients.dataset, clients.rows_of(client))
    return dataset_digest(clients[client])


def dataset_digest(dataset: Any) -> str | None:
    """
    128 bits of a SHA-256 over the values of all columns, in the order of the rows; of a file that a row names, only
    the name counts.

    Args:
        dataset (`Dataset`):
            What to look at.

    Returns:
        `str` or `None`: The digest; `None` if it is no `Dataset`, as a stream, whose rows cannot be looked at
        beforehand.
    """
    return _digest(dataset, np.arange(len(dataset))) if isinstance(dataset, Dataset) else None


def described_transforms(clients: Mapping[str, Any]) -> list[Any] | None:
    """What `with_transform` has put between the rows and who reads them; `None` if nothing."""
    transforms: list[Any] = []
    for dataset in one_of_each_source(clients).values():
        if dataset.format["type"] == "custom":
            about = described(dataset.format["format_kwargs"])
            transforms += [about] if about not in transforms else []
    return transforms or None


def _digest(dataset: Dataset, rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    names = sorted(set(dataset.column_names) - _COMPUTED)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        chosen = rows[first : first + ROWS_AT_ONCE]
        is_range = len(chosen) > 1 and bool((np.diff(chosen) == 1).all())
        key: Any = range(int(chosen[0]), int(chosen[-1]) + 1) if is_range else chosen.tolist()
        table = query_table(dataset.data, key, indices=dataset._indices)
        for name in names:
            digest.update(f"{name}\0".encode())
            _update(digest, table.column(name))
    return digest.hexdigest()[:32]


def _update(digest: Any, values: pa.ChunkedArray | pa.Array) -> None:
    """Add the values of an array: its length, which are null, and the others."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if _is_text(array.type):
        array = array.cast(pa.large_binary())
    digest.update(np.array([len(array), array.null_count], dtype=np.int64).tobytes())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        array = array.drop_null()  # below a null may lie anything
    kind = array.type
    if len(array) == 0:
        return
    if pa.types.is_struct(kind):
        for index, child in enumerate(array.flatten()):
            digest.update(f"{kind.field(index).name}\0".encode())
            _update(digest, child)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        digest.update(pc.list_value_length(array).cast(pa.int64()).to_numpy().tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(array.to_numpy(zero_copy_only=False)).tobytes())
    elif pa.types.is_large_binary(kind):
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
        digest.update((ends - ends[0]).tobytes())
        if data is not None:
            digest.update(memoryview(data)[ends[0] : ends[-1]])
    elif kind.num_buffers == 2:  # numbers, times and the like
        width = kind.bit_width // 8
        digest.update(memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width])
    else:
        digest.update(repr(array.to_pylist()).encode())


def _is_text(kind: pa.DataType) -> bool:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)
