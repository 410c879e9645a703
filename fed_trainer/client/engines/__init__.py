# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Engines: what runs the model of a client, with one file each. Whatever differs between them is asked of an [`Engine`].
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType

from .base import Engine
from .deepspeed import DeepSpeed
from .fsdp import FSDP2


__all__ = ["ENGINES", "Engine", "engine_of"]

# all others are one process, or DDP
ENGINES: dict[DistributedType, type[Engine]] = {
    DistributedType.FSDP: FSDP2,
    DistributedType.DEEPSPEED: DeepSpeed,
}


def engine_of(state: Any) -> Engine:
    """
    The engine of a launch.

    Args:
        state ([`~accelerate.state.PartialState`]):
            What Accelerate knows of it: `accelerator.state`, or before there is one `args.distributed_state`, to which
            FSDP2 is several processes.
    """
    return ENGINES.get(state.distributed_type, Engine)(state)
