# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The harness that runs PEFT's tests, on stand-ins of them: no download, no model."""

import dataclasses
import io
import json
import subprocess
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest
from peft import LoraConfig, PeftConfig

from peft_scl import SclConfig

from .exceptions import EXCLUSIONS, Exclusion
from .peft_source import fetch_source, unpack_tests
from .report import Result, problems, skip_reasons, table
from .rows import scl_rows
from .settings import CUSTOM_MODELS, DEFAULTS, EVERYTHING, SETTINGS, SUITES, Selection


pytest_plugins = ["pytester"]

CUSTOM = "test_name, model_id, config_cls, config_kwargs"
# which layers are wrapped, and what else is trained, is the choice of the tests
CHOSEN_BY_THE_TESTS = {
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_weights",
    "trainable_token_indices",
}


def test_settings_depend_on_no_default_of_the_config():
    own_fields = {field.name for field in dataclasses.fields(SclConfig)}
    own_fields -= {field.name for field in dataclasses.fields(PeftConfig)}
    for setting in SETTINGS.values():
        assert set(setting.fields) == own_fields - CHOSEN_BY_THE_TESTS
        SclConfig(**setting.config_kwargs(32))


def test_rows_name_the_config_class_the_setting_and_its_arguments():
    rows = scl_rows("config_class, mandatory_kwargs", [(LoraConfig, {})], ["replace", "bottleneck_full_delta"])
    assert [row.id for row in rows] == ["replace", "bottleneck_full_delta"]
    assert [row.marks[0].args for row in rows] == [("replace",), ("bottleneck_full_delta",)]
    assert [row.values[0] for row in rows] == [SclConfig, SclConfig]
    assert rows[1].values[1]["train_down_proj"] == "full"


@pytest.mark.parametrize("plain", [False, True])
def test_rows_keep_the_task_type_of_the_file(plain):
    old = (LoraConfig, {"task_type": "SEQ_CLS", "r": 8})
    (row,) = scl_rows(["config_cls", "config_kwargs"], [old if plain else pytest.param(*old)], ["replace"])
    assert row.values == (
        SclConfig,
        {"task_type": "SEQ_CLS", "target_modules": None, "r": 32, **SETTINGS["replace"].fields},
    )


def test_tests_that_take_a_class_only_run_with_the_defaults():
    (row,) = scl_rows("config_cls", [LoraConfig], ["replace", DEFAULTS])
    assert row.values == (SclConfig,)
    assert scl_rows("config_cls", [LoraConfig], ["replace"]) == []


def test_rows_of_two_adapters_do_not_start_at_the_base_model():
    names = "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2"
    same, different = scl_rows(names, [], ["replace"])
    assert [same.values[3]["r"], same.values[4]["r"]] == [10, 10]
    assert [different.values[3]["r"], different.values[4]["r"]] == [10, 2]
    assert not any(kwargs["init_weights"] for row in (same, different) for kwargs in row.values[3:])


def test_marks_without_a_config_class_are_left_alone():
    assert scl_rows("model_id", ["gpt2"], SETTINGS) is None
    assert scl_rows("test_name, config0, config1", [], SETTINGS) is None


