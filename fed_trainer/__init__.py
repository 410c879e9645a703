# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federated fine-tuning of adapters with the trainers of TRL and transformers."""

from .client.agreement import FailedAloneError
from .client.joining import Invitation, invite, join
from .config import FederatedConfig, FederatedDPOConfig, FederatedRewardConfig, FederatedTaskConfig
from .data.client_datasets import ClientDatasets
from .data.partition import (
    dirichlet_partition,
    iid_partition,
    natural_partition,
    partition_counts,
    partition_summary,
    pathological_partition,
    quantity_skew_partition,
)
from .federation.transport import Store
from .federation.validation import TooFewClientsError
from .methods.aggregation import ClientUpdate
from .output.record import read_record
from .trainers.dpo import FederatedDPOTrainer
from .trainers.mixin import FederatedMixin
from .trainers.reward import FederatedRewardTrainer
from .trainers.sft import FederatedTrainer
from .trainers.task import FederatedTaskTrainer


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
    "Store",
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
    "read_record",
]
