# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Launches that would do something else than they say, and what a federation cannot do under DeepSpeed and FSDP2."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.utils import strtobool


if TYPE_CHECKING:
    pass


__all__ = ["check_launch"]


def check_launch(args: TrainingArguments) -> None:
    """
    Refuse a launch of which Accelerate has dropped a part without a word.

    Raises:
        NotImplementedError: For FSDP1, and FSDP that loads the base model in the first process only.
        ValueError: If the processes, or DeepSpeed or FSDP, that the launcher asked for are not there; the message has the command.
    """
    state: Any = args.distributed_state
    if _is_set("ACCELERATE_USE_FSDP") or args.fsdp:
        _check_fsdp_launch(args, state.distributed_type)
    on_cpu = args.use_cpu or _is_set("ACCELERATE_USE_CPU")
    if _is_set("ACCELERATE_USE_DEEPSPEED") and on_cpu:
        given = "`use_cpu=True`" if args.use_cpu else "`ACCELERATE_USE_CPU`"
        raise ValueError(
            f"The launcher asked for DeepSpeed, but {given} makes Accelerate drop it and run DDP instead. Leave it out; without a GPU, "
            "launch with `DS_ACCELERATOR=cpu accelerate launch --config_file recipes/accelerate/zero2.yaml <script> --ddp_backend "
            "gloo`."
        )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked > 1 and state.num_processes == 1:
        way = "`--ddp_backend gloo`" if _is_set("ACCELERATE_USE_DEEPSPEED") else "`--use_cpu true`"
        raise ValueError(
            f"The launcher started {asked} processes, but Accelerate sees one: each would train alone and write over the others. "
            f"Without GPUs, add {way} to the arguments of the script."
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED") and state.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"The launcher asked for DeepSpeed, but Accelerate runs {state.distributed_type.value}. Launch with `accelerate launch "
            "--config_file recipes/accelerate/zero2.yaml <script>`."
        )
    # of `accelerate launch --cpu --num_processes 2`, which prepares the address for processes to meet at, and starts one
    is_alone = "LOCAL_RANK" not in os.environ and state.num_processes == 1
    if is_alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "The launcher was asked for several processes but has started one. Without GPUs, launch with `accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml <script> --use_cpu true`."
        )


def _check_fsdp_launch(args: TrainingArguments, distributed_type: DistributedType) -> None:
    plugin = args.fsdp_plugin_args or {}  # of `fsdp_config`; the launcher sets the environment
    if int(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) == 1:
        raise NotImplementedError(
            "FSDP1 is not supported: it joins the parameters of a layer into one, in which an adapter is not found. Set "
            "`fsdp_version: 2`: `accelerate launch --config_file recipes/accelerate/fsdp2.yaml <script>`."
        )
    if distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"FSDP was asked for, but Accelerate enables it for several processes on GPUs only and here runs {distributed_type.value}: "
            "nothing would be split. Without GPUs, launch DDP with `accelerate launch --config_file recipes/accelerate/ddp.yaml "
            "<script> --use_cpu true`, or split the model with `DS_ACCELERATOR=cpu accelerate launch --config_file "
            "recipes/accelerate/zero3.yaml <script> --ddp_backend gloo`."
        )
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # set for `fsdp_config` too
        raise NotImplementedError(
            "`fsdp_cpu_ram_efficient_loading: true` leaves the base model of all processes but the first empty, and each computes "
            "the start of the adapter and a digest from it. Set it to `false`."
        )


def _is_set(variable: str) -> bool:
    return bool(strtobool(os.environ.get(variable, "false")))
