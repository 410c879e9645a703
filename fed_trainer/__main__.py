# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m fed_trainer`, which `accelerate launch -m` takes."""

from __future__ import annotations

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
