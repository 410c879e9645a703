# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which state of a model travels."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from ..engines import Engine
from .adapter import LiveAdapter
from .model import LiveModel
from .prompt import LivePrompt
from .state import LiveState


__all__ = ["live_state"]


def live_state(model: PeftModel | PreTrainedModel, engine: Engine | None = None) -> LiveState:
    """
    The state of `model` that travels: its active adapter, its prompt, or of a plain model what it trains.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The model.
        engine ([`Engine`], *optional*):
            What runs the model; one process if not given.
    """
    live: LiveState
    if not isinstance(model, PeftModel):
        live = LiveModel(model)
    else:
        live = LivePrompt(model) if model.active_peft_config.is_prompt_learning else LiveAdapter(model)
    if engine is not None:
        live.engine = engine
    return live
