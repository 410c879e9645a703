# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads what runs have written, and compares states bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def weights_in(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of the one adapter or the one whole model in a folder."""
    (path,) = Path(folder).glob("*model.safetensors")
    return load_file(path)


def assert_same(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """As [`same`], and says which tensor differs."""
    assert ours.keys() == expected.keys() and len(ours) > 0
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key
