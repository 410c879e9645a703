# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federations of every kind give the values that are committed, but for rounding.

Bit for bit they are compared by `benchmarks/same_bits.py`, on one machine. After a change that is meant to change values,
`python benchmarks/same_bits.py --write` writes `golden_values.json` anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOLDEN = json.loads(Path(__file__).with_name("golden_values.json").read_text(encoding="utf-8"))

sys.path.insert(0, str(BENCHMARKS))
from same_bits_cases import CASES, make_model, run  # noqa: E402
from same_bits_outcome import golden_values, read_outcome  # noqa: E402


sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "model"
    make_model(folder)
    return folder


def test_every_case_that_can_be_has_its_values():
    assert list(GOLDEN) == [name for name, case in CASES.items() if case.is_golden]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_values_are_those_that_are_committed(name, model, tmp_path):
    run(name, model, tmp_path)
    values = golden_values(read_outcome(tmp_path))
    assert values.keys() == GOLDEN[name].keys()
    for path, expected in GOLDEN[name].items():
        if not isinstance(expected, int):  # byte counts hold exactly
            expected = pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert values[path] == expected, path
