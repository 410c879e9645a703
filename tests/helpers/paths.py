# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where things are in a clone."""

from __future__ import annotations

from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
BENCHMARKS = ROOT / "benchmarks"
