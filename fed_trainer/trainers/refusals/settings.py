# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a trainer refuses before its first round: parts of a model that would leak, and settings that do not go together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.training_args import OptimizerNames

from peft_scl.adapter_names import called_like_a_module

from ...client.live.state import LiveState
from ...config import FederationArguments
from ...data.client_datasets import ClientDatasets, rows_by_client
from ...federation.client_settings import ClientSettings
from ...federation.plan import Plan
from ...methods.aggregation import METHODS
from ...state.adapter_state import AdapterState


__all__ = [
    "refuse_adapter_names",
    "refuse_another_start",
    "refuse_empty_held_out",
    "refuse_kept_optimizers",
    "refuse_one_evaluation",
    "refuse_other_weights_in_evaluation",
    "refuse_taken_names",
    "refuse_turns_that_differ",
    "refuse_what_would_leak",
]


def refuse_what_would_leak(model: nn.Module, live: LiveState) -> None:
    """
    Refuse a model of which training changes what `live` does not write and read.

    Raises:
        ValueError: If nothing is trainable, or something is that does not travel; the message names it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"No parameter of the `{type(model).__name__}` that was given requires gradients. Give a "
                "`peft_config`, or set `requires_grad` where it is to be trained."
            )
        raise ValueError(
            "Nothing is trainable in the `PeftModel` that was given. `PeftModel.from_pretrained` freezes the "
            "adapter: pass `is_trainable=True` to it, or leave the loading to `initial_adapter`."
        )
    tracked = live.tensor_ids
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in tracked]
    if stray:
        raise ValueError(
            f"{len(stray)} parameters are trainable but not part of the adapter (the first: {stray[0]}): they would "
            "leak from one client to the next. Freeze them, or name their modules in `modules_to_save`."
        )
    statistics = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and id(module.running_mean) not in tracked
        and "original_module" not in name.split(".")
    ]
    if statistics:
        raise ValueError(
            f"Training updates the running statistics of {statistics[0]}, which is not part of the adapter: they "
            "would leak from one client to the next, and would not be saved. Name it in `modules_to_save`."
        )
    cumulative = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and id(module.running_mean) in tracked and module.momentum is None
    ]
    if cumulative:
        raise ValueError(
            f"The running statistics of {cumulative[0]} are a cumulative average, since it has `momentum=None`: "
            "its weights follow from the number of batches seen, which a mean over clients has no meaning for. Set "
            "a momentum, such as 0.1."
        )


def refuse_adapter_names(model: PeftModel) -> None:
    """
    Refuse names of adapters under which PEFT would not save what is trained, or elsewhere.

    Raises:
        ValueError: Naming the adapter.
    """
    active = model.active_adapters
    for name in model.peft_config:
        if name in active and re.search(r"[/\\\x00]", name):
            raise ValueError(
                f"The adapter is called {name!r}, and PEFT saves it into a folder of that name. Give it a name "
                "without slashes: `get_peft_model(model, config, adapter_name=...)`."
            )
    # "default" alone is what everybody has: a module of that name does not harm it
    named = [name for name in model.peft_config if name != "default" or len(model.peft_config) > 1]
    clashing = called_like_a_module(model, named)
    if clashing:
        raise ValueError(
            f"The adapter {clashing[0]!r} is called like a module of the model, so PEFT would leave tensors out of "
            "the files of the others, or save them under other names. Give it another name."
        )


def refuse_another_start(live: LiveState, state: AdapterState) -> None:
    """
    Refuse a run from a model whose trained tensors were written to after the trainer was made: the first client
    would overwrite them.

    Args:
        live ([`LiveState`]):
            The live model.
        state (`dict[str, torch.Tensor]`):
            What the run is to start from.

    Raises:
        ValueError: Naming the first tensor that is another.
    """
    now = live.read()
    changed = [
        key for key in state if key not in live.buffers and not torch.equal(now[key], state[key].to(now[key].dtype))
    ]
    if changed:
        raise ValueError(
            f"{len(changed)} trained tensors of the model were changed since the trainer was made (the first: "
            f"{changed[0]}), but a run starts from what the model held then. Change the model first and make the "
            "trainer with it, or pass a saved adapter as `initial_adapter`."
        )


def refuse_empty_held_out(eval_dataset: Any) -> None:
    """
    Refuse held-out sets without rows.

    Raises:
        ValueError: Naming the set.
    """
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {}
    if not isinstance(sets, ClientDatasets):
        # a stream has no length
        sets = {name: dataset for name, dataset in sets.items() if hasattr(dataset, "__len__")}
    for name, num_rows in rows_by_client(sets).items():
        if num_rows == 0:
            raise ValueError(f"The held-out data of {name!r} is empty. Leave it out of `eval_dataset`.")


def refuse_kept_optimizers(args: FederationArguments) -> None:
    """
    Refuse `keep_optimizer_state` with a rule for which the optimiser has to start afresh.

    Raises:
        ValueError: Saying why.
    """
    reason = METHODS[args.aggregation].fresh_optimizer
    if args.keep_optimizer_state and reason is not None:
        raise ValueError(
            f"`keep_optimizer_state=True` with `aggregation={args.aggregation!r}`: {reason}. Leave one of the two out."
        )


def refuse_one_evaluation(eval_dataset: Any, local_keys: Collection[str]) -> None:
    """
    Refuse held-out data for one model, where every client has its own.

    Args:
        eval_dataset (`Any`):
            What was given.
        local_keys (`Collection[str]`):
            Tensors that stay with the clients; none if it is Ditto that makes the models personal.

    Raises:
        ValueError: Always.
    """
    what = "every client has a model of its own (Ditto)"
    if local_keys:
        what = f"{len(local_keys)} tensors stay with the clients (the first: {min(local_keys)})"
    names = list(eval_dataset) if isinstance(eval_dataset, Mapping) else type(eval_dataset).__name__
    raise ValueError(
        f"{what}, so there is not one model to evaluate, but `eval_dataset` is {names}. Give a dictionary from "
        "clients to their held-out data."
    )


def refuse_other_weights_in_evaluation(args: FederationArguments, model: nn.Module, is_split: bool) -> None:
    """
    Refuse what gives the model other weights for an evaluation, where it could not be given its own back.

    Args:
        args ([`FederationArguments`]):
            The settings.
        model (`nn.Module`):
            The model.
        is_split (`bool`):
            Whether DeepSpeed or FSDP2 holds its weights.

    Raises:
        NotImplementedError: Naming the setting.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    is_quantized = getattr(base, "is_quantized", False)
    where = (
        "under DeepSpeed and FSDP2, which hold the weights"
        if is_split
        else "with a quantised model, which is not cast"
    )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name) and (is_split or is_quantized):
            raise NotImplementedError(
                f"`{name}=True` casts the model for an evaluation and does not work {where}. Leave it out."
            )
    if is_split and args.optim.startswith("schedule_free"):
        raise NotImplementedError(
            f"`optim={OptimizerNames(args.optim).value!r}` trains other weights than those to be used and "
            f"exchanges them after a local round, which does not work {where}. Set `optim='adamw_torch'`."
        )


def refuse_taken_names(trainer: Any, names: Collection[str]) -> None:
    """
    Refuse a trainer underneath that has attributes which the federation would put its own parts over.

    Raises:
        TypeError: Naming them.
    """
    taken = [n for n in names if n in vars(trainer) or any(n in vars(kind) for kind in type(trainer).__mro__)]
    if taken:
        raise TypeError(
            f"`{type(trainer).__name__}` has {', '.join(f'`{name}`' for name in taken)} of its own, where a "
            "federation keeps its parts. Give it another name."
        )


def refuse_turns_that_differ(args: FederationArguments, plan: Plan, state: AdapterState) -> None:
    """
    Refuse what trains other tensors from turn to turn, under an engine that is told once which are trained.

    Raises:
        NotImplementedError: Naming the rule.
    """
    rounds = [plan.trained_keys(state, round, ClientSettings()) for round in (1, 2)]
    if rounds[0] != rounds[1] or plan.partial:
        raise NotImplementedError(
            f"`aggregation={args.aggregation!r}` trains other tensors from turn to turn, which DDP, DeepSpeed and "
            "FSDP2 are told once and for all. Launch a single process without them."
        )
