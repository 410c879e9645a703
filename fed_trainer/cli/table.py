# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The live table of a coordinator, in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .status import table


__all__ = ["live_table"]


@contextmanager
def live_table() -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """
    Within, what the yielded function is called with is shown in place of what was shown before; `None` where there is
    no terminal, or no package `rich`.
    """
    try:
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        yield None
        return
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Live(console=Console(stderr=True), auto_refresh=False) as live:

        def show(content: Mapping[str, Any]) -> None:
            lines = [f"Round {content['round']} of {content['num_rounds']}", *table(dict(content["clients"]))]
            live.update(Text("\n".join(lines)), refresh=True)

        yield show
