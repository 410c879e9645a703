# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


__all__ = ["format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left_columns: Sequence[str] = ()) -> str:
    """
    Lays out a table as plain text: two spaces between columns, a rule under the header, no space at the end of a line.

    Args:
        header (`Sequence[str]`):
            The names of the columns.
        rows (`Sequence[Sequence[str]]`):
            The cells, each row as long as the header.
        left_columns (`Sequence[str]`, *optional*, defaults to `()`):
            The names of the columns that are aligned to the left. The others, numbers as a rule, go to the right.

    Returns:
        `str`: The table, without a line break at the end.
    """
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, ["-" * width for width in widths], *rows):
        aligned = [
            cell.ljust(width) if name in left_columns else cell.rjust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
