# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers of SCL and FeDeRA do with the base weight: read it, fold adapters into it, and put it back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .access import offload_hook
from .linalg import WeightChange
from .quantization import check_readable, dense, frozen_copy, put_back


__all__ = ["MergeableLayer"]


class MergeableLayer(BaseTunerLayer):
    """
    A layer whose adapters amount to changes of the base weight.

    What was there before the first merge is kept, and put back bit for bit: PEFT's own layers take an adapter out
    again by arithmetic, which rounds.
    """

    method: str
    """The name of the adapters in messages."""
    offloaded_message = (
        "The base weight is quantised and offloaded, so it cannot be read. Add the adapter before offloading."
    )
    """What is said where the base weight is to be read, but is quantised and offloaded."""
    empty_message: str
    """The same where it is empty."""

    r: dict[str, int]

    # Base weight and bias as they were before the first merge; no bias if merging does not change it. A plain
    # attribute, so that it is never saved.
    _unmerged_parameters: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def _examine_base_layer(self, get_apply_tensor_subclass: Any) -> None:
        """Note how the base layer stores its weight."""
        layer = self.get_base_layer()
        self.fan_in_fan_out = isinstance(layer, Conv1D)
        # whether the base weight is stored as (in_features, out_features)
        self.transposed = isinstance(layer, (Conv1D, nn.Embedding))
        self.quantization_backend = resolve_quantization_backend(
            layer, get_apply_tensor_subclass=get_apply_tensor_subclass
        )

    # The base weight

    def get_base_layer(self) -> Any:
        """The innermost layer. `Any`, because it may be one of many classes."""
        return super().get_base_layer()

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        # an offloaded weight is on the meta device between forwards, where an adapter would compute nothing
        hook = offload_hook(self.get_base_layer())
        return (device if hook is None else torch.device(hook.execution_device)), dtype

    def _oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as `(out_features, in_features)`, or back as the base layer stores it."""
        return weight.T if self.transposed else weight

    def _values(self, stored: torch.Tensor) -> torch.Tensor:
        """The values of a weight that may be quantised, as the base layer stores it."""
        return stored if self.quantization_backend is None else dense(stored)

    def _dense_base_weight(self) -> torch.Tensor:
        """
        The base weight, without what is merged into it, as a dense floating tensor `(out_features, in_features)`.

        Raises:
            NotImplementedError: If it is quantised and offloaded.
            ValueError: If it is empty.
        """
        hook = offload_hook(self.get_base_layer())
        if self.quantization_backend is not None:
            if hook is not None:
                raise NotImplementedError(self.offloaded_message)
            check_readable(self.get_base_layer())
        if self._unmerged_parameters is not None:
            weight = self._values(self._unmerged_parameters[0])
        else:
            weight = self.get_base_weight() if hook is None else hook.weights_map["weight"]
        if weight.numel() == 0:
            raise ValueError(self.empty_message)
        return self._oriented(weight)

    # The changes that adapters amount to

    def weight_change(self, name: str) -> WeightChange:
        """The change of the pretrained weight and bias that the adapter `name`, alone, amounts to."""
        raise NotImplementedError

    def exact_rank(self, name: str) -> int:
        """The smallest rank that holds the change by the adapter `name`, whatever its weights are."""
        raise NotImplementedError

    def full_rank_option(self, name: str) -> str | None:
        """The option of the config by which the change is no product of thin factors, if there is one."""
        return None

    def _adapter_dtype(self, name: str) -> torch.dtype:
        raise NotImplementedError

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        The change of the pretrained weight by an adapter, in float32 or better, laid out as the weight of the base
        layer.
        """
        dtype = torch.promote_types(self._adapter_dtype(adapter), torch.float32)
        return self._oriented(self.weight_change(adapter).dense()).to(dtype)

    # Merging

    def check_mergeable(self, names: list[str]) -> None:
        """Raise if one of the adapters `names` cannot be folded into this layer."""
        if names and self.quantization_backend is not None and self._unmerged_parameters is None:
            check_readable(self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Fold adapters into the base weight, rounding once to its dtype. A quantised weight is quantised again, which
        rounds more coarsely and gives a warning. `unmerge` puts back, bit for bit, what was there.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the merged weight for non-finite values before it replaces the base weight.
            adapter_names (`list[str]`, *optional*):
                Adapters to merge; all active ones if not given.

        Raises:
            ValueError: If `check_mergeable` says so, or if `safe_merge` finds non-finite values.
            NotImplementedError: If the base layer is quantised by a library other than bitsandbytes and torchao.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        self.check_mergeable(names)
        base_layer = self.get_base_layer()
        original = self._unmerged_parameters
        if original is None:
            weight = base_layer.weight.data if self.quantization_backend is None else frozen_copy(base_layer)
            original = weight, self._bias_to_merge()
        with torch.no_grad():
            weight, bias = self._merged_parameters(original, self.merged_adapters + names)
        if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self._unmerged_parameters = original
        if self.quantization_backend is not None:
            warnings.warn(
                f"Merging {self.method} into weights quantised by {self.quantization_backend.backend_name} rounds the "
                "result to the quantisation grid again, so the outputs differ from those of the separate adapter. "
                "Merge into the base model without quantisation for an exact result.",
                UserWarning,
                stacklevel=2,
            )
        self.set_base_weight(weight)
        if bias is not None:
            base_layer.bias.data = bias
        self.merged_adapters.extend(names)

    def _bias_to_merge(self) -> torch.Tensor | None:
        """The base bias, if there is one and adapters change it."""
        return None

    def _merged_parameters(
        self, original: tuple[torch.Tensor, torch.Tensor | None], names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The `original` weight and bias with the adapters `names` folded in, as the base layer stores them, but dense.
        """
        raise NotImplementedError

    def unmerge(self) -> None:
        """Put the base weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._unmerged_parameters is not None
        base_layer = self.get_base_layer()
        weight, bias = self._unmerged_parameters
        if self.quantization_backend is None:
            base_layer.weight.data = weight.to(base_layer.weight)
        else:
            put_back(base_layer, weight)
        if bias is not None:
            base_layer.bias.data = bias.to(base_layer.bias)
        self._unmerged_parameters = None
        self.merged_adapters.clear()
