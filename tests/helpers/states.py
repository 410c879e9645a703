# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapter states of random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fed_trainer.state.adapter_state import AdapterState


def random_state(
    shapes: Mapping[str, tuple[int, ...]], seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: size * torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
