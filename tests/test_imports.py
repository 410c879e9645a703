# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The contract on imports in `pyproject.toml`: downhill, room by room, and no circles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports('pyproject.toml', no_cache=True))"


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-c", LINT], cwd=tree, env=environment, capture_output=True, text=True)


def test_imports_run_downhill_and_in_no_circle() -> None:
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


# a line that breaks a contract, by file
BREAKS = {
    "The tuners know nothing of federations": ("peft_scl/linalg.py", "import fed_trainer.config"),
    "The rooms of fed_trainer: imports run downhill": (
        "fed_trainer/federation/server.py",
        "from ..client.live.state import LiveState",
    ),
    "The server's side, the methods and the state know no model": ("fed_trainer/federation/plan.py", "import peft"),
    "No circles": ("fed_trainer/output/owned.py", "from . import checkpoint"),
}


def test_a_line_that_breaks_a_contract_is_found(tmp_path: Path) -> None:
    for name in ("fed_trainer", "peft_scl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in BREAKS.values():
        file = tmp_path / name
        file.write_text(f"{file.read_text()}\n\ndef broken() -> None:\n    {line}\n")
    found = lint(tmp_path)
    assert found.returncode == 1
    for contract in BREAKS:
        assert f"{contract} BROKEN" in found.stdout, found.stdout
