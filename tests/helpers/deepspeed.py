# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed, which `make env` puts into a folder of its own, apart from what other tests import."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


DEEPSPEED = os.environ.get("DEEPSPEED_FOLDER", "")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None or Path(DEEPSPEED, "deepspeed").is_dir()

needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: run `make env`")
