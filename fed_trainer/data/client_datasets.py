# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The data of many clients, as rows of one dataset: what a client holds is looked up when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset


__all__ = ["ClientDatasets", "column_by_client", "one_of_each_source", "recent", "rows_by_client"]


class ClientDatasets(Mapping[str, Dataset]):
    """
    Clients by name, each a selection of the rows of one dataset, in the order of their names.

    It is used like a dictionary from names to datasets, and `dict(clients)` is one. A client's `Dataset` is made
    anew each time it is asked for, which takes about a millisecond; what stays in memory is eight bytes per row. It
    does not change: for other clients take `dict(clients) | {...}`.

    Args:
        dataset (`Dataset`):
            All rows; memory-mapped as `load_dataset` and `load_from_disk` leave them.
        rows (`Mapping[str, Sequence[int]]`):
            Positions of the rows of each client.

    Raises:
        ValueError: If a name is no string, or a position is outside of the dataset.

    Example:

    ```python
    >>> clients = ClientDatasets(dataset, {"ward_1": [0, 2, 5], "ward_2": [1, 3, 4]})
    ```
    """

    def __init__(self, dataset: Dataset, rows: Mapping[str, Sequence[int] | np.ndarray]) -> None:
        self.dataset = dataset
        self._rows: dict[str, np.ndarray] = {}
        for client in sorted(rows, key=str):
            if not isinstance(client, str):
                raise ValueError(f"The client {client!r} is named by a {type(client).__name__}: use {str(client)!r}.")
            positions = np.asarray(rows[client], dtype=np.int64)
            if len(positions) and not 0 <= positions.min() <= positions.max() < len(dataset):
                raise ValueError(
                    f"Client {client!r} has rows from {positions.min()} to {positions.max()}, but those of the "
                    f"dataset are 0 to {len(dataset) - 1}."
                )
            self._rows[client] = positions

    def __getitem__(self, client: str) -> Dataset:
        return self.dataset.select(self._rows[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, client: object) -> bool:
        return client in self._rows  # that of `Mapping` would make the dataset

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClientDatasets):
            return NotImplemented
        same_data = self.dataset is other.dataset or self.dataset._fingerprint == other.dataset._fingerprint
        same_names = self._rows.keys() == other._rows.keys()
        return same_data and same_names and all(np.array_equal(self._rows[c], other._rows[c]) for c in self._rows)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} clients, {sum(self.num_rows.values())} rows of "
            f"{self.dataset.column_names})"
        )

    @property
    def num_rows(self) -> dict[str, int]:
        """Number of rows by client."""
        return {client: len(rows) for client, rows in self._rows.items()}

    def rows_of(self, client: str) -> np.ndarray:
        """Positions of the rows of a client in `dataset`."""
        return self._rows[client]

    def column(self, name: str) -> Iterator[tuple[str, list[Any]]]:
        """The values of one column, as Python objects, client by client."""
        values = self.dataset.with_format(None)[name][:]
        for client, rows in self._rows.items():
            yield client, [values[row] for row in rows]


def rows_by_client(clients: Mapping[str, Dataset]) -> dict[str, int]:
    """Number of rows by client."""
    if isinstance(clients, ClientDatasets):
        return clients.num_rows
    return {client: len(dataset) for client, dataset in clients.items()}


def column_by_client(clients: Mapping[str, Dataset], column: str) -> Iterator[tuple[str, Sequence[Any]]]:
    """The values of one column, as Python objects, client by client."""
    if isinstance(clients, ClientDatasets):
        return clients.column(column)
    return ((client, dataset.with_format(None)[column][:]) for client, dataset in clients.items())


def one_of_each_source(clients: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The clients whose columns have to be looked at: the first, if all have rows of one dataset."""
    if isinstance(clients, ClientDatasets) and clients:
        first = next(iter(clients))
        return {first: clients[first]}
    return dict(clients)


def recent(kept: dict[str, Dataset], client: str, prepare: Callable[[], Dataset], size: int) -> Dataset:
    """
    The prepared dataset of a client, of which the `size` asked for last stay in memory.

    Args:
        kept (`dict[str, Dataset]`):
            Those of before; changed.
        client (`str`):
            Name of the client.
        prepare (`Callable`):
            Makes it, if it is not among them.
        size (`int`):
            How many stay.
    """
    kept[client] = kept.pop(client) if client in kept else prepare()  # the last in order, so the last to be dropped
    for oldest in list(kept)[: max(0, len(kept) - size)]:
        del kept[oldest]
    return kept[client]
