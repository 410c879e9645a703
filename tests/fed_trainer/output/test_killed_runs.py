# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT, TESTS


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [8, pytest.param(28, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(kills, tiny_model_dir: Path, tmp_path: Path) -> None:
    """
    SIGKILL at many places: in local rounds, while the record, a checkpoint, a client's file or the final adapter is
    written, and while a round is published.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_run.py")), str(tiny_model_dir), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["wrong"] == []
    assert len(report["places"]) == kills
    kinds = {place.split()[0] for place in report["places"]}
    assert len(kinds - {"before", "after"}) >= 3 and kinds & {"before", "after"}, report["places"]
