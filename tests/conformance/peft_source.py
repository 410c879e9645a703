# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT's test files. The wheel does not contain them, the source distribution does."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path


def fetch_source(version: str, cache: Path) -> Path:
    """
    The source distribution of PEFT `version`, downloaded by name into `cache` unless it is there.

    Raises:
        SystemExit: If pip cannot download it, for instance without a network.
    """
    archive = cache / f"peft-{version}.tar.gz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--disable-pip-version-check"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, "--dest", str(cache), f"peft=={version}"],
        capture_output=True,
        text=True,
    )
    if not archive.exists():
        said = (pip.stderr or pip.stdout).strip()
        raise SystemExit(
            f"{said}\n\nThe source distribution of PEFT {version} could not be downloaded (pip's message is above), and PEFT's "
            f"tests are not in the installed wheel, so nothing was run. Try again with a connection to the package index, "
            f"or put peft-{version}.tar.gz into {cache}."
        )
    return archive


def unpack_tests(archive: Path, package: Path) -> None:
    """Unpack the test modules of the source distribution as the package `package`, without PEFT's pytest settings."""
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            path = Path(member.name)  # peft-<version>/tests/<name>.py
            if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py" and path.stem != "conftest":
                (package / path.name).write_bytes(source.extractfile(member).read())  # type: ignore[union-attr]
