# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Data of one client that has no name yet, or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset


__all__ = ["UNNAMED", "unnamed"]

UNNAMED = "this site"


def unnamed(train_dataset: Dataset | None, eval_dataset: Any) -> tuple[dict[str, Dataset], Any]:
    """
    The data of a trainer that knows no clients.

    Args:
        train_dataset (`Dataset`, *optional*):
            That of the one client that it is going to be; none if it is going to coordinate.
        eval_dataset (`Any`):
            Held-out data, as it was given.

    Returns:
        `tuple[dict[str, Dataset], Any]`: both by client. Held-out data of a coordinator stays as it is.
    """
    if train_dataset is None:
        return {}, eval_dataset
    is_of_client = eval_dataset is not None and not isinstance(eval_dataset, Mapping)
    return {UNNAMED: train_dataset}, {UNNAMED: eval_dataset} if is_of_client else eval_dataset
