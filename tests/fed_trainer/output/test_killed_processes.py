# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.deepspeed import DEEPSPEED, needs_deepspeed
from helpers.paths import ROOT, TESTS


ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launched", "kills"),
    [
        pytest.param({}, 2, id="ddp, twice"),
        pytest.param({}, 4, id="ddp", marks=pytest.mark.slow),
        pytest.param(ZERO2, 2, id="zero2", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_processes_that_are_killed_go_on_to_the_same_bits(launched, kills, tiny_model_dir, tmp_path):
    """SIGKILL of the process that writes, or of the other, while rounds are trained and written."""
    environment = {**os.environ, **launched}
    folders = [str(ROOT), str(TESTS), *([DEEPSPEED] if launched and DEEPSPEED else [])]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    environment["PATH"] = os.pathsep.join([str(Path(DEEPSPEED, "bin")), os.environ["PATH"]])  # ninja
    result = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("kill_processes.py")),
            str(tiny_model_dir),
            str(tmp_path),
            str(kills),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["wrong"] == []
    assert len(report["places"]) == kills
