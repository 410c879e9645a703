# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Run PEFT's own generic tests against `SclConfig`: `PYTHONPATH=tests python -m conformance`. The exit status is 0 only
if no test failed that is not excluded (exceptions.py), no exclusion is out of date and no setting passed by skipping.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from . import report
from .exceptions import DESELECTIONS, EXCLUSIONS, LEARNING_RATES, LIFTED_SKIPS
from .peft_source import fetch_source, unpack_tests
from .report import Result
from .sabotage import SABOTAGES
from .settings import DEFAULTS, EVERYTHING, FAST, SETTINGS, SUITES, Selection
from .tiny_models import build_models


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".conformance"


def main() -> int:
    args = _parse()
    selection = FAST if args.fast else EVERYTHING
    selection = replace(
        selection,
        suites=tuple(args.suite or selection.suites),
        settings=tuple(args.setting or selection.settings),
    )
    if args.k is not None:
        selection = replace(selection, keyword=args.k, whole=())
    installed = version("peft")
    archive = fetch_source(args.peft_version or installed, CACHE)
    print(f"The tests of {archive.name} against the installed PEFT {installed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="conformance-") as work:
        results = _run_pytest(Path(work), archive, selection, args.n, args.sabotage)
    problems = report.problems(results, selection)
    _print(results, selection, problems)
    if args.json is not None:
        record = {
            "peft": installed,
            "tests": archive.name,
            **asdict(selection),
            "problems": problems,
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(record, indent=1))
    return 1 if problems else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="the part that runs before every push (settings.FAST)")
    parser.add_argument("--suite", action="append", choices=SUITES, help="repeatable; all if not given")
    parser.add_argument(
        "--setting", action="append", choices=[*SETTINGS, DEFAULTS], help="repeatable; all if not given"
    )
    parser.add_argument("-n", type=int, default=0, help="worker processes (pytest-xdist)")
    parser.add_argument("-k", help="pytest's -k expression; the least numbers of passed tests do not apply then")
    parser.add_argument("--peft-version", help="the release whose tests are run, by default the installed one")
    parser.add_argument("--json", type=Path, help="write every single result to this file")
    parser.add_argument("--sabotage", choices=SABOTAGES, help="break the tuner, to see the suite fail")
    return parser.parse_args()


def _run_pytest(work: Path, archive: Path, selection: Selection, workers: int, sabotage: str | None) -> list[Result]:
    """Run pytest in `work`, which gets the tests and the models; the results of all tests that were selected."""
    unpack_tests(archive, work / "peft_tests")
    build_models(work)
    # an ini file of its own, or pytest would look for one in the parent folders
    (work / "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
    output = work / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=native",
        "-p",
        "no:cacheprovider",
        "-p",
        "conformance.plugin",
    ]
    command += ["--scl-settings", ",".join(selection.settings), "--scl-results", str(output)]
    if workers:
        command += ["-n", str(workers)]
    if selection.keyword is not None:
        command += ["-k", selection.keyword]
    if sabotage is not None:
        command += ["--scl-sabotage", sabotage]
    command += [f"peft_tests/{SUITES[suite].file}" for suite in selection.suites]
    search_path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(search_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    status = subprocess.run(command, cwd=work, env=environment).returncode
    if status not in (0, 1):  # 1: some tests failed
        raise SystemExit(
            f"pytest ended with status {status}, so the results are not complete; its messages are above."
        )
    return [Result(**result) for result in json.loads(output.read_text())]


def _print(results: list[Result], selection: Selection, problems: list[str]) -> None:
    print("\nSkipped by PEFT's suite:")
    print(report.skip_reasons(results))
    excluded = Counter(
        (result.suite, result.test, result.setting) for result in results if result.outcome == "excluded"
    )
    print("\nExcluded (run, and failed as they have to):")
    for exclusion in EXCLUSIONS:
        count = sum(number for key, number in excluded.items() if exclusion.concerns(*key))
        print(f"{count:5d}  {exclusion.reason} Precedent: {exclusion.precedent}")
    print("\nRun with another learning rate:")
    for rate in LEARNING_RATES:
        print(
            f"       {rate.suite}: {rate.test} ({rate.model_id}), lr={rate.lr}. {rate.reason} Precedent: {rate.precedent}"
        )
    print("\nSkips of PEFT's suite that are lifted:")
    for lifted in LIFTED_SKIPS:
        print(f"       {lifted.module}: {lifted.function}. {lifted.reason}")
    print("\nNot generic, left out:")
    for deselection in DESELECTIONS:
        print(f"       {deselection.suite}: {deselection.test}. {deselection.reason}")
    print("\npassed / failed / skipped / excluded")
    print(report.table(results, selection))
    if problems:
        print("\nNot accepted:")
        print(report.failures(results))
        print("\n".join(problems))


if __name__ == "__main__":
    sys.exit(main())
