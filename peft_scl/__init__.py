# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Sequential Compression Layers and FeDeRA as PEFT tuners. Importing this package registers the PEFT types `SCL` and
`FEDERA`.
"""

from .federa import FederaConfig, FederaLayer, FederaModel, federa_state_dict, load_federa
from .lora import LoraExport, to_lora
from .registration import register_tuner
from .scl import SclConfig, SclLayer, SclModel


__all__ = [
    "FederaConfig",
    "FederaLayer",
    "FederaModel",
    "LoraExport",
    "SclConfig",
    "SclLayer",
    "SclModel",
    "federa_state_dict",
    "load_federa",
    "to_lora",
]
__version__ = "0.1.0.dev0"

register_tuner("scl", SclConfig, SclModel)
register_tuner("federa", FederaConfig, FederaModel, prefix="lora_")
