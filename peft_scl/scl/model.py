# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _freeze_adapter, get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapter_names import restore_dropped, without_name, without_others
from ..card import TAG
from .combine import combined_config, set_combined_weights
from .config import SclConfig
from .guards import check_calls, check_shapes, check_start, has_sharded_input, warn_of_extra_weights
from .layer import SclLayer
from .linear import Linear
from .targets import DOWN_PROJECTIONS, EXCLUDED_MODULES, find_down_projections, find_fused_experts


__all__ = ["SclModel"]

_TENSOR_PARALLEL = (
    "SCL does not support tensor parallelism: the input of the down projection is sharded there, and every rank would "
    "train a compression layer of its own. Load the model without `tp_plan`."
)


class SclModel(BaseTuner):
    """
    Puts Sequential Compression Layers (https://huggingface.co/papers/2412.07021) into a pretrained model.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`SclConfig`]): The configuration of the SCL model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The SCL model.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_scl import SclConfig
        >>> from transformers import AutoModelForCausalLM

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = get_peft_model(model, SclConfig(r=16, task_type="CAUSAL_LM"))
        >>> model.print_trainable_parameters()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`SclConfig`]): The configuration of the SCL model.
    """

    prefix: str = "scl_"
    tuner_layer_cls = SclLayer
    target_module_mapping = DOWN_PROJECTIONS
    # whether a forward pass since the last injection has reached the wrapped modules
    _calls_checked: bool = False

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: SclConfig, model_config: dict[str, Any]
    ) -> SclConfig:
        experts = find_fused_experts(self.model)
        if experts and peft_config.target_modules is None:
            raise NotImplementedError(
                f"{len(experts)} modules of this model (the first: {experts[0]}) hold several experts in one "
                "parameter, which SCL cannot wrap yet, so there are no default `target_modules`. To adapt the other "
                "feed-forward blocks only (shared experts, dense layers), name their down projections in "
                "`target_modules`."
            )
        if experts:
            warnings.warn(
                f"{len(experts)} modules of this model (the first: {experts[0]}) hold several experts in one "
                "parameter, which SCL cannot wrap yet: these experts stay frozen and without an adapter.",
                UserWarning,
                stacklevel=2,
            )
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type in DOWN_PROJECTIONS:
                targets, excluded = DOWN_PROJECTIONS[model_type], EXCLUDED_MODULES.get(model_type, [])
            else:
                targets, excluded = find_down_projections(self.model)
            exclude: Any = _also_excluding(peft_config.exclude_modules, excluded)
            peft_config.target_modules = set(targets)  # type: ignore[assignment]
            peft_config.exclude_modules = exclude
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise NotImplementedError(_TENSOR_PARALLEL)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags([TAG])  # read by the model cards of PEFT and of the trainers

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # `PeftModel` enters this around every forward and `generate`, whether or not they pass through `self.forward`
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "SCL does not support batches with mixed adapters (`adapter_names`). Call the model once per adapter, "
                "after `set_adapter`."
            )
        if self._calls_checked or torch.compiler.is_compiling():
            yield
            return
        with check_calls(self.model):
            yield
        self._calls_checked = True

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """
        Add an adapter that computes the weighted sum of others, exactly. It is frozen and not active.

        For `variant="bottleneck"`, adapters with the same activation give

        `y = (W + sum_k w_k delta_k) (h + sum_k w_k scaling_k B_k act(A_k h)) + b`.

        A weight multiplies the branch and the delta of its adapter, as if it had been trained with these smaller; with
        all weights 1 this is what activating the adapters together computes. For `variant="compress"` the changes add
        up,

        `y = W h + b + sum_k w_k scaling_k ((B0_k + B_k) act((A0_k + A_k) h) - B0_k act(A0_k h))`,

        and with `keep_residual=False` the weights have to add up to 1 and give the mean of the models,
        `y = sum_k w_k scaling_k B_k act(A_k h) + b`.

        The rank is the sum of the ranks; a dropout is that of the first adapter.

        Args:
            adapters (`list[str]`):
                Names of the adapters to combine.
            weights (`list[float]`):
                One weight per adapter; they may be negative.
            adapter_name (`str`):
                Name of the new adapter.
            combination_type (`str`, *optional*, defaults to `"cat"`):
                `"cat"`, which puts the maps side by side. Averaging them is not offered: it is another function.

        Raises:
            ValueError: If no single adapter computes that sum, or a name is unknown or taken.
        """
        if combination_type != "cat":
            raise ValueError(
                f"`combination_type` is {combination_type!r}, but SCL adapters can be combined by 'cat' only: "
                "averaging the factors ('linear') adds the cross terms `B_i A_j` of different adapters to the sum of "
                "the `B_k A_k`."
            )
        unknown = sorted(set(adapters) - self.peft_config.keys())
        if unknown or not adapters or len(set(adapters)) < len(adapters):
            raise ValueError(
                f"`adapters` should be different names out of {sorted(self.peft_config)} but the value passed is "
                f"{adapters}"
            )
        if adapter_name in self.peft_config:
            raise ValueError(
                f"The model already has an adapter {adapter_name!r}. Choose another name, or delete it first."
            )
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, SclLayer)}
        configs: dict[str, Any] = {name: self.peft_config[name] for name in adapters}
        self.peft_config[adapter_name] = combined_config(configs, weights, layers)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            if adapter_name in layer.scl_A:
                set_combined_weights(layer, adapters, weights, adapter_name)
        _freeze_adapter(self.model, adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_layers_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_layers_mergeable(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_layers_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before the first layer is changed, not half way through the model."""
        for module in self.model.modules():
            if isinstance(module, SclLayer):
                module.check_mergeable(module.active_adapters if adapter_names is None else adapter_names)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SclConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, SclLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = self._create_new_module(peft_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        # not `_replace_module`, which would move the adapter to where the weight is, also when that is offloaded
        setattr(parent, target_name, new_module)
        self._calls_checked = False

    def _create_new_module(
        self, peft_config: SclConfig, adapter_name: str, target: nn.Module, current_key: str
    ) -> nn.Module:
        if isinstance(target, BaseTunerLayer):
            raise TypeError(
                f"Target module {current_key} is already wrapped by another PEFT method "
                f"({type(target).__module__}.{type(target).__name__}). SCL replaces the input of the pretrained down "
                "projection and cannot be stacked on another adapter: merge that adapter first (`merge_and_unload`), "
                "or choose other `target_modules`."
            )
        if not isinstance(target, (nn.Linear, Conv1D)) and resolve_quantization_backend(target) is None:
            raise TypeError(
                f"Target module {current_key} is a {type(target).__name__}, but SCL wraps linear layers only "
                "(`nn.Linear`, transformers' `Conv1D`, and the quantised linear layers that PEFT supports). Set "
                "`target_modules` to the second linear map of the feed-forward blocks."
            )
        if has_sharded_input(target):
            raise NotImplementedError(_TENSOR_PARALLEL)
        return Linear(target, adapter_name, config=peft_config, **get_quantization_kwargs(self.model))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        restore_dropped(model, adapter_name, state_dict, unwanted_adapter_names)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected = without_others(model, selected, unwanted_adapter_names)
        empty = sorted(key for key, tensor in selected.items() if tensor.numel() == 0)
        if empty:
            raise ValueError(
                f"{len(empty)} tensors of the SCL adapter {adapter_name!r} are empty (the first: {empty[0]}), as "
                "under DeepSpeed ZeRO-3 before they are gathered, so saving would write a broken adapter. Save "
                "through `Trainer.save_model`, or pass the gathered `state_dict`."
            )
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_name(key, adapter_name, cls.prefix)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        check_start(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_shapes(model, remapped)
        warn_of_extra_weights(state_dict, remapped)
        return remapped


def _also_excluding(given: Iterable[str] | str | None, names: list[str]) -> set[str] | str | None:
    """`exclude_modules` as the user gave it, with `names` added to it."""
    if isinstance(given, str) and names:
        suffixes = "|".join(re.escape(name) for name in names)
        return rf"(?:{given})|(?:.*\.)?(?:{suffixes})"
    if isinstance(given, str):
        return given
    return set(given or ()) | set(names) or None
