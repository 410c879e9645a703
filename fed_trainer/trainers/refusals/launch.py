# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Launches that would do something else than they say."""

from __future__ import annotations

import os

from transformers import TrainingArguments

from ...client.engines import ENGINES
from ...client.engines.facts import Launch, alone_of_several
from ...state.refusals import Refusal, refuse


__all__ = ["check_launch"]


def _has_started_one(launch: Launch) -> bool:
    """
    Of `accelerate launch --cpu --num_processes 2`, which prepares the address for processes to meet at, and starts
    one.
    """
    is_alone = "LOCAL_RANK" not in os.environ and launch.is_one_process
    return is_alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ


# whatever the engine, after what the engine that was asked for refuses
_LAUNCHES: tuple[Refusal[Launch], ...] = (
    alone_of_several("--use_cpu true"),
    Refusal(
        _has_started_one,
        "The launcher was asked for several processes but has started one. Without GPUs, launch with `accelerate "
        "launch --config_file recipes/accelerate/ddp.yaml <script> --use_cpu true`.",
        ValueError,
    ),
)


def check_launch(args: TrainingArguments) -> None:
    """
    Refuse a launch of which Accelerate has dropped a part without a word.

    Raises:
        NotImplementedError: For FSDP1, and FSDP that loads the base model in the first process only.
        ValueError: If the processes, or DeepSpeed or FSDP, that the launcher asked for are not there; the message has
            the command.
    """
    launch = Launch(args)
    for engine in ENGINES.values():
        if engine.is_asked_for(launch):
            refuse(engine.launch_refusals, launch)
    refuse(_LAUNCHES, launch)
