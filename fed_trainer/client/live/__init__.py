# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which state of a model travels."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from .adapter import LiveAdapter
from .model import LiveModel
from .prompt import LivePrompt
from .state import LiveState


__all__ = ["live_state"]


def live_state(model: PeftModel | PreTrainedModel) -> LiveState:
    """The state of `model` that travels: its active adapter, its prompt, or of a plain model what it trains."""
    if not isinstance(model, PeftModel):
        return LiveModel(model)
    return LivePrompt(model) if model.active_peft_config.is_prompt_learning else LiveAdapter(model)
