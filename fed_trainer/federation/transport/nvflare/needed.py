# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
from typing import Any


__all__ = ["nvflare_module"]


def nvflare_module(name: str) -> Any:
    """
    A module of NVFlare.

    Raises:
        ImportError: If NVFlare is not installed, saying how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"A federation over NVFlare needs NVFlare 2.9 or newer, which cannot be imported here ({error}). Install "
            "it: `pip install 'peft-scl[nvflare]'`."
        ) from error
