# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a federation cannot do under DeepSpeed and FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from ...config import FederationArguments


if TYPE_CHECKING:
    from ...client.live.state import LiveState
    from ...federation.server import Server


__all__ = ["check_deepspeed", "check_fsdp"]


def check_deepspeed(
    args: FederationArguments, plugin: Any, model: nn.Module, live: LiveState, server: Server, has_optimizer: bool
) -> None:
    """
    Refuse what a federation cannot do under DeepSpeed.

    Args:
        args ([`FederationArguments`]):
            The settings.
        plugin (`accelerate.DeepSpeedPlugin`):
            The settings of DeepSpeed.
        model (`nn.Module`):
            The model, before the engine is built.
        live ([`LiveState`]):
            Its tensors.
        server ([`Server`]):
            The method.
        has_optimizer (`bool`):
            Whether the user has given an optimiser.

    Raises:
        NotImplementedError: Naming the setting and what to use instead.
    """
    config, stage = plugin.deepspeed_config, plugin.zero_stage
    zero = config["zero_optimization"]
    offload = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    ddp = "Launch DDP with `--config_file recipes/accelerate/ddp.yaml`"
    zero2 = "Use ZeRO-2 (`recipes/accelerate/zero2.yaml`) or DDP"
    reason = None
    if stage not in (1, 2, 3):
        reason = f"ZeRO stage {stage} splits nothing and keeps its optimiser elsewhere. {ddp}."
    elif any(part.get("device") == "nvme" for part in offload):
        reason = "Offloading to NVMe keeps the trained parameters in files, which clients cannot be swapped in. Offload to 'cpu'."
    elif "scheduler" in config or "optimizer" in config:
        part = "scheduler" if "scheduler" in config else "optimizer"
        reason = (
            f"The DeepSpeed config has {'a' if part == 'scheduler' else 'an'} `{part}` of its own, which would go on from client to client. Leave it out: `optim`, "
            "`learning_rate` and `lr_scheduler_type` of the configuration are used."
        )
    elif stage == 1 and args.bf16 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        reason = (
            "ZeRO-1 with `bf16` and `grad_accum_dtype: fp32` takes another optimiser of DeepSpeed, which clients cannot be swapped in. "
            "Use ZeRO-2."
        )
    elif zero.get("zero_quantized_nontrainable_weights"):
        reason = (
            "`zero_quantized_nontrainable_weights` stores what is frozen as integers, in an adapter too (`ffa_lora`), where it is read and "
            "written as it is. Leave it out."
        )
    elif args.fp16:
        reason = "The loss scale of `fp16` would go on from client to client. Set `bf16=True`, or neither."
    elif has_optimizer:
        reason = "`optimizers` cannot be given: DeepSpeed splits what it holds. Set `optim` and `optim_args`."
    elif live.buffers:
        reason = f"{min(live.buffers)} is a running statistic, of which DeepSpeed leaves each process its own, so they would go apart. {ddp}."
    elif args.keep_optimizer_state:
        reason = (
            "`keep_optimizer_state=True` keeps what the optimiser remembers of every tensor, but DeepSpeed has it in one flat piece per "
            f"process. {ddp}."
        )
    elif args.local_objective is not None:
        reason = (
            f"`local_objective={args.local_objective!r}` adds to the gradients before the step, but DeepSpeed steps within the "
            f"backward pass. {ddp}."
        )
    elif server.sparse_rounds:
        reason = (
            f"`aggregation='slora'` trains other parameters in its second stage, which needs a second engine. {ddp}."
        )
    elif stage == 3 and not isinstance(model, PeftModel):
        reason = f"ZeRO-3 splits the whole model, and its parts would have to be gathered for every client. {zero2}."
    elif stage == 3 and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        reason = f"PEFT computes a prompt when it saves it, which it cannot under ZeRO-3. {zero2}."
    elif stage == 3 and server.method.adds_to_base:
        reason = (
            f"`aggregation={args.aggregation!r}` adds to base weights, which ZeRO-3 has split. {zero2}, or 'fedavg'."
        )
    if reason is not None:
        raise NotImplementedError(reason)


def check_fsdp(args: FederationArguments, plugin: Any, model: nn.Module, live: LiveState, server: Server) -> None:
    """
    Refuse what a federation cannot do under FSDP2.

    Args:
        args ([`FederationArguments`]):
            The settings.
        plugin (`accelerate.FullyShardedDataParallelPlugin`):
            The settings of FSDP.
        model (`nn.Module`):
            The model, before the engine is built.
        live ([`LiveState`]):
            Its tensors.
        server ([`Server`]):
            The method.

    Raises:
        NotImplementedError: Naming the setting and what to use instead.
    """
    ddp = "Launch DDP with `--config_file recipes/accelerate/ddp.yaml`"
    reason = None
    if plugin.activation_checkpointing:
        reason = (
            "`fsdp_activation_checkpointing: true` puts modules into the model under whose names PEFT does not find the adapter: it "
            "would save an empty one. Set it to `false`; `gradient_checkpointing=True` of the configuration saves the same memory."
        )
    elif args.torch_compile:
        reason = (
            "`torch_compile=True` puts another model in the place of the one that is saved under FSDP2. Leave it out."
        )
    elif not isinstance(model, PeftModel):
        reason = f"FSDP2 splits the whole model, and its parts would have to be gathered for every client. {ddp}."
    elif model.active_peft_config.is_prompt_learning:
        reason = (
            f"PEFT computes a prompt when it saves it, which it cannot from the parts that FSDP2 leaves it. {ddp}."
        )
    elif _trains_head(model):
        reason = (
            "The output layer is trained, but TRL takes its weight past FSDP2 to compute the loss, so that every process would train "
            f"its part on its own rows only. Leave it out of `modules_to_save`. Or: {ddp}."
        )
    elif live.buffers:
        reason = f"{min(live.buffers)} is a running statistic, of which FSDP2 leaves each process its own, so they would go apart. {ddp}."
    elif server.method.adds_to_base:
        reason = (
            f"`aggregation={args.aggregation!r}` adds to base weights, which FSDP2 has split. {ddp}, or use 'fedavg'."
        )
    elif server.sparse_rounds:
        reason = f"`aggregation='slora'` trains base weights in its first stage, which FSDP2 has split. {ddp}."
    elif args.local_objective is not None:
        reason = f"`local_objective={args.local_objective!r}` adds to gradients, of which FSDP2 leaves each process a part. {ddp}."
    elif args.keep_optimizer_state:
        reason = f"`keep_optimizer_state=True` keeps what the optimiser remembers, of which FSDP2 leaves each process a part. {ddp}."
    if reason is not None:
        raise NotImplementedError(reason)


def _trains_head(model: PeftModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())
