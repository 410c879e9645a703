# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Splits one dataset into the datasets of federated clients.

`natural_partition` follows a column that already says who owns a row. The others make an artificial federation: equal
clients (`iid_partition`), clients of unequal size (`quantity_skew_partition`), clients with unequal shares of each
label (`dirichlet_partition`), and clients that hold a few labels only (`pathological_partition`).

Every split is exact: each row goes to exactly one client, and a client keeps its rows in the order of the dataset. The
same dataset, arguments and seed give the same split with the same version of NumPy.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from .client_datasets import ClientDatasets, column_by_client, one_of_each_source, rows_by_client
from .table import format_table


__all__ = [
    "dirichlet_partition",
    "iid_partition",
    "natural_partition",
    "partition_counts",
    "partition_summary",
    "pathological_partition",
    "quantity_skew_partition",
]

# How often a Dirichlet split is drawn before it is given up because a client has too few rows.
MAX_DRAWS = 100


def natural_partition(dataset: Dataset, column: str) -> ClientDatasets:
    """
    Makes one client of each distinct value of a column, such as a hospital, a user or a source file.

    Args:
        dataset (`Dataset`):
            The rows to split.
        column (`str`):
            The column whose value owns the row. A client is named `str(value)`; for a `ClassLabel` column the value is
            the integer.

    Returns:
        [`ClientDatasets`]: The clients, sorted by name.

    Raises:
        `ValueError`: If the dataset is empty, or the column is unknown, nested, or has missing values.
    """
    _check_not_empty(dataset)
    names, owners = _encode([str(value) for value in _column_values(dataset, column)])
    return _split(dataset, owners, names)


def iid_partition(dataset: Dataset, num_clients: int, seed: int = 0) -> ClientDatasets:
    """
    Deals shuffled rows to clients whose sizes differ by at most one.

    Args:
        dataset (`Dataset`):
            The rows to split.
        num_clients (`int`):
            Number of clients, from 1 to the number of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        [`ClientDatasets`]: The clients `client_0`, `client_1`, ..., numbered with equal width.

    Raises:
        `ValueError`: If the dataset is empty, or `num_clients` is out of range.
    """
    _check_num_clients(dataset, num_clients)
    owners = np.empty(len(dataset), dtype=np.int64)
    owners[_generator(seed).permutation(len(dataset))] = np.arange(len(dataset)) % num_clients
    return _split(dataset, owners, _client_names(num_clients))


def quantity_skew_partition(
    dataset: Dataset, num_clients: int, alpha: float, seed: int = 0, min_examples: int = 1
) -> ClientDatasets:
    """
    Deals shuffled rows to clients of unequal size: the shares of the clients are drawn from `Dirichlet(alpha)`.

    Each client sees the same distribution of content (Li et al. 2022, arXiv 2102.02079, "quantity skew"). A draw that
    leaves a client with fewer than `min_examples` rows is drawn again.

    Args:
        dataset (`Dataset`):
            The rows to split.
        num_clients (`int`):
            Number of clients, from 1 to the number of rows.
        alpha (`float`):
            Concentration, above 0. Sizes are nearly equal at 100 and very unequal at 0.1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sizes and of the shuffle.
        min_examples (`int`, *optional*, defaults to `1`):
            The fewest rows a client may have.

    Returns:
        [`ClientDatasets`]: The clients `client_0`, `client_1`, ..., numbered with equal width.

    Raises:
        `ValueError`: If the dataset is empty, an argument is out of range, or no draw gave each client `min_examples`.
    """
    _check_num_clients(dataset, num_clients)
    # One label for all rows: what is left of the label split is the split of the sizes.
    codes = np.zeros(len(dataset), dtype=np.int64)
    owners = _dirichlet_owners(codes, num_clients, alpha, seed, min_examples)
    return _split(dataset, owners, _client_names(num_clients))


