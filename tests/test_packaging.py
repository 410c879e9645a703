# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the source distribution holds."""

import shutil
import subprocess
import sys
import tarfile

from helpers.paths import ROOT


def test_the_source_distribution_holds_the_packages_and_no_tests_that_cannot_run(tmp_path):
    """The tests need the recipes and the benchmarks, which are no part of the package; alone they would only fail."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("peft_scl", "fed_trainer", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as sdist:
        files = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    assert not [name for name in files if name.startswith("tests/")]
    packages = {
        path.relative_to(ROOT).as_posix()
        for name in ("peft_scl", "fed_trainer")
        for path in (ROOT / name).rglob("*.py")
    }
    assert packages <= files
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "peft_scl/py.typed", "fed_trainer/py.typed"} <= files
