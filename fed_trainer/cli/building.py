# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A trainer for a run: that of the coordinator, or that of a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from ..config import FederationArguments
from ..trainers.mixin import FederatedMixin
from .data import DataFields, prepared_rows
from .run_file import Part


__all__ = ["build_trainer"]


def build_trainer(
    part: Part,
    model: str,
    args: FederationArguments,
    peft_config: PeftConfig | None,
    fields: DataFields,
    num_labels: int | None,
    rows: Mapping[str, Dataset] | None,
    held_out: Dataset | Mapping[str, Dataset] | None,
    trust_remote_code: bool = False,
) -> FederatedMixin:
    """
    The trainer of a run.

    Args:
        part ([`Part`]):
            Its class and that of its config.
        model (`str`):
            Base model, a Hub id or a folder.
        args ([`FederationArguments`]):
            The settings.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train.
        fields ([`DataFields`]):
            How rows become examples.
        num_labels (`int`, *optional*):
            Of a classifier.
        rows (`Mapping[str, Dataset]`, *optional*):
            Training data by client; none at a coordinator.
        held_out (`Dataset` or `Mapping[str, Dataset]`, *optional*):
            Rows to evaluate on.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the base model may run.

    Raises:
        ValueError: For rows without the columns that are needed, and all that the trainer raises.
    """
    tokenizer = None
    if fields.text_column is not None:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)

    def prepared(rows: Dataset, what: str) -> Dataset:
        return prepared_rows(rows, fields, tokenizer, getattr(tokenizer, "model_max_length", None), what)

    train = None if rows is None else {name: prepared(each, f"client {name!r}") for name, each in rows.items()}
    evaluated: Any = held_out
    if isinstance(held_out, Mapping):
        evaluated = {name: prepared(each, f"the held-out data of {name!r}") for name, each in held_out.items()}
    elif held_out is not None:
        evaluated = prepared(held_out, "the held-out data")
    loaded: Any = model
    kwargs: dict[str, Any] = {}
    if tokenizer is not None:
        set_seed(args.seed)  # the head of a classifier is drawn at random
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=num_labels, trust_remote_code=trust_remote_code
        )
        kwargs["processing_class"] = tokenizer
    return part.trainer(loaded, args, train, evaluated, peft_config, **kwargs)