def dirichlet_partition(
    dataset: Dataset, num_clients: int, alpha: float, column: str, seed: int = 0, min_examples: int = 1
) -> ClientDatasets:
    """
    Splits the rows of each label over the clients in proportions drawn from `Dirichlet(alpha)`.

    This is the split of Yurochkin et al. 2019 (arXiv 1905.12022), drawn once per label over the clients, so clients
    differ in size as well as in labels. Hsu et al. 2019 (arXiv 1909.06335) draw once per client over the labels, for
    clients of equal size, so results at one `alpha` cannot be compared between the two. Proportions become whole rows
    by largest remainder. A draw that leaves a client with fewer than `min_examples` rows is drawn again as a whole.

    Args:
        dataset (`Dataset`):
            The rows to split.
        num_clients (`int`):
            Number of clients, from 1 to the number of rows.
        alpha (`float`):
            Concentration, above 0. Clients are nearly alike at 100; at 0.1 most rows of a label go to few clients.
        column (`str`):
            The column that holds the labels.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the proportions and of the choice of rows.
        min_examples (`int`, *optional*, defaults to `1`):
            The fewest rows a client may have.

    Returns:
        [`ClientDatasets`]: The clients `client_0`, `client_1`, ..., numbered with equal width.

    Raises:
        `ValueError`: If the dataset is empty, the column is unknown, nested, or has missing values, an argument is out
            of range, or no draw gave each client `min_examples` rows.
    """
    _check_num_clients(dataset, num_clients)
    _, codes = _encode(_column_values(dataset, column))
    owners = _dirichlet_owners(codes, num_clients, alpha, seed, min_examples)
    return _split(dataset, owners, _client_names(num_clients))


