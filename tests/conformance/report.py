# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of a run: the table, the reasons of the skips, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .exceptions import EXCLUSIONS, Exclusion
from .settings import DEFAULTS, DEFAULTS_PASSED_AT_LEAST, SUITES, Selection


OUTCOMES = ("passed", "failed", "skipped", "excluded")


@dataclass(frozen=True)
class Result:
    """One report of pytest. `outcome` is one of `OUTCOMES`; `excluded` is a failure that an `Exclusion` expects."""

    suite: str
    setting: str
    test: str
    nodeid: str
    outcome: str
    message: str
    seconds: float


def table(results: Iterable[Result], selection: Selection) -> str:
    """Markdown table `passed / failed / skipped / excluded` of settings by suites."""
    counts = Counter((result.setting, result.suite, result.outcome) for result in results)

    def cell(settings: Iterable[str], suites: Iterable[str]) -> str:
        pairs = [(setting, suite) for setting in settings for suite in suites]
        numbers = [sum(counts[setting, suite, outcome] for setting, suite in pairs) for outcome in OUTCOMES]
        return " / ".join(map(str, numbers)) if any(numbers) else "-"

    rows = [["", *selection.suites, "all"]]
    for setting in selection.settings:
        rows.append(
            [setting, *(cell([setting], [suite]) for suite in selection.suites), cell([setting], selection.suites)]
        )
    every = selection.settings
    rows.append(["all", *(cell(every, [suite]) for suite in selection.suites), cell(every, selection.suites)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def skip_reasons(results: Iterable[Result]) -> str:
    """One line per reason of PEFT's skips, the most frequent first."""
    skipped = [result for result in results if result.outcome == "skipped"]
    reasons = Counter(result.message for result in skipped)
    lines = []
    for reason, count in reasons.most_common():
        tests = sorted({result.test for result in skipped if result.message == reason})
        lines.append(f"{count:5d}  {reason}  ({', '.join(tests)})")
    return "\n".join(lines)


def failures(results: Iterable[Result]) -> str:
    """One line per failing test function and setting, the most frequent first."""
    failed = [result for result in results if result.outcome == "failed"]
    groups = Counter((result.suite, result.test, result.setting) for result in failed)
    return "\n".join(
        f"{count:5d}  {suite}: {test} [{setting}]" for (suite, test, setting), count in groups.most_common()
    )


def problems(
    results: Iterable[Result], selection: Selection, exclusions: Iterable[Exclusion] = EXCLUSIONS
) -> list[str]:
    """What keeps a run from being accepted, as sentences; empty if all is well."""
    results = list(results)
    found = []
    failed = sum(result.outcome == "failed" for result in results)
    if failed:
        found.append(f"Failed tests: {failed}.")
    passed = Counter((result.suite, result.setting) for result in results if result.outcome == "passed")
    for suite in selection.suites:
        if suite not in selection.whole:
            if not any(passed[suite, setting] for setting in selection.settings):
                found.append(f"No test of the suite {suite!r} passed.")
            continue
        for setting in selection.settings:
            least = _least(suite, setting)
            if passed[suite, setting] < least:
                found.append(
                    f"Only {passed[suite, setting]} tests of the suite {suite!r} passed with the setting {setting!r}, but at "
                    f"least {least} should: are they skipped, or does PEFT parametrize them in another way?"
                )
    return found + _unused(results, selection, exclusions)


def _least(suite: str, setting: str) -> int:
    if setting == DEFAULTS:
        return DEFAULTS_PASSED_AT_LEAST if suite == "custom" else 0
    return SUITES[suite].passed_at_least


def _unused(results: list[Result], selection: Selection, exclusions: Iterable[Exclusion]) -> list[str]:
    excluded = {(result.suite, result.test, result.setting) for result in results if result.outcome == "excluded"}
    return [
        f"The exclusion of {test} for the setting {setting!r} matched no failure of the suite {suite!r}: remove it."
        for exclusion in exclusions
        for suite, test in exclusion.tests
        for setting in exclusion.settings
        if suite in selection.suites
        and suite in selection.whole
        and setting in selection.settings
        and (suite, test, setting) not in excluded
    ]
