# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks of the engine and of many clients run, and print the keys that are documented; their figures are not
looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.paths import BENCHMARKS


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def result(name: str, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / name), *options, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_many_clients():
    few = ("--num_clients", "4", "8", "--clients_per_round", "2", "--num_rounds", "2")
    figures = result("many_clients.py", *few)
    keys = {"startup_seconds", "memory_growth_mib", "round_ratio", "round_ratio_without_preparing", "by_num_clients"}
    assert figures.keys() == keys
    assert set(figures["by_num_clients"]) == {"4", "8"}


def test_engine_reuse():
    figures = result("engine_reuse.py", "--engines", "plain", "--repetitions", "1")
    assert figures["plain_over_fresh_trainer"] > 0
