# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The travelling state of a model without an adapter: every parameter that is trained, all of them or some."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from peft_scl.foreign_files import read_json, read_shapes

from ...output.saved_files import MODEL_WEIGHTS
from ...state.adapter_state import AdapterState
from .state import LiveState


__all__ = ["LiveModel", "load_model"]


class LiveModel(LiveState):
    """
    What a plain model trains as an [`AdapterState`], read and written in place like a [`LiveAdapter`].

    The parameters that require gradients travel, and the buffers that training changes (running statistics). Full
    fine-tuning trains all parameters, BitFit the biases; whoever makes the model decides by `requires_grad`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model without adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        saved = model.state_dict(keep_vars=True)
        first_name = {id(tensor): key for key, tensor in reversed(saved.items())}
        # a tied parameter has several names and travels once
        self._tensors = {key: tensor for key, tensor in saved.items() if first_name[id(tensor)] == key}
        self._unsaved = set(model._keys_to_ignore_on_save or ())
        parameters = {id(parameter) for parameter in model.parameters()}
        self._frozen = {
            key
            for key, tensor in self._tensors.items()
            if not (tensor.requires_grad if id(tensor) in parameters else tensor.is_floating_point())
        }

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        unsaved = self._unsaved & self._frozen
        return {key: shape for key, shape in super()._saved_layout().items() if key not in unsaved}

    def lacking(self, saved: Mapping[str, tuple[int, ...]]) -> str | None:
        # by number: transformers saves some models under other names, and joins or splits their tensors
        needed, found = (sum(map(math.prod, layout.values())) for layout in (self._saved_layout(), saved))
        return f"it holds {found:,} of {needed:,} values" if found < needed else None


def load_model(folder: str | os.PathLike, model: PreTrainedModel) -> AdapterState:
    """
    The tensors of a model of the class of `model` saved by `save_pretrained`, as `LiveModel.load` takes them.

    It is loaded as a model, since the names in the file need not be those in memory, in the widest dtype that
    `model` holds: a float32 head on a bfloat16 body must not be rounded. Only safetensors are read.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        read_shapes(path)
    for path in (Path(folder, name) for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, f"{MODEL_WEIGHTS}.index.json")):
        if path.exists():
            read_json(path)
    dtypes = (tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point())
    loaded: Any = type(model).from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, dtype=functools.reduce(torch.promote_types, dtypes)
    )
    saved, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"The model in {str(folder)!r} does not fit: it lacks {len(info['missing_keys'])} tensors of "
            f"{type(model).__name__} and {len(info['mismatched_keys'])} have another shape. It is not the model of "
            "this run."
        )
    return LiveModel(saved).read(include_frozen=True)
