# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows of a site: files of its own, or a dataset of the Hub, in the columns that the run needs."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


__all__ = ["DataFields", "load_rows", "prepared_rows"]

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class DataFields:
    """
    How rows become examples, the same at all sites.

    Args:
        prompt_template (`str`, *optional*):
            Prompt made of the columns of a row, as in `"Question: {question}\\nAnswer: "`. Needs `completion_column`.
        completion_column (`str`, *optional*):
            Column with the text to learn.
        text_column (`str`, *optional*):
            Of a classifier: column with the text. Its labels are in `label`, from 0.
    """

    prompt_template: str | None = None
    completion_column: str | None = None
    text_column: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt_template is None) != (self.completion_column is None):
            raise ValueError(
                f"`prompt_template` is {self.prompt_template!r} and `completion_column` is "
                f"{self.completion_column!r}: give both to make prompts and completions from columns, or neither to "
                "use the rows as they are."
            )
        try:
            _ = self.columns
        except ValueError as error:
            raise ValueError(
                f"`prompt_template` is {self.prompt_template!r}, which is no template ({error}). Write columns as "
                "`{column}`, and braces twice."
            ) from error

    @property
    def columns(self) -> list[str]:
        """The columns that rows need to have."""
        columns = [name for _, name, _, _ in string.Formatter().parse(self.prompt_template or "") if name]
        if self.completion_column is not None:
            columns.append(self.completion_column)
        if self.text_column is not None:
            columns += [self.text_column, "label"]
        return columns


def load_rows(sources: Sequence[str]) -> Dataset:
    """
    The rows of files, of a folder of `Dataset.save_to_disk`, or of a dataset of the Hub.

    Args:
        sources (`Sequence[str]`):
            Files of one kind (`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt`), one folder, or one id of the Hub, to
            which `:split` may be added (`train` if not).

    Raises:
        ValueError: If there is nothing, or something else.
    """
    if not sources:
        raise ValueError("No data was named. Give files, a folder, or the id of a dataset.")
    paths = [Path(source) for source in sources]
    if len(paths) == 1 and paths[0].is_dir():
        return _only_split(load_from_disk(str(paths[0])), sources[0])
    if any(path.suffix in READERS for path in paths):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"There is no file {missing[0]!r}.")
        kinds = {READERS.get(path.suffix) for path in paths}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(
                f"The data {list(sources)} is of several kinds, or none that is known. Give files of one kind: "
                f"{sorted(READERS)}."
            )
        try:
            rows = load_dataset(str(kinds.pop()), data_files=[str(path) for path in paths], split="train")
        except Exception as error:  # whatever a damaged file leads to
            raise ValueError(f"The data {list(sources)} cannot be read ({type(error).__name__}: {error}).") from error
        return _only_split(rows, sources[0])
    if len(sources) != 1:
        raise ValueError(f"The data {list(sources)} should be files of one kind ({sorted(READERS)}), or one id.")
    name, _, split = sources[0].partition(":")
    try:
        return _only_split(load_dataset(name, split=split or "train"), sources[0])
    except Exception as error:
        raise ValueError(
            f"{sources[0]!r} is no file here, and no dataset of the Hub that can be loaded ({type(error).__name__}: "
            f"{error}). Files end in {sorted(READERS)}."
        ) from error


def _only_split(rows: Any, source: str) -> Dataset:
    if isinstance(rows, DatasetDict):
        raise ValueError(f"{source!r} has the splits {list(rows)}. Name one file, or add the split: '<id>:<split>'.")
    if not isinstance(rows, Dataset):
        raise ValueError(f"{source!r} is a {type(rows).__name__}, but should be rows of a known number.")
    return rows


def prepared_rows(rows: Dataset, fields: DataFields, tokenizer: Any, max_length: int | None, what: str) -> Dataset:
    """
    Rows as the trainer takes them.

    Args:
        rows (`Dataset`):
            The rows.
        fields ([`DataFields`]):
            What is made of them.
        tokenizer (`Any`):
            Of a classifier, which is given token ids.
        max_length (`int`, *optional*):
            To which its texts are cut.
        what (`str`):
            Whose rows they are, for the message.

    Raises:
        ValueError: If they lack a column.
    """
    missing = [column for column in fields.columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"The run needs the column {missing[0]!r}, but {what} has the columns {rows.column_names}. Rename a "
            "column of the file."
        )
    if fields.text_column is not None:
        kept = rows.select_columns([fields.text_column, "label"])
        column = fields.text_column
        return kept.map(
            lambda batch: tokenizer(batch[column], truncation=True, max_length=max_length),
            batched=True,
            remove_columns=[column],
        )
    if fields.prompt_template is None or fields.completion_column is None:
        return rows
    template, completion = fields.prompt_template, fields.completion_column

    def to_pair(row: dict[str, Any]) -> dict[str, str]:
        prompt = template.format(**row)
        # tokenizers attach white space to the word behind it, so it goes to the completion
        space = prompt[len(prompt.rstrip()) :]
        return {"prompt": prompt.rstrip(), "completion": space + str(row[completion])}

    filled = rows.filter(lambda row: bool(row[completion]) and bool(str(row[completion]).strip()))
    return filled.map(to_pair, remove_columns=rows.column_names)
