# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How packets get from the server to clients and back, chosen by where the clients are."""

from .base import Packets, Transport
from .in_process import InProcess
from .store import Store


__all__ = ["InProcess", "Packets", "Store", "Transport"]