def test_the_rank_suits_every_wrapped_layer():
    ranks = {
        name: {row.id.removeprefix(f"{name}-"): row.values[3]["r"] for row in scl_rows(CUSTOM, [], [name])}
        for name in ("replace", "replace_low_rank", "replace_gelu", "bottleneck")
    }
    one_layer = {"lin0": 10, "lin1": 2, "regex": 10, "excluded": 10, "modules_to_save": 10, "conv1d": 1}
    assert ranks["replace"] == one_layer  # no rank is full in both of two layers
    assert ranks["replace_gelu"] == {**one_layer, "two_layers": 2}
    # half of rank 1 is none
    assert ranks["replace_low_rank"] == {
        **{name: rank // 2 for name, rank in one_layer.items() if rank > 1},
        "two_layers": 1,
    }
    assert ranks["bottleneck"] == dict.fromkeys(CUSTOM_MODELS, 4)


def test_no_test_is_excluded_twice():
    excluded = Counter(
        (*test, setting) for exclusion in EXCLUSIONS for test in exclusion.tests for setting in exclusion.settings
    )
    assert set(excluded.values()) == {1}
    assert {suite for suite, _, _ in excluded} <= set(SUITES)


# A stand-in of PEFT's test_custom_models.py. The settings "replace_gelu" and "replace" are one that is excluded from
# test_disable_adapters and one that is not.
PEFT_TESTS = """
import pytest
import torch
from peft import LoraConfig

from . import testing_common

TEST_CASES = [("LoRA", "MLP", LoraConfig, {{}}), ("LoRA 2", "MLP", LoraConfig, {{}})]

class TestCustom:
    @pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", TEST_CASES)
    def test_disable_adapters(self, test_name, model_id, config_cls, config_kwargs):
        if config_kwargs["activation"] == "gelu":
            {excluded}

    @pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", TEST_CASES)
    def test_parameters_after_loading_model(self, test_name, model_id, config_cls, config_kwargs):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        assert optimizer.defaults["lr"] == (0.01 if model_id == "MLP" else 0.5)

    @pytest.mark.parametrize("config_cls", [LoraConfig])
    def test_conv1d(self, config_cls):
        testing_common._skip_if_conv1d_not_supported("gpt2", config_cls, {{}})

    @pytest.mark.parametrize("config_cls", [LoraConfig])
    def test_default_target_modules_str(self, config_cls):
        raise RuntimeError("this test is not generic")

    def test_something_of_lora(self):
        raise RuntimeError("this test is not generic")
"""
TESTING_COMMON = """
import pytest

def _skip_if_conv1d_not_supported(model_id, config_cls, config_kwargs):
    pytest.skip("This PEFT method does not support Conv1D layers, skipping this test.")
"""


@pytest.fixture
def run_stand_in(pytester):
    """
    `run_stand_in(excluded)`: run `PEFT_TESTS` with `excluded` as the body of the excluded test; outcomes by test.
    """

    def run(excluded):
        pytester.mkpydir("peft_tests")
        (pytester.path / "peft_tests/test_custom_models.py").write_text(PEFT_TESTS.format(excluded=excluded))
        (pytester.path / "peft_tests/testing_common.py").write_text(TESTING_COMMON)
        settings = f"replace,replace_gelu,{DEFAULTS}"
        pytester.runpytest_inprocess(
            *("-p", "conformance.plugin", "-p", "no:xdist", "-p", "no:cacheprovider"),
            *("--scl-settings", settings, "--scl-results", "results.json", "peft_tests"),
        )
        results = [Result(**result) for result in json.loads((pytester.path / "results.json").read_text())]
        outcomes = {}
        for result in results:
            outcomes.setdefault((result.test, result.setting), set()).add(result.outcome)
        return outcomes

    return run


def test_the_plugin_runs_what_is_generic_with_our_rows(run_stand_in):
    assert run_stand_in("assert torch.allclose(torch.zeros(1), torch.ones(1))") == {
        ("test_disable_adapters", "replace"): {"passed"},
        ("test_disable_adapters", "replace_gelu"): {"excluded"},
        ("test_parameters_after_loading_model", "replace"): {"passed"},
        ("test_parameters_after_loading_model", "replace_gelu"): {"passed"},
        ("test_conv1d", DEFAULTS): {"passed"},
    }


@pytest.mark.parametrize("excluded", ["pass", "assert False, 'another message'", "raise RuntimeError('allclose')"])
def test_an_excluded_test_has_to_fail_as_it_is_said_to(run_stand_in, excluded):
    outcomes = run_stand_in(excluded)
    assert outcomes["test_disable_adapters", "replace_gelu"] == {"failed"}
    assert outcomes["test_disable_adapters", "replace"] == {"passed"}


def _result(suite="config", setting="replace", test="test_methods", outcome="passed", message=""):
    return Result(suite, setting, test, f"{suite}::{test}[{setting}]", outcome, message, 0.1)


SELECTION = Selection(("config",), ("replace", "bottleneck"), keyword=None, whole=("config",))
ENOUGH = [_result(setting=setting) for setting in SELECTION.settings for _ in range(SUITES["config"].passed_at_least)]


def test_a_run_in_which_enough_passed_is_accepted():
    assert problems([*ENOUGH, _result(outcome="skipped", message="LoRA only")], SELECTION, exclusions=()) == []


def test_a_failure_is_a_problem():
    assert problems([*ENOUGH, _result(outcome="failed")], SELECTION, exclusions=()) == ["Failed tests: 1."]


def test_a_setting_cannot_pass_by_skipping():
    skipped = [dataclasses.replace(result, outcome="skipped") for result in ENOUGH if result.setting == "bottleneck"]
    passed = [result for result in ENOUGH if result.setting == "replace"]
    (problem,) = problems(passed + skipped, SELECTION, exclusions=())
    assert problem.startswith("Only 0 tests of the suite 'config' passed with the setting 'bottleneck'")


def test_a_keyword_that_leaves_no_test_is_a_problem():
    selection = Selection(("config", "custom"), SELECTION.settings, keyword="test_methods", whole=())
    assert problems(ENOUGH[:1], selection) == ["No test of the suite 'custom' passed."]


def test_an_exclusion_that_no_failure_needs_is_a_problem():
    exclusion = Exclusion(
        tests=(("config", "test_methods"), ("decoder", "test_generate")),
        settings=("replace", "replace_gelu"),
        message="",
        reason="",
        precedent="",
    )
    assert problems([*ENOUGH, _result(outcome="excluded")], SELECTION, [exclusion]) == []
    assert problems(ENOUGH, SELECTION, [exclusion]) == [
        "The exclusion of test_methods for the setting 'replace' matched no failure of the suite 'config': remove it."
    ]


def test_the_table_counts_every_outcome():
    outcomes = ["passed", "passed", "failed", "skipped", "excluded", "excluded"]
    results = [_result(outcome=outcome) for outcome in outcomes]
    assert table(results, SELECTION).splitlines() == [
        "|            | config        | all           |",
        "|------------|---------------|---------------|",
        "| replace    | 2 / 1 / 1 / 2 | 2 / 1 / 1 / 2 |",
        "| bottleneck | -             | -             |",
        "| all        | 2 / 1 / 1 / 2 | 2 / 1 / 1 / 2 |",
    ]


def test_skips_are_grouped_by_their_reason():
    results = [_result(outcome="skipped", message="LoRA only", test=f"test_{name}") for name in "aab"]
    assert skip_reasons(results).split("  ")[-3:] == ["3", "LoRA only", "(test_a, test_b)"]


def test_every_setting_and_suite_has_a_least_number_of_passed_tests():
    found = problems([], EVERYTHING, exclusions=())
    assert len(found) == len(SETTINGS) * len(SUITES) + 1


def test_without_the_source_distribution_nothing_runs(tmp_path, monkeypatch):
    def no_network(command, **kwargs):
        assert command[-1] == "peft==0.0.1"
        return SimpleNamespace(stdout="", stderr="ERROR: No matching distribution found for peft==0.0.1")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(SystemExit, match="could not be downloaded") as error:
        fetch_source("0.0.1", tmp_path / "cache")
    assert "No matching distribution" in str(error.value)


def test_a_source_distribution_is_fetched_once_and_only_its_tests_are_unpacked(tmp_path, monkeypatch):
    def download(command, **kwargs):
        with tarfile.open(tmp_path / "peft-0.0.1.tar.gz", "w:gz") as archive:
            for name in ("tests/test_config.py", "tests/conftest.py", "tests/data/test_x.py", "src/peft/config.py"):
                content = f"# {name}".encode()
                member = tarfile.TarInfo(f"peft-0.0.1/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(subprocess, "run", None)
        return SimpleNamespace(stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    assert fetch_source("0.0.1", tmp_path) == fetch_source("0.0.1", tmp_path)
    unpack_tests(fetch_source("0.0.1", tmp_path), tmp_path / "peft_tests")
    unpacked = {path.name: path.read_text() for path in (tmp_path / "peft_tests").iterdir()}
    assert unpacked == {"__init__.py": "", "test_config.py": "# tests/test_config.py"}