def pathological_partition(
    dataset: Dataset, num_clients: int, classes_per_client: int, column: str, seed: int = 0
) -> ClientDatasets:
    """
    Gives each client the rows of `classes_per_client` labels only.

    This is the "pathological" split of McMahan et al. 2017 (arXiv 1602.05629), made exact: their shards of rows sorted
    by label may straddle two labels, here each client holds exactly `classes_per_client` labels. All labels are held
    by equally many clients (within one), and the clients that hold a label share its rows evenly (within one).

    Args:
        dataset (`Dataset`):
            The rows to split.
        num_clients (`int`):
            Number of clients, from 1 to the number of rows.
        classes_per_client (`int`):
            Number of labels each client holds, from 1 to the number of labels.
        column (`str`):
            The column that holds the labels.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of labels and of rows.

    Returns:
        [`ClientDatasets`]: The clients `client_0`, `client_1`, ..., numbered with equal width.

    Raises:
        `ValueError`: If the dataset is empty, the column is unknown, nested, or has missing values, an argument is out
            of range, the clients cannot hold all labels, or a label has fewer rows than clients that hold it.
    """
    _check_num_clients(dataset, num_clients)
    labels, codes = _encode(_column_values(dataset, column))
    _check_classes_per_client(classes_per_client, num_clients, len(labels), column)

    generator = _generator(seed)
    held = _deal_labels(num_clients, classes_per_client, len(labels), generator)
    num_holders = np.bincount(held.ravel(), minlength=len(labels))
    num_rows = np.bincount(codes)
    if np.any(num_rows < num_holders):
        label = int(np.argmax(num_holders - num_rows))
        raise ValueError(
            f"Class '{labels[label]}' of column '{column}' has {num_rows[label]} rows, but {num_holders[label]} "
            "clients would share it, so a client would hold none of them: lower `num_clients` or "
            "`classes_per_client`, or remove the rare classes from the dataset."
        )

    # The clients that hold label 0, then those that hold label 1, ...
    holders = np.split(np.argsort(held, axis=None, kind="stable") // classes_per_client, np.cumsum(num_holders)[:-1])
    owners = np.empty(len(dataset), dtype=np.int64)
    owners[_shuffled_by_label(codes, generator)] = np.concatenate(
        [
            np.resize(generator.permutation(clients), rows)
            for clients, rows in zip(holders, num_rows.tolist(), strict=True)
        ]
    )
    return _split(dataset, owners, _client_names(num_clients))


def partition_counts(clients: Mapping[str, Dataset], column: str) -> dict[str, dict[str, int]]:
    """
    Counts the rows of each label at each client.

    Args:
        clients (`Mapping[str, Dataset]`):
            The clients by name.
        column (`str`):
            The column that holds the labels.

    Returns:
        `dict[str, dict[str, int]]`: Client to label to number of rows. Labels are strings, in the order of their
        values, and each client lists all labels that occur at any client, with 0 where it has no row.

    Raises:
        `ValueError`: If there is no client, or the column of a client is unknown, nested, or has missing values.
    """
    _check_some_clients(clients)
    for dataset in one_of_each_source(clients).values():
        _check_label_column(dataset, column)
    counters = {name: Counter(_checked(values, column)) for name, values in column_by_client(clients, column)}
    # The type comes first because clients that were not split from one dataset may hold values of different types.
    values = sorted(set().union(*counters.values()), key=lambda value: (type(value).__name__, value))
    counts: dict[str, dict[str, int]] = {}
    for name, counter in counters.items():
        counts[name] = dict.fromkeys(map(str, values), 0)
        for value, rows in counter.items():
            counts[name][str(value)] += rows
    return counts


def partition_summary(clients: Mapping[str, Dataset], column: str | None = None, max_clients: int | None = 50) -> str:
    """
    Describes a federation in a plain text table: one line per client, and a last line for all clients together.

    Args:
        clients (`Mapping[str, Dataset]`):
            The clients by name.
        column (`str`, *optional*):
            The column that holds the labels. With it, the table also has the number of labels of each client, and its
            largest label with that label's share of the client's rows.
        max_clients (`int`, *optional*, defaults to `50`):
            Of more clients only the first so many are shown; all of them if `None`.

    Returns:
        `str`: The table, without a line break at the end.

    Raises:
        `ValueError`: If there is no client, or the column of a client is unknown, nested, or has missing values.
    """
    _check_some_clients(clients)
    sizes = rows_by_client(clients)
    total = sum(sizes.values())
    header = ["client", "examples", "share"]
    rows = [[name, str(size), _percent(size, total)] for name, size in sizes.items()]
    rows.append(["total", str(total), _percent(total, total)])
    if column is not None:
        header += ["labels", "largest label", "its share"]
        counts = list(partition_counts(clients, column).values())
        counts.append({label: sum(count[label] for count in counts) for label in counts[0]})
        for row, count in zip(rows, counts, strict=True):
            # A client without rows has no largest label.
            label = max(count, key=lambda label: count[label]) if any(count.values()) else "-"
            num_labels = sum(value > 0 for value in count.values())
            row += [str(num_labels), label, _percent(count.get(label, 0), sum(count.values()))]
    if max_clients is not None and len(sizes) > max_clients:
        rest = [f"... {len(sizes) - max_clients} more", *[""] * (len(header) - 1)]
        rows = [*rows[:max_clients], rest, rows[-1]]
    return format_table(header, rows, left_columns=("client", "largest label"))


def _dirichlet_owners(codes: np.ndarray, num_clients: int, alpha: float, seed: int, min_examples: int) -> np.ndarray:
    """Returns the client index of each row, the rows of each label split in proportions from `Dirichlet(alpha)`."""
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"`alpha` is {alpha}, but the concentration of a Dirichlet distribution is a finite number above 0: pass "
            "for example 0.1 for very different clients or 100 for similar ones."
        )
    if min_examples < 1:
        raise ValueError(
            f"`min_examples` is {min_examples}, but a client without examples cannot train: pass 1 or more."
        )
    if num_clients * min_examples > len(codes):
        raise ValueError(
            f"{num_clients} clients with at least {min_examples} examples each need {num_clients * min_examples} "
            f"rows, but the dataset has {len(codes)}: lower `num_clients` or `min_examples`."
        )

    generator = _generator(seed)
    num_rows = np.bincount(codes).tolist()
    clients = np.arange(num_clients)
    best = 0
    for _ in range(MAX_DRAWS):
        grouped_owners = np.concatenate(
            [
                np.repeat(clients, _largest_remainder(generator.dirichlet(np.full(num_clients, alpha)), rows))
                for rows in num_rows
            ]
        )
        smallest = int(np.bincount(grouped_owners, minlength=num_clients).min())
        if smallest >= min_examples:
            owners = np.empty(len(codes), dtype=np.int64)
            owners[_shuffled_by_label(codes, generator)] = grouped_owners
            return owners
        best = max(best, smallest)
    raise ValueError(
        f"In {MAX_DRAWS} draws with alpha={alpha}, no split of {len(codes)} rows gave each of the {num_clients} "
        f"clients at least {min_examples} examples; the smallest client of the best draw had {best}. Raise `alpha`, "
        "lower `num_clients` or `min_examples`, or try another `seed`."
    )


