# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The steps of a message between a client and the server."""

from .base import Pipeline, Step
from .dtype import WIRE_DTYPES, DtypeStep


__all__ = ["CODECS", "WIRE_DTYPES", "DtypeStep", "Pipeline", "Step"]

CODECS: dict[str, type[Step]] = {
    "dtype": DtypeStep,
}
"""By the name in the config (`codecs`)."""
