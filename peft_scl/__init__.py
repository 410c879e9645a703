# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Sequential Compression Layers as a PEFT tuner. Importing this package registers the PEFT type `SCL`."""

from .registration import register_tuner  # noqa: I001  (the type must exist before the config refers to it)
from .config import SclConfig
from .layer import SclLayer
from .lora import LoraExport, to_lora
from .model import SclModel


__all__ = ["LoraExport", "SclConfig", "SclLayer", "SclModel", "to_lora"]
__version__ = "0.1.0.dev0"

register_tuner("scl", SclConfig, SclModel)
