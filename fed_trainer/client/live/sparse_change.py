# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stage 1 of SLoRA on the live model: a sparse change of the target weights is trained, beside a LoRA that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ...methods.aggregation.slora import densify, lora_start, shared_mask
from ...state.factors import FactorPair
from .adapter import LiveAdapter


__all__ = ["LiveSparseChange", "SparseChange", "check_sparse_change"]


class SparseChange(nn.Module, BaseTunerLayer):
    """
    A linear layer with the weight `W + change`, where `change` is zero but for trainable `values` at given places.

    It stands between a LoRA layer and its base layer, as tuner layers nest in PEFT: `get_base_layer` of either is the
    pretrained layer, which is not touched, and `disable_adapter` turns the change off. Each call makes the changed
    weight anew and drops it after the backward pass (with gradient checkpointing, after the block). The optimiser
    sees `values` only: neither its moments nor weight decay reach another entry, and weight decay pulls towards the
    pretrained weight.

    Args:
        base_layer (`nn.Module`):
            An `nn.Linear` or `Conv1D`.
        adapter_name (`str`):
            Name of the adapter it belongs to.
        indices (`torch.Tensor`):
            `(count,)` distinct places in the flat weight, as stored.
    """

    adapter_layer_names = ("sparse_values",)
    indices: torch.Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, indices: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        device = self.weight.device
        self.register_buffer("indices", indices.to(device), persistent=False)
        self.sparse_values = nn.ParameterDict({adapter_name: torch.zeros(len(indices), device=device)})
        self.set_adapter(adapter_name)

    @property
    def trained(self) -> nn.Parameter:
        """`(count,)` values of the change, in float32."""
        return self.sparse_values[self.active_adapters[0]]

    def dense(self) -> torch.Tensor:
        """The change in the shape of the weight, as stored, in float32."""
        return densify(self.trained.detach(), self.indices, self.weight.shape)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        flat = self.weight.flatten()
        # Summed in float32 and then rounded: what a base in bfloat16 does not show yet still adds up in the values.
        entries = (flat[self.indices] + self.trained).to(flat.dtype)
        weight = flat.index_copy(0, self.indices, entries).view(self.weight.shape)
        return functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)


class LiveSparseChange(LiveAdapter):
    """
    The state of a model in stage 1 of SLoRA (https://huggingface.co/papers/2308.06522), read and written in place.

    While it lives in the model, the LoRA layers have no active adapter, and their base layers have a sparse change.
    What travels is the values of the changes (`base_model.model.<module>.sparse_values`) and whatever the adapter
    trains beside its factors, such as the head of a classifier, which both stages train. The factors are saved
    along, but do not travel.

    Args:
        model ([`~peft.PeftModel`]):
            A model with a LoRA that has not been trained.
        pairs (`Sequence[FactorPair]`):
            [`factor_pairs`] of the model.
        density (`float`):
            Share of each target weight that is trained.
        seed (`int`):
            Seed of the places, the same on all machines.

    Raises:
        ValueError: If the adapter is not a LoRA with `B = 0` on linear layers that can be changed.
    """

    def __init__(self, model: PeftModel, pairs: Sequence[FactorPair], density: float, seed: int) -> None:
        check_sparse_change(model, pairs)
        super().__init__(model)
        self._pairs = list(pairs)
        self._layers: dict[str, Any] = {}  # LoRA layers
        self._changes: dict[str, SparseChange] = {}
        base: Any = model.get_base_model()
        for pair in self._pairs:
            layer = base.get_submodule(pair.module)
            self._layers[pair.module] = layer
        for module, layer in self._layers.items():
            indices = shared_mask(module, layer.weight.shape, density, seed)
            self._changes[module] = SparseChange(layer.base_layer, self._name, indices)
        self._frozen |= self._factor_keys
        values = {
            f"base_model.model.{module}.sparse_values": change.trained for module, change in self._changes.items()
        }
        self._tensors = dict(sorted((self._tensors | values).items()))
        self._requires_grad = [
            (parameter, parameter.requires_grad) for layer in self._layers.values() for parameter in layer.parameters()
        ]
        self._attach()

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """
        Begin stage 2: LoRA starts from the best approximation of the change ([`lora_start`]), the changes leave the
        model.

        Modules, parameters and base weights are those from before stage 1, with the factors written in place. The
        optimiser has to be made anew.

        Returns:
            `dict[str, float]`: The relative error of the approximation by module.
        """
        errors = {}
        for pair in self._pairs:
            A, B = self._tensors[pair.key_A], self._tensors[pair.key_B]
            change = self._changes[pair.module].dense()
            start, errors[pair.module] = lora_start(
                change.T if pair.transposed else change, len(A), pair.scaling, A.to(change.device)
            )
            A.copy_(start.right)
            B.copy_(start.left)
        self._detach()
        return errors

    def abandon(self) -> None:
        """Take the changes out of the model without a stage 2: the LoRA is as it was before stage 1."""
        self._detach()

    saved_file_is_state = False

    @contextmanager
    def publishable(self) -> Iterator[None]:
        """
        The model as stage 2 would start from it, to save an adapter that PEFT loads; then stage 1 goes on, with the
        same parameters and optimiser.
        """
        waiting = {key: self._tensors[key].detach().clone() for key in self._factor_keys}
        self.finish()
        try:
            yield
        finally:
            self.write(waiting)
            self._attach()

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        return {key: shape for key, shape in super()._saved_layout().items() if not key.endswith(".sparse_values")}

    @property
    def _factor_keys(self) -> set[str]:
        return {key for pair in self._pairs for key in (pair.key_A, pair.key_B)}

    def _attach(self) -> None:
        for module, layer in self._layers.items():
            # None is active, which freezes the factors; one that is switched off would come back after
            # `disable_adapter`.
            layer.set_adapter([])
            layer.base_layer = self._changes[module]

    def _detach(self) -> None:
        for module, layer in self._layers.items():
            layer.base_layer = self._changes[module].base_layer
            layer.set_adapter(self._name)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)


def check_sparse_change(model: PeftModel, pairs: Sequence[FactorPair]) -> None:
    """
    Raises:
        ValueError: If the adapter is not a LoRA with `B = 0` on linear layers that can be changed; the message
            names the layer.
    """
    base: Any = model.get_base_model()
    name = model.active_adapters[0]
    for pair in pairs:
        layer: Any = base.get_submodule(pair.module)
        if not isinstance(layer, LoraLayer) or pair.start is not None:
            reason = "the adapter is not a plain LoRA"
        elif pair.unfoldable is not None:
            reason = pair.unfoldable
        elif not isinstance(layer.base_layer, (nn.Linear, Conv1D)):
            reason = f"the base layer is of type {type(layer.base_layer).__name__}"
        elif torch.any(base.get_parameter(f"{pair.module}.lora_B.{name}.weight")):
            reason = "`B` is not zero already, and its product would be lost"
        else:
            continue
        raise ValueError(
            "'slora' trains a sparse change of the weights of linear layers first and starts LoRA from it, but for "
            f"{pair.module} {reason}. Use a new LoRA with `init_lora_weights=True` on linear layers that are "
            "neither quantised nor tied, or 'fedavg'."
        )
