# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""FeDeRA (https://huggingface.co/papers/2404.18848): LoRA that starts from the principal part of the weights."""

from .config import FederaConfig
from .layer import FederaLayer
from .model import FederaModel
from .state import federa_state_dict, load_federa


__all__ = [
    "FederaConfig",
    "FederaLayer",
    "FederaModel",
    "federa_state_dict",
    "load_federa",
]
