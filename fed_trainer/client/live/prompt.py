# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The travelling state of prompt learning: the parameters of the prompt encoder, not the prompts that PEFT saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict

from ...state.adapter_state import AdapterState
from .state import LiveState


__all__ = ["LivePrompt"]


_PREFIX = "prompt_encoder."
_PROMPTS = "prompt_embeddings"
# in a file of PEFT, and in the encoder
_NAMES = {
    _PROMPTS: "embedding.weight",
    "prefix_task_cols": "prefix_task_cols",
    "prefix_task_rows": "prefix_task_rows",
}
# these put the prompt into the key-value cache, the others before the embeddings
IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class LivePrompt(LiveState):
    """
    The active prompt of a model (prompt tuning, prefix tuning, p-tuning) as an [`AdapterState`], read and
    written in place.

    Its tensors are the parameters of the prompt encoder, as `prompt_encoder.<name>`, and those of modules that are
    trained along, as PEFT saves them. PEFT itself saves the prompts that the encoder computes. They are enough for
    inference, but the network that made them (the projection of prefix tuning, the MLP or LSTM of p-tuning) cannot
    be recovered from them.

    Args:
        model ([`~peft.PeftModel`]):
            A model whose active adapter is of a prompt learning type.
    """

    saved_file_is_state = False

    def __init__(self, model: PeftModel) -> None:
        name = model.active_adapters[0]
        self._encoder = model.get_submodule("prompt_encoder")
        self._type = PeftType(model.peft_config[name].peft_type).value
        tensors: dict[str, torch.Tensor] = {
            f"{_PREFIX}{key}": tensor for key, tensor in model.prompt_encoder[name].named_parameters()
        }
        encoder = {id(tensor) for tensor in tensors.values()}
        parameters = {id(parameter) for parameter in model.parameters()}
        owners = {
            tensor.data_ptr(): tensor
            for tensor in [*model.buffers(), *model.parameters()]
            if id(tensor) not in encoder
        }
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            if tensor.data_ptr() in owners:  # of `modules_to_save`; the prompts are computed
                tensors[key] = owners[tensor.data_ptr()]
        self._tensors = dict(sorted(tensors.items()))
        self._frozen = {
            key for key, tensor in self._tensors.items() if id(tensor) in parameters and not tensor.requires_grad
        }

    @contextmanager
    def publishable(self) -> Iterator[None]:
        was_training = self._encoder.training
        self._encoder.eval()  # PEFT saves what it computes, which must be without dropout
        try:
            yield
        finally:
            self._encoder.train(was_training)

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        """Without the prompts, which are computed; `lacking` looks for them."""
        return {key: shape for key, shape in super()._saved_layout().items() if not key.startswith(_PREFIX)}

    def lacking(self, saved: Mapping[str, tuple[int, ...]]) -> str | None:
        if 0 in saved.get(_PROMPTS, (0,)):
            return f"{_PROMPTS} is missing or empty"
        return super().lacking(saved)

    def from_saved(self, saved: AdapterState, source: str) -> AdapterState:
        state = {f"{_PREFIX}{_NAMES[key]}" if key in _NAMES else key: tensor for key, tensor in saved.items()}
        lacking = [key for key in self._tensors if key.startswith(_PREFIX) and key not in state]
        if lacking:
            raise ValueError(
                f"{source} is of type {self._type}. Its file holds the prompts that were computed but not what "
                f"computes them (the first: {lacking[0]}), so it can be used but not trained further. Resume its "
                "run from a checkpoint, or start without `initial_adapter`."
            )
        return state
