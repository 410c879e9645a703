# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
FSDP2 on the CPU, for the processes of test_distributed.py.

Accelerate enables FSDP for several processes on GPUs only. What is pretended is what it detects: that there are GPUs,
though with the backend gloo, and that the device is the CPU (the variable is Accelerate's). All that follows is its
own code on CPU tensors.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend_that_accelerate_found_gpus() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def prepare_backend(state: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend
