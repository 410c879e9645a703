# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a client carry a loss, for means that weight clients by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from ..state.client_errors import ClientError
from .put_back import remember_random_state, restoring


__all__ = ["IGNORED_LABEL", "count_tokens"]

IGNORED_LABEL = -100


def count_tokens(
    dataset: Dataset, collate: Callable[[list[Any]], dict[str, Any]], batch_size: int, shifts_labels: bool, seed: int
) -> int:
    """
    Labels that are not ignored, as the collator makes them and `Trainer` counts them.

    Args:
        dataset (`Dataset`):
            Prepared data, with the columns that the collator is to see.
        collate (`Callable`):
            The collator. What it draws is drawn from `seed`, and no generator is moved by it.
        batch_size (`int`):
            Rows to collate at once.
        shifts_labels (`bool`):
            Whether the loss compares a token with the label of the next, so that the first label counts for nothing.
        seed (`int`):
            Seed of the collator.

    Raises:
        ClientError: If the batches have no labels, or none of them counts.
    """
    total = 0
    with restoring(remember_random_state()):
        set_seed(seed)
        for first in range(0, len(dataset), batch_size):
            batch = collate([dataset[row] for row in range(first, min(first + batch_size, len(dataset)))])
            labels = batch.get("shift_labels", batch.get("labels"))
            if not isinstance(labels, torch.Tensor):
                raise ClientError(
                    "its batches have no `labels`, so there are no tokens to weight it by. Use "
                    "`weights='examples'` or 'uniform'"
                )
            if shifts_labels and "shift_labels" not in batch:
                labels = labels[..., 1:]
            total += int((labels != IGNORED_LABEL).sum())
    if total == 0:
        raise ClientError("none of its tokens carries a loss, so it has no weight in a mean by tokens")
    return total