def _largest_remainder(proportions: np.ndarray, total: int) -> np.ndarray:
    """Rounds `proportions * total` to whole numbers that sum to `total`, each less than one off."""
    exact = proportions * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _deal_labels(
    num_clients: int, classes_per_client: int, num_labels: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns the labels that each client holds, `(num_clients, classes_per_client)`."""
    held = np.empty((num_clients, classes_per_client), dtype=np.int64)
    num_holders = np.zeros(num_labels, dtype=np.int64)
    for client in range(num_clients):
        # Each client takes the labels with the fewest holders so far, ties broken at random. So the numbers of holders
        # never differ by more than one, and no label is left out.
        held[client] = np.lexsort((generator.random(num_labels), num_holders))[:classes_per_client]
        num_holders[held[client]] += 1
    return held


def _shuffled_by_label(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the row numbers grouped by label, shuffled inside each label."""
    return np.lexsort((generator.permutation(len(codes)), codes))


def _split(dataset: Dataset, owners: np.ndarray, names: Sequence[str]) -> ClientDatasets:
    """Selects the rows of each client, given the client index of each row. A stable sort keeps their order."""
    sizes = np.bincount(owners, minlength=len(names))
    indices = np.split(np.argsort(owners, kind="stable"), np.cumsum(sizes)[:-1])
    return ClientDatasets(dataset, dict(zip(names, indices, strict=True)))


def _encode(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Returns the sorted distinct values, and for each row the position of its value among them."""
    distinct = sorted(set(values))
    position = {value: index for index, value in enumerate(distinct)}
    return distinct, np.array([position[value] for value in values], dtype=np.int64)


def _column_values(dataset: Dataset, column: str) -> Sequence[Any]:
    """Returns the values of a column as Python objects, or refuses a column that cannot hold labels."""
    _check_label_column(dataset, column)
    return _checked(dataset.with_format(None)[column][:], column)


def _check_label_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column '{column}': pass one of its columns, "
            f"{', '.join(sorted(dataset.column_names))}."
        )
    if not isinstance(dataset.features[column], Value | ClassLabel):
        raise ValueError(
            f"Column '{column}' has the nested type {dataset.features[column]}, but a label is a single value: pass a "
            "column of strings, numbers or class labels."
        )


def _checked(values: Sequence[Any], column: str) -> Sequence[Any]:
    # A float that is not a number differs from itself.
    missing = sum(value is None or value != value for value in values)
    if missing:
        raise ValueError(
            f"Column '{column}' has no value in {missing} of {len(values)} rows, so these rows belong to no label: "
            "remove them with `dataset.filter` or fill them in."
        )
    return values


def _check_not_empty(dataset: Dataset) -> None:
    if len(dataset) == 0:
        raise ValueError("The dataset is empty, so there is nothing to split: pass a dataset with at least one row.")


def _check_num_clients(dataset: Dataset, num_clients: int) -> None:
    _check_not_empty(dataset)
    if num_clients < 1:
        raise ValueError(
            f"`num_clients` is {num_clients}, but a federation needs at least one client: pass a number from 1 to the "
            f"number of rows, {len(dataset)}."
        )
    if num_clients > len(dataset):
        raise ValueError(
            f"`num_clients` is {num_clients}, but the dataset has only {len(dataset)} rows, so a client would be "
            f"empty: pass {len(dataset)} or less."
        )


def _check_classes_per_client(classes_per_client: int, num_clients: int, num_labels: int, column: str) -> None:
    if classes_per_client < 1:
        raise ValueError(
            f"`classes_per_client` is {classes_per_client}, but a client needs rows of at least one class: pass a "
            f"number from 1 to the number of classes in '{column}', {num_labels}."
        )
    if classes_per_client > num_labels:
        raise ValueError(
            f"`classes_per_client` is {classes_per_client}, but column '{column}' has only {num_labels} distinct "
            f"values: pass {num_labels} or less."
        )
    if num_clients * classes_per_client < num_labels:
        raise ValueError(
            f"{num_clients} clients with {classes_per_client} classes each hold at most "
            f"{num_clients * classes_per_client} of the {num_labels} classes in column '{column}', so rows would be "
            "left without a client: raise `num_clients` or `classes_per_client`."
        )


def _check_some_clients(clients: Mapping[str, Dataset]) -> None:
    if not clients:
        raise ValueError("No clients were given, so there is nothing to describe: pass at least one client.")


def _client_names(num_clients: int) -> list[str]:
    """Returns `client_0`, `client_1`, ..., zero-padded to equal width so that sorting them keeps their order."""
    width = len(str(num_clients - 1))
    return [f"client_{index:0{width}d}" for index in range(num_clients)]


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"`seed` is {seed}, but a seed cannot be negative: pass 0 or more.")
    return np.random.default_rng(np.random.SeedSequence(seed))


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
