# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in a state in which training would not reach them."""

from __future__ import annotations

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainingArguments

from ...client.live.prompt import IN_THE_CACHE
from ...client.live.state import LiveState
from ...config import FederationArguments
from ...federation.plan import user_roles
from ...methods.aggregation.methods import METHODS


__all__ = ["check_prompt_arguments", "freeze_for_good", "refuse_idle_adapter", "refuse_unwrapped_adapter"]


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
            f"The {type(base).__name__} that was given has an adapter "
            f"already{f' (at {names[0]})' if names else ''} without a `PeftModel` around it, as transformers' "
            "`add_adapter`, `from_pretrained` of an adapter, and an earlier trainer that was given this model "
            "leave it: its config would be neither compared nor saved. Load the base model anew and give a "
            "`peft_config`; or wrap it by `get_peft_model`; a saved adapter is an `initial_adapter`."
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
                f"The adapter {name!r} is merged into the base weights (at {path}), where training does not reach "
                "it. Call `model.unmerge_adapter()` first."
            )
        if module.disable_adapters:
            raise ValueError(
                f"The adapter {name!r} is switched off (at {path}), so nothing would be trained. Call "
                "`model.base_model.enable_adapter_layers()` first."
            )
        if name in _adapters_of(module) and list(module.active_adapters) != [name]:
            raise ValueError(
                f"At {path} the adapters {list(module.active_adapters)} are active, but {name!r} is the adapter "
                f"that is trained. Call `model.set_adapter({name!r})` first."
            )


def _adapters_of(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> set[str]:
    return set(module._get_available_adapters())


def _tuned(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


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
            f"{kind} puts its prompt into the key-value cache, which gradient checkpointing drops, so nothing "
            "would be trained. Set `gradient_checkpointing=False`."
        )
    joining = [name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, False)]
    if joining:
        raise ValueError(
            f"`{joining[0]}=True` joins examples into one sequence, of which {kind} gives a prompt to the first "
            "alone. Leave it off."
        )


def freeze_for_good(args: FederationArguments, live: LiveState) -> None:
    """
    Freeze what has the role "frozen" in every round, such as the `A` of FFA-LoRA, before anybody builds an optimiser.

    Raises:
        ValueError: If the patterns do not fit the tensors.
    """
    whole, travelling = live.read(include_frozen=True), live.read()
    method, own = METHODS[args.aggregation], user_roles(args)
    splits = [method.roles(round).joined(own).split(whole) for round in (1, 2)]
    frozen = splits[0].frozen.keys() & splits[1].frozen.keys() & travelling.keys()
    counted = sorted(frozen & live.buffers)
    if counted:
        raise ValueError(
            f"{counted[0]} is to be frozen, but it is a running statistic, which every forward pass in training "
            "changes. Let it be local or shared."
        )
    live.freeze(frozen)
