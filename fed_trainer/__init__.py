# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federated fine-tuning of adapters with the trainers of TRL and transformers."""

from .aggregation import ClientUpdate
from .aggregation.validation import TooFewClientsError
from .agreement import FailedAloneError
from .client_datasets import ClientDatasets
from .config import FederatedConfig, FederatedDPOConfig, FederatedRewardConfig, FederatedTaskConfig
from .dpo_trainer import FederatedDPOTrainer
from .joining import Invitation, invite, join
from .partition import (
    dirichlet_partition,
    iid_partition,
    natural_partition,
    partition_counts,
    partition_summary,
    pathological_partition,
    quantity_skew_partition,
)
from .reward_trainer import FederatedRewardTrainer
from .sft_trainer import FederatedTrainer
from .task_trainer import FederatedTaskTrainer
from .trainer import FederatedMixin


__all__ = [
    "ClientDatasets",
    "ClientUpdate",
    "FailedAloneError",
    "FederatedConfig",
    "FederatedDPOConfig",
    "FederatedDPOTrainer",
    "FederatedMixin",
    "FederatedRewardConfig",
    "FederatedRewardTrainer",
    "FederatedTaskConfig",
    "FederatedTaskTrainer",
    "FederatedTrainer",
    "Invitation",
    "TooFewClientsError",
    "dirichlet_partition",
    "iid_partition",
    "invite",
    "join",
    "natural_partition",
    "partition_counts",
    "partition_summary",
    "pathological_partition",
    "quantity_skew_partition",
]
