# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The travelling state of an adapter: its tensors as PEFT saves them."""

from __future__ import annotations

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper

from peft_scl import FederaConfig, FederaLayer, federa_state_dict
from peft_scl.federa.state import stacked_shapes, unstack_start
from peft_scl.foreign_files import check_shapes

from ...state.adapter_state import AdapterState, check_plain, check_same_layout
from .state import LiveState


__all__ = ["LiveAdapter"]

_REFUSED = {
    "ADALORA": "it moves ranks between layers by statistics that it keeps outside the adapter and that would go on "
    "from client to client. Use LORA.",
}
_STATEFUL_FIELDS = ("velora_config", "monteclora_config")  # of a `LoraConfig`
_ALTERNATIVES = {"VBLORA": "Set `save_only_topk_weights=False`."}


class LiveAdapter(LiveState):
    """
    The active adapter of a model as an [`AdapterState`], read and written in place.

    Args:
        model ([`~peft.PeftModel`]):
            A model with exactly one active adapter.

    Raises:
        ValueError: If several adapters are active, a saved tensor is not a parameter or buffer of the model, or the
            type keeps what it learns elsewhere.
    """

    def __init__(self, model: PeftModel) -> None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"The adapters {active} are active, but a federation trains one adapter. Call `set_adapter` with "
                "one name."
            )
        kind = PeftType(model.peft_config[active[0]].peft_type).value
        if kind in _REFUSED:
            raise ValueError(f"An adapter of type {kind} cannot be federated: {_REFUSED[kind]}")
        for field in _STATEFUL_FIELDS:
            if getattr(model.peft_config[active[0]], field, None) is not None:
                raise ValueError(
                    f"`{field}` keeps what it has seen or drawn in buffers that it replaces while it trains, so "
                    "they would go on from client to client. Leave it out."
                )
        owners = {tensor.data_ptr(): tensor for tensor in [*model.buffers(), *model.parameters()]}
        self._model, self._name = model, active[0]
        self._is_federa = isinstance(model.peft_config[active[0]], FederaConfig)
        # PEFT saves FeDeRA as a plain LoRA of twice the rank, which is not what is trained
        state_dict = federa_state_dict if self._is_federa else get_peft_model_state_dict
        saved = state_dict(model, adapter_name=active[0])
        self._tensors = {}
        for key, tensor in sorted(saved.items()):
            if tensor.numel() == 0 or tensor.is_meta:
                raise ValueError(
                    f"The adapter tensor {key} is empty or not held by this process, as in a partitioned (ZeRO-3, "
                    "FSDP) or meta-device model, so it cannot be federated. Load the model unpartitioned."
                )
            if tensor.data_ptr() not in owners:
                raise ValueError(
                    f"The adapter tensor {key} is no parameter or buffer of the model: {kind} makes it when it is "
                    "saved, so what a client sends could not be written back. "
                    f"{_ALTERNATIVES.get(kind, 'Use another type, such as LORA.')}"
                )
            owner = owners[tensor.data_ptr()]
            if owner.shape != tensor.shape:
                raise ValueError(
                    f"The adapter tensor {key} is the memory of a parameter of the shape {tuple(owner.shape)}, "
                    f"seen as {tuple(tensor.shape)}: two layers share it (`ensure_weight_tying=True`), and it "
                    "would be averaged twice. Set `ensure_weight_tying=False`, or target one of the layers."
                )
            self._tensors[key] = owner
        # What no client trains is the same everywhere and does not travel: frozen parameters, and buffers, which hold
        # what a method starts from or projects with. Only those of `modules_to_save`, such as running statistics,
        # change.
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        trained |= {
            id(b) for module in model.modules() if isinstance(module, ModulesToSaveWrapper) for b in module.buffers()
        }
        self._frozen = set()
        for key, owner in self._tensors.items():
            if id(owner) in trained:
                trained.remove(id(owner))  # one that layers share is saved under several names and travels once
            else:
                self._frozen.add(key)

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        layout = super()._saved_layout()
        return stacked_shapes(layout) if self._is_federa else layout

    def saved_shapes(self) -> dict[str, tuple[int, ...]] | None:
        return self._saved_layout()

    def saved(self) -> AdapterState:
        """The adapter as PEFT saves it."""
        if not self._is_federa:
            return super().saved()
        stacked = get_peft_model_state_dict(self._model, adapter_name=self._name)
        return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stacked.items()}

    def load(self, saved: AdapterState, source: str) -> None:
        """Write an adapter as PEFT saves it, whole, into the model."""
        if not self._is_federa:
            super().load(saved, source)
            return
        check_plain(saved, source)
        check_shapes({key: tuple(tensor.shape) for key, tensor in saved.items()}, self._saved_layout(), source)
        state, here = unstack_start(saved), self.read(include_frozen=True)
        check_same_layout(state, here, source)
        if not all(torch.equal(state[key].to(here[key].dtype), here[key]) for key in self._frozen):
            self._load_start(state)
        self.write(state)

    def _load_start(self, state: AdapterState) -> None:
        """Of FeDeRA: another start moves the base model with it."""
        for name, layer in self._model.named_modules():
            if isinstance(layer, FederaLayer) and self._name in layer.keep_base:
                start_A, start_B = (state[f"{name}.lora_start_{letter}"] for letter in "AB")
                layer.load_start(self._name, start_A, start_B)
