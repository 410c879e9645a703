# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from .base import Aggregator, ClientUpdate
from .fedavg import FedAvg, FedNova
from .fedex_lora import FedExLoRA, LoRAFair
from .flexlora import FlexLoRA
from .flora import FLoRA
from .hetlora import HetLoRA, pruned_rank, pruning_penalty
from .methods import METHODS, Method
from .robust import CoordinateMedian, GeometricMedian, Krum, MultiKrum, NormBounding, TrimmedMean
from .slora import SLoRA, densify, lora_start, shared_mask


__all__ = [
    "METHODS",
    "Aggregator",
    "ClientUpdate",
    "CoordinateMedian",
    "FLoRA",
    "FedAvg",
    "FedExLoRA",
    "FedNova",
    "FlexLoRA",
    "GeometricMedian",
    "HetLoRA",
    "Krum",
    "LoRAFair",
    "Method",
    "MultiKrum",
    "NormBounding",
    "SLoRA",
    "TrimmedMean",
    "densify",
    "lora_start",
    "pruned_rank",
    "pruning_penalty",
    "shared_mask",
]
