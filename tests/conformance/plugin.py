# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The pytest plugin that turns PEFT's tests on `SclConfig` (`pytest -p conformance.plugin`). PEFT's files are not edited:
the rows of their `parametrize` marks are replaced while pytest collects them, and everything without such a row is
left out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from .exceptions import DESELECTIONS, EXCLUSIONS, LEARNING_RATES, LIFTED_SKIPS, Exclusion
from .report import Result
from .rows import scl_rows
from .sabotage import SABOTAGES
from .settings import SUITES


_SUITE_OF_FILE = {suite.file: name for name, suite in SUITES.items()}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--scl-settings", required=True, help="names of the settings, separated by commas")
    group.addoption("--scl-results", required=True, type=Path, help="JSON file to write the results to")
    group.addoption("--scl-sabotage", choices=sorted(SABOTAGES), help="break the tuner first")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "scl_setting(name): the setting of SclConfig that a row belongs to")
    if importlib.util.find_spec("diffusers") is None:
        # PEFT's testing_common.py imports it for one isinstance check
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub
    if config.option.scl_sabotage:
        SABOTAGES[config.option.scl_sabotage]()
    if not hasattr(config, "workerinput"):  # under xdist the controller records what the workers report
        config.pluginmanager.register(_Recorder(config.option.scl_results))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.option.scl_settings.split(",")
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name == "parametrize":
            rows = scl_rows(marker.args[0], marker.args[1], settings)
            if rows is not None:
                markers[index] = pytest.mark.parametrize(marker.args[0], rows).mark


@pytest.hookimpl(tryfirst=True)  # before `-k` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    deselections = {(deselection.suite, deselection.test) for deselection in DESELECTIONS}
    selected, deselected = [], []
    for item in items:
        setting = item.get_closest_marker("scl_setting")
        suite, test = _SUITE_OF_FILE[item.path.name], item.originalname
        if setting is None or (suite, test) in deselections:
            deselected.append(item)
            continue
        selected.append(item)
        item.user_properties += [("suite", suite), ("test", test), ("setting", setting.args[0])]
        for exclusion in EXCLUSIONS:
            if exclusion.concerns(suite, test, setting.args[0]):
                item.add_marker(_has_to_fail(exclusion))
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)
    for lifted in LIFTED_SKIPS:
        module = sys.modules.get(f"peft_tests.{lifted.module}")
        if module is not None:
            # raises if PEFT has renamed the function
            pytest.MonkeyPatch().setattr(module, lifted.function, lambda *args: None)


def _has_to_fail(exclusion: Exclusion) -> pytest.MarkDecorator:
    error = pytest.RaisesExc((AssertionError, ValueError), match=exclusion.message)
    return pytest.mark.xfail(raises=error, strict=True, reason=exclusion.reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    # PEFT's tests start from wherever the generator is: what they draw would depend on the tests before them
    torch.manual_seed(0)
    key = (_SUITE_OF_FILE[item.path.name], item.originalname, item.callspec.params.get("model_id"))
    rates = {(rate.suite, rate.test, rate.model_id): rate.lr for rate in LEARNING_RATES}
    if key not in rates:
        return (yield)
    with mock.patch.object(torch.optim, "SGD", _sgd_with(rates[key])):
        return (yield)


def _sgd_with(lr: float) -> Callable[..., torch.optim.Optimizer]:
    optimizer = torch.optim.SGD
    return lambda parameters, **kwargs: optimizer(parameters, **{**kwargs, "lr": lr})


class _Recorder:
    """Writes every result to a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: list[Result] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        properties: dict[str, Any] = dict(report.user_properties)
        self.results.append(
            Result(
                suite=properties["suite"],
                setting=properties["setting"],
                test=properties["test"],
                nodeid=report.nodeid,
                outcome="excluded" if report.skipped and hasattr(report, "wasxfail") else report.outcome,
                message=_message(report),
                seconds=report.duration,
            )
        )

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps([asdict(result) for result in self.results]))


def _message(report: pytest.TestReport) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: path, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext
