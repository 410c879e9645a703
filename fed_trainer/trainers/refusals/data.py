# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset

from ...config import FederationArguments, joins_examples, local_batch
from ...data.client_datasets import one_of_each_source, rows_by_client
from ...data.held_out import advice_for, column_names


__all__ = [
    "check_clients",
    "check_model_columns",
    "check_preference_columns",
    "check_same_columns",
    "check_sft_columns",
    "held_out_sets",
]


def check_clients(clients: Any, args: FederationArguments) -> None:
    """
    Refuse clients that no local round could train.

    Raises:
        ValueError: Naming the client, if it is empty, smaller than one local batch, of unknown size or without
            `args.label_column`.
    """
    if isinstance(clients, DatasetDict):
        raise ValueError(
            f"`train_dataset` is a `DatasetDict` with the splits {list(clients)}, which would each become a "
            "client. Make clients of one split with a function of `fed_trainer.data.partition`, or pass "
            "`dict(...)` if its entries are clients."
        )
    if not isinstance(clients, Mapping) or not clients:
        raise ValueError(
            f"`train_dataset` should be a dictionary from client names to datasets but is a {type(clients).__name__}"
            f"{' without entries' if isinstance(clients, Mapping) else ''}. The functions of "
            "`fed_trainer.data.partition` make one from a single dataset."
        )
    _check_names(clients)
    for name, dataset in one_of_each_source(clients).items():
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The data of client {name!r} should be a `datasets.Dataset` but is a {type(dataset).__name__}. "
                f"Updates are weighted by the number of examples, so it has to be known. {advice_for(dataset)}"
            )
        if args.label_column is not None and args.label_column not in dataset.column_names:
            raise ValueError(
                f"`label_column` is {args.label_column!r}, but client {name!r} has the columns {dataset.column_names}."
            )
    batch = local_batch(args)
    for name, num_rows in rows_by_client(clients).items():
        if num_rows == 0:
            raise ValueError(
                f"Client {name!r} has no examples, so it has nothing to train on. Leave it out, or split with a "
                "larger `min_examples`."
            )
        if num_rows < batch and not joins_examples(args):
            raise ValueError(
                f"Client {name!r} has {num_rows} examples, fewer than one local batch of {batch} "
                f"(per_device_train_batch_size={args.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} x {args.world_size} processes), so its steps would not be the "
                "steps that were configured. Lower the batch size, leave the client out, or split with a larger "
                "`min_examples`."
            )


def _check_names(names: Iterable[Any]) -> None:
    """
    Refuse names that cannot stand in files and logs, or be told apart there.

    Raises:
        ValueError: Naming the client.
    """
    alike: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"The client {name!r} is named by a {type(name).__name__}, but names of clients are strings: they "
                f"stand in files. Use {str(name)!r}."
            )
        reason = None
        if not name.strip():
            reason = "is empty"
        elif any("\ud800" <= character <= "\udfff" for character in name):
            reason = "has half of a surrogate pair, which UTF-8 cannot hold"
        elif any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
            reason = "has a control character or a line break"
        if reason is not None:
            raise ValueError(
                f"The name of client {name!r} {reason}, but it stands in files and logs. Give the client another name."
            )
        known = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if known != name:
            raise ValueError(
                f"The clients {known!r} and {name!r} differ only in upper and lower case or in how letters are "
                "composed, which some file systems do not tell apart. Give one of them another name."
            )


def check_sft_columns(clients: Mapping[str, Dataset], text_field: str, kind: str = "Client") -> None:
    """
    Refuse clients whose columns are none of the formats of [`~trl.SFTTrainer`], or differ from client to client.

    Raises:
        ValueError: Naming the client and its columns.
    """
    formats = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"}, {text_field})
    complaint = (
        "none of the formats of `SFTTrainer`: 'prompt' and 'completion', 'messages', or the text column "
        f"{text_field!r}. Rename its columns, or set `dataset_text_field`."
    )
    _check_columns(clients, lambda columns: any(needed <= columns for needed in formats), complaint, kind)


def check_preference_columns(
    clients: Mapping[str, Dataset], formats: Sequence[set[str]], trainer: str, kind: str = "Client"
) -> None:
    """
    Refuse clients whose columns are none of TRL's formats of preferences, or differ from client to client.

    Args:
        clients (`Mapping[str, Dataset]`):
            Data by client.
        formats (`Sequence[set[str]]`):
            The columns that are needed, by format.
        trainer (`str`):
            The trainer that takes them, for the message.
        kind (`str`, *optional*, defaults to `"Client"`):
            What the names are names of.

    Raises:
        ValueError: Naming the client and its columns.
    """
    complaint = (
        f"but `{trainer}` needs pairs of answers: 'chosen' and 'rejected', and a 'prompt' unless both begin with "
        "it. Rename its columns; of ratings ('completion' and 'label') pairs have to be made first."
    )
    _check_columns(clients, lambda columns: any(needed <= columns for needed in formats), complaint, kind)


def check_model_columns(clients: Mapping[str, Dataset], inputs: set[str], model: str, kind: str = "Client") -> None:
    """
    Refuse clients of which [`~transformers.Trainer`] would pass nothing but labels to the model, or that differ in
    columns.

    Args:
        clients (`Mapping[str, Dataset]`):
            Data by client.
        inputs (`set[str]`):
            Names of the arguments of the model's `forward`.
        model (`str`):
            Class of the model, for the message.
        kind (`str`, *optional*, defaults to `"Client"`):
            What the names are names of.

    Raises:
        ValueError: Naming the client and its columns.
    """
    complaint = (
        f"none of which is an input of {model}. Tokenise (or process) first, as for `Trainer`: `dataset.map(lambda "
        "rows: tokenizer(rows['text'], truncation=True), batched=True)`. If your collator does it, set "
        "`remove_unused_columns=False`."
    )
    _check_columns(clients, lambda columns: bool((inputs - {"labels"}) & columns), complaint, kind)


def check_same_columns(clients: Mapping[str, Dataset]) -> None:
    """
    Refuse clients whose columns differ from client to client.

    Raises:
        ValueError: Naming two of them and their columns.
    """
    clients = one_of_each_source(clients)
    if not clients:  # a coordinator has none
        return
    first, reference = next((name, column_names(dataset)) for name, dataset in clients.items())
    for name, dataset in clients.items():
        columns = column_names(dataset)
        if columns != reference:
            raise ValueError(
                f"Client {name!r} has the columns {sorted(columns)}, but client {first!r} has {sorted(reference)}: "
                "they would be trained on different tasks. Give all clients the same columns."
            )


def held_out_sets(eval_dataset: Any) -> dict[str, Dataset]:
    """Held-out sets by name whose columns have to be looked at; empty if there is none."""
    if eval_dataset is None:
        return {}
    sets = one_of_each_source(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    return {name: dataset for name, dataset in sets.items() if isinstance(dataset, (Dataset, IterableDataset))}


def _check_columns(
    clients: Mapping[str, Dataset], are_usable: Callable[[set[str]], bool], complaint: str, kind: str
) -> None:
    clients = one_of_each_source(clients)
    for name, dataset in clients.items():
        columns = column_names(dataset)
        if not are_usable(columns):
            raise ValueError(f"{kind} {name!r} has the columns {sorted(columns)}, {complaint}")
    check_same_columns(clients)
