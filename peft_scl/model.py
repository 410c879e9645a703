# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SclConfig
from .layer import Linear, SclLayer
from .targets import DOWN_PROJECTIONS, EXCLUDED_MODULES, find_down_projections


__all__ = ["SclModel"]


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

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type in DOWN_PROJECTIONS:
                peft_config.target_modules = set(DOWN_PROJECTIONS[model_type])
                if peft_config.exclude_modules is None and model_type in EXCLUDED_MODULES:
                    peft_config.exclude_modules = set(EXCLUDED_MODULES[model_type])
            else:
                peft_config.target_modules = set(find_down_projections(self.model))
        return peft_config

    def _create_and_replace(
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
        self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(
        self, peft_config: SclConfig, adapter_name: str, target: nn.Module, current_key: str
    ) -> nn.Module:
        if isinstance(target, BaseTunerLayer):
            raise TypeError(
                f"Target module {current_key} is already wrapped by another PEFT method ({type(target).__module__}."
                f"{type(target).__name__}). SCL replaces the input of the pretrained down projection and cannot be stacked "
                "on another adapter: merge that adapter first (`merge_and_unload`), or choose other `target_modules`."
            )
        if not isinstance(target, (nn.Linear, Conv1D)) and resolve_quantization_backend(target) is None:
            raise TypeError(
                f"Target module {current_key} is a {type(target).__name__}, but SCL wraps linear layers only (`nn.Linear`, "
                "transformers' `Conv1D`, and the quantised linear layers that PEFT supports). Set `target_modules` to "
                "the second linear map of the feed-forward blocks."
            )
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
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        empty = sorted(key for key, tensor in selected.items() if tensor.numel() == 0)
        if empty:
            raise ValueError(
                f"{len(empty)} tensors of the SCL adapter {adapter_name!r} are empty (the first: {empty[0]}), as under "
                "DeepSpeed ZeRO-3 before they are gathered, so saving would write a broken adapter. Save through "
                "`Trainer.save_model`, or pass the gathered `state_dict`."
            )
        return selected
