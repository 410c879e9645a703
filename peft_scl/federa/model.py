# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapter_names import restore_dropped, without_name, without_others
from ..card import FEDERA_TAG
from .checks import check_target, layer_class
from .config import FederaConfig
from .layer import FederaLayer
from .state import check_saved_shapes, stack_start, unstack_start


__all__ = ["FederaModel"]

_TENSOR_PARALLEL = (
    "FeDeRA does not support tensor parallelism: each rank holds a part of the weights, and would start from the "
    "singular vectors of that. Load the model without `tp_plan`."
)


class FederaModel(LoraModel):
    """
    Creates a FeDeRA model (https://huggingface.co/papers/2404.18848) from a pretrained model.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted. With `keep_base=False` its targeted weights are changed
            in place.
        config ([`FederaConfig`]): The configuration of the FeDeRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The FeDeRA model.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_scl import FederaConfig
        >>> from transformers import AutoModelForCausalLM

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> config = FederaConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
        >>> model.print_trainable_parameters()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`FederaConfig`]): The configuration of the FeDeRA model.
    """

    tuner_layer_cls = FederaLayer  # type: ignore[assignment]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise NotImplementedError(_TENSOR_PARALLEL)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags([FEDERA_TAG])  # read by the model cards of PEFT and of the trainers
        _maybe_include_all_linear_layers(peft_config, model)  # which PEFT does next
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for key, module in model.named_modules():
            if key and not key.startswith(adapted) and self._check_target_module_exists(peft_config, key):
                check_target(model, key, module, peft_config)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        residual = [name for name, other in self.peft_config.items() if not getattr(other, "keep_base", True)]
        if len(self.peft_config) > 1 and residual:
            raise ValueError(
                f"The adapter {residual[0]!r} has `keep_base=False`: the base model holds its residual, which is "
                "right for this adapter only. Use `keep_base=True` for a model with several FeDeRA adapters."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        before = {
            layer for layer in model.modules() if isinstance(layer, FederaLayer) and adapter_name in layer.keep_base
        }
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # out of memory, or an impatient user: no residual may stay behind
            for layer in model.modules():
                if isinstance(layer, FederaLayer) and layer not in before and adapter_name in layer.keep_base:
                    layer.delete_adapter(adapter_name)
            if not before:
                self.peft_config.pop(adapter_name, None)
            raise

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        check_target(self.model, current_key, target, lora_config)  # again, for modules that a state dict names
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    def _create_new_module(  # type: ignore[override]
        self, lora_config: FederaConfig, adapter_name: str, target: Any, **kwargs: Any
    ) -> FederaLayer:
        new_class = layer_class(self.model, target)
        assert new_class is not None  # `check_target`
        lora_config.fan_in_fan_out = isinstance(target, Conv1D)  # what plain LoRA will want to hear
        kwargs.update(get_quantization_kwargs(self.model))
        return new_class(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # not LoRA's, which would move the adapter to where the weight is, also when that is offloaded
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered: a combination of changes is a LoRA, and not a FeDeRA with a start."""
        raise NotImplementedError(
            "FeDeRA adapters cannot be combined while they are trained, since each has a start of its own. Save them, "
            "load them as the plain LoRA adapters that they are saved as, and combine these (`combination_type='cat'` "
            "is exact)."
        )

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
        selected = stack_start(selected, adapter_name)
        # If an embedding is targeted, PEFT takes everything below it from `state_dict` again, which is its own copy:
        # there, too, the factors have to be those of the plain LoRA, and a residual is not the base that it is for.
        for name, module in model.named_modules():
            if isinstance(module, FederaLayer):
                name = name.replace("_fsdp_wrapped_module.", "")  # not in the keys
                for key in [key for key in state_dict if key.startswith(f"{name}.lora_")]:
                    del state_dict[key]
                if not all(module.keep_base.values()):
                    state_dict.pop(f"{name}.base_layer.weight", None)
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
        state_dict = unstack_start(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefix = "base_model.model."
        given = {key.removeprefix(prefix): tensor for key, tensor in remapped.items()}
        check_saved_shapes(model, given, adapter_name)
        for name, module in model.named_modules():
            if isinstance(module, FederaLayer) and adapter_name in module.keep_base:
                name = name.replace("_fsdp_wrapped_module.", "")
                key = f"{name.removeprefix(prefix)}.lora_start_"
                module.load_start(adapter_name, given[f"{key}A.{adapter_name}"], given[f"{key}B.{adapter_name}"])
                if not module.keep_base[
                    adapter_name
                ]:  # PEFT saves that of a targeted embedding, with `keep_base=True`
                    for base_key in (f"{name}.base_layer.weight", f"{prefix}{name}.base_layer.weight"):
                        remapped.pop(base_key, None)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "`path_initial_model_for_weight_conversion` is not needed: `save_pretrained` always writes a FeDeRA "
            "adapter as a plain LoRA for the untouched base model. Leave it out."
        )
