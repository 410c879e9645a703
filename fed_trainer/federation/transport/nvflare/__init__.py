# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Packets through NVFlare: its jobs, its connections and its certificates carry them."""

from .address import NVFlare, NVFlareJob


__all__ = ["NVFlare", "NVFlareJob"]
