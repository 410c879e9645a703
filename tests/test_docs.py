# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of README and docs can be copied: they compile, and import what there is."""

import ast
import importlib
import re

import pytest

from helpers.paths import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "recipes").glob("*.md"))]
BLOCKS = [
    pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 2}")
    for page in PAGES
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
]
OURS = ("fed_trainer", "peft_scl")


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_block_is_python_and_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_there_are_blocks():
    assert len(BLOCKS) > 10
