# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in a state in which training would not reach them."""

from __future__ import annotations

import re

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainingArguments

from ...client.live.adapter import LiveAdapter
from ...client.live.pairs import factor_pairs
from ...client.live.prompt import IN_THE_CACHE
from ...methods.aggregation.methods import METHODS
from ...state.adapter_state import AdapterState
from ...state.factors import FactorPair, check_foldable
from ...state.roles import A_FACTORS


__all__ = ["check_adapter", "check_prompt_arguments", "refuse_idle_adapter", "refuse_unwrapped_adapter"]


def refuse_unwrapped_adapter(model: nn.Module) -> None:
    """
    Refuse an adapter that was put on the model without a [`~peft.PeftModel`] around it, as by `model.add_adapter(...)`
    of transformers.

    Raises:
        ValueError: Naming a module.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [] if isinstance(model, PeftModel) else _tuned(base)
    if names or getattr(base, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"The {type(base).__name__} that was given has an adapter already{f' (at {names[0]})' if names else ''} without a `PeftModel` around "
            "it, as transformers' `add_adapter`, `from_pretrained` of an adapter, and an earlier trainer that was given this model leave it: its "
            "config would be neither compared nor saved. Load the base model anew and give a `peft_config`; or wrap it by `get_peft_model`; a saved "
            "adapter is an `initial_adapter`."
        )


def refuse_idle_adapter(model: nn.Module) -> None:
    """
    Refuse an adapter that is merged or switched off, at all modules or at some: nothing, or a part only, would be
    trained.

    Raises:
        ValueError: Naming a module.
    """
    if not isinstance(model, PeftModel):
        return
    name = model.active_adapters[0]
    for path, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"The adapter {name!r} is merged into the base weights (at {path}), where training does not reach it. Call "
                "`model.unmerge_adapter()` first."
            )
        if module.disable_adapters:
            raise ValueError(
                f"The adapter {name!r} is switched off (at {path}), so nothing would be trained. Call "
                "`model.base_model.enable_adapter_layers()` first."
            )
        if name in _adapters_of(module) and list(module.active_adapters) != [name]:
            raise ValueError(
                f"At {path} the adapters {list(module.active_adapters)} are active, but {name!r} is the adapter that is trained. Call "
                f"`model.set_adapter({name!r})` first."
            )


def _adapters_of(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> set[str]:
    return set(module._get_available_adapters())


def _tuned(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def check_adapter(aggregation: str, model: PeftModel) -> list[FactorPair]:
    """
    The factor pairs a method works on, after refusing adapters it does not fit.

    Args:
        aggregation (`str`):
            Name of the method.
        model ([`~peft.PeftModel`]):
            The live model, before its first round.

    Returns:
        `list[FactorPair]`: For [`Method.build`]; empty for methods that take any adapter.

    Raises:
        ValueError: Naming the first layer or tensor that does not fit, and why.
    """
    method = METHODS[aggregation]
    if aggregation == "ffa_lora":
        _check_frozen_factors(LiveAdapter(model).read(include_frozen=True))
    # with one factor fixed, RoLoRA is exact for what is linear in either; SLoRA replaces both
    if not method.uses_pairs and aggregation not in ("rolora", "slora"):
        return []
    pairs = factor_pairs(model)
    if method.adds_to_base:
        check_foldable(pairs, aggregation)
    return pairs


def _check_frozen_factors(state: AdapterState) -> None:
    """Refuse adapters for which FFA-LoRA would train nothing, or not be exact."""
    for key, tensor in state.items():
        if ".scl_delta" in key:
            raise ValueError(
                f"'ffa_lora' is exact because one factor is the same everywhere, but {key} belongs to a second product, which "
                "multiplies the first. Use `variant='compress'` or `train_down_proj='none'`, or 'fedavg'."
            )
        if ".lora_magnitude_vector" in key:
            raise ValueError(
                f"'ffa_lora' is exact because the adapter is linear in `B`, but with {key} (DoRA) the sum of base weight and product "
                "is rescaled. Use plain LoRA, or 'fedavg'."
            )
        if ".lora_" in key and re.search(A_FACTORS, key) and not tensor.any():
            raise ValueError(
                f"'ffa_lora' trains with {key} frozen, but it is zero (PEFT starts the `A` of embeddings so), so nothing would be "
                "trained. Leave embeddings out of `target_modules`, or use 'fedavg'."
            )


def check_prompt_arguments(model: PeftModel, args: TrainingArguments) -> None:
    """
    Raise for settings under which a prompt would be dropped without a word.

    Raises:
        ValueError: Naming the setting.
    """
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return
    kind = PeftType(config.peft_type).value
    if config.peft_type in IN_THE_CACHE and args.gradient_checkpointing:
        raise ValueError(
            f"{kind} puts its prompt into the key-value cache, which gradient checkpointing drops, so nothing would be "
            "trained. Set `gradient_checkpointing=False`."
        )
    joining = [name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, False)]
    if joining:
        raise ValueError(
            f"`{joining[0]}=True` joins examples into one sequence, of which {kind} gives a prompt to the first alone. Leave it off."
        )
