# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from .base import Aggregator, ClientUpdate
from .factors import FactorPair, add_to_base, check_foldable, factor_pairs, truncate_ranks
from .fedavg import FedAvg, FedNova
from .fedex_lora import FedExLoRA, LoRAFair
from .flexlora import FlexLoRA
from .flora import FLoRA
from .hetlora import HetLoRA, pruned_rank, pruning_penalty
from .low_rank import LowRank, LowRankSum
from .methods import METHODS, Method, check_adapter
from .robust import CoordinateMedian, GeometricMedian, Krum, MultiKrum, NormBounding, TrimmedMean
from .slora import SLoRA, densify, lora_start, shared_mask
from .validation import InvalidUpdateError, TooFewClientsError, require_clients, state_digest, validated


__all__ = [
    "METHODS",
    "Aggregator",
    "ClientUpdate",
    "CoordinateMedian",
    "FLoRA",
    "FactorPair",
    "FedAvg",
    "FedExLoRA",
    "FedNova",
    "FlexLoRA",
    "GeometricMedian",
    "HetLoRA",
    "InvalidUpdateError",
    "Krum",
    "LoRAFair",
    "LowRank",
    "LowRankSum",
    "Method",
    "MultiKrum",
    "NormBounding",
    "SLoRA",
    "TooFewClientsError",
    "TrimmedMean",
    "add_to_base",
    "check_adapter",
    "check_foldable",
    "densify",
    "factor_pairs",
    "lora_start",
    "pruned_rank",
    "pruning_penalty",
    "require_clients",
    "shared_mask",
    "state_digest",
    "truncate_ranks",
    "validated",
]
