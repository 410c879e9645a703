# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: `fed-trainer serve`, `join`, `status`, `keys` and `policy`."""

from .main import main


__all__ = ["main"]
