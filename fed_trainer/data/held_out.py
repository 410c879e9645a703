# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be evaluated on: data sets that the trainers underneath take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch.utils.data
from datasets import Dataset, IterableDataset

from .client_datasets import one_of_each_source


__all__ = ["advice_for", "check_held_out", "column_names", "is_by_client"]


def is_by_client(eval_dataset: Any, clients: Collection[str]) -> bool:
    """Whether every key of it is the name of a client."""
    if not isinstance(eval_dataset, Mapping) or len(eval_dataset) == 0:
        return False
    return all(name in clients for name in eval_dataset)


def check_held_out(eval_dataset: Any, clients: Collection[str], takes_torch: bool) -> None:
    """
    Refuse held-out data of a type that the trainer underneath cannot evaluate on.

    Args:
        eval_dataset (`Any`):
            One set, or several by name or client.
        clients (`Collection[str]`):
            Names of the clients. If all sets are theirs, each is to be as long as it says, since the mean is weighted
            by rows.
        takes_torch (`bool`):
            Whether the trainer takes data sets of torch, as `Trainer` does.

    Raises:
        ValueError: Naming the set, and saying what to make of it.
    """
    if eval_dataset is None:
        return
    is_several = isinstance(eval_dataset, Mapping)
    sets = {"": eval_dataset}
    if is_several:
        sets = one_of_each_source(eval_dataset) if eval_dataset else {}
    by_client = is_by_client(eval_dataset, clients)
    kinds: tuple[type, ...] = (Dataset, IterableDataset)
    if takes_torch:
        kinds += (torch.utils.data.Dataset,)
    for name, dataset in sets.items():
        what = f"The held-out data of {name!r}" if is_several else "`eval_dataset`"
        if not isinstance(dataset, kinds):
            raise ValueError(
                f"{what} is a {type(dataset).__name__}, but should be a `datasets.Dataset` (or a stream, an "
                f"`IterableDataset`). {advice_for(dataset)}"
            )
        if by_client and not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{what} is a stream ({type(dataset).__name__}), but held-out data by client is weighted by its "
                f"number of rows, so it has to be known. {advice_for(dataset)}"
            )
        if not is_several and hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError("`eval_dataset` is empty. Leave it out, or hold out some rows.")


def advice_for(data: Any) -> str:
    """How to make a `Dataset` of what was given instead."""
    if isinstance(data, Mapping):
        return "`Dataset.from_dict(columns)` makes one of a dictionary of columns."
    if type(data).__module__.partition(".")[0] == "pandas":
        return "`Dataset.from_pandas(frame, preserve_index=False)` makes one."
    if isinstance(data, str):
        return "`datasets.load_dataset(name, split='test')` loads one."
    if isinstance(data, (IterableDataset, torch.utils.data.Dataset)):
        return "`Dataset.from_list(list(data))` makes one, if its items are rows."
    return "`Dataset.from_list(rows)` makes one of a list of rows."


def column_names(dataset: Dataset | IterableDataset) -> set[str]:
    """Names of the columns; a stream that does not know them is asked for its first row."""
    if isinstance(dataset, IterableDataset) and dataset.column_names is None:
        return set(next(iter(dataset), {}))
    return set(dataset.column_names or ())
