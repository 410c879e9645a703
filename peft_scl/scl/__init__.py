# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Sequential Compression Layers (https://huggingface.co/papers/2412.07021): a small trained map in series in the FFN.
"""

from .config import SclConfig
from .layer import SclLayer
from .model import SclModel


__all__ = ["SclConfig", "SclLayer", "SclModel"]
