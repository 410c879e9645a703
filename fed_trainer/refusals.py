# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model must not have: parts that would leak from one client to the next."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adapter_state import LiveState


__all__ = ["refuse_what_would_leak"]


def refuse_what_would_leak(model: nn.Module, live: LiveState) -> None:
    """
    Refuse a model of which training changes what `live` does not write and read.

    Raises:
        ValueError: If nothing is trainable, or something is that does not travel; the message names it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"No parameter of the `{type(model).__name__}` that was given requires gradients. Give a `peft_config`, "
                "or set `requires_grad` where it is to be trained."
            )
        raise ValueError(
            "Nothing is trainable in the `PeftModel` that was given. `PeftModel.from_pretrained` freezes the adapter: pass "
            "`is_trainable=True` to it, or leave the loading to `initial_adapter`."
        )
    tracked = live.tensor_ids
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in tracked]
    if stray:
        raise ValueError(
            f"{len(stray)} parameters are trainable but not part of the adapter (the first: {stray[0]}): they would "
            "leak from one client to the next. Freeze them, or name their modules in `modules_to_save`."
        )
    statistics = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and id(module.running_mean) not in tracked
        and "original_module" not in name.split(".")
    ]
    if statistics:
        raise ValueError(
            f"Training updates the running statistics of {statistics[0]}, which is not part of the adapter: they would leak "
            "from one client to the next, and would not be saved. Name it in `modules_to_save`."
        )
    cumulative = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and id(module.running_mean) in tracked and module.momentum is None
    ]
    if cumulative:
        raise ValueError(
            f"The running statistics of {cumulative[0]} are a cumulative average, since it has `momentum=None`: its weights "
            "follow from the number of batches seen, which a mean over clients has no meaning for. Set a momentum, such "
            "as 0.1."
        )
