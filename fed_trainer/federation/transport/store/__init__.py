# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Packets through any address that fsspec opens."""

from .address import Store


__all__ = ["Store"]
