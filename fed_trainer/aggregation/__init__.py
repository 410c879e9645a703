# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from .base import Aggregator, ClientUpdate
from .fedavg import FedAvg


__all__ = ["AGGREGATIONS", "Aggregator", "ClientUpdate", "FedAvg"]

AGGREGATIONS: dict[str, type[Aggregator]] = {
    "fedavg": FedAvg,
}
