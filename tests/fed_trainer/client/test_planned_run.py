# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run asks, by its YAML, is what its coordinator will say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fed_trainer.client.invitations import describe_run
from fed_trainer.client.planned_run import CONFIGS, planned_run
from fed_trainer.client.policy import Policy, check_policy
from fed_trainer.client.policy_fields import TRAINERS
from helpers.trainers import QUICK, QUICK_TEXT


def test_there_is_a_config_for_every_trainer() -> None:
    assert set(CONFIGS) == set(TRAINERS)


PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uniform": {"aggregation_kwargs": '{"weights": "uniform"}', "clients_per_round": 2, "min_clients": 2},
    "median": {"aggregation": "median", "num_rounds": 7},
    "norm bounding": {"aggregation": "norm_bounding", "aggregation_kwargs": {"max_norm": 1.0}},
    "hetlora": {"aggregation": "hetlora", "clients_per_round": 0.5},
    "scaffold": {"local_objective": "scaffold", "optim": "sgd", "max_grad_norm": 0.0},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "client_settings": {"client_1": {"max_steps": 3}}},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.fast("uniform", "scaffold")
def test_a_plan_says_what_the_run_says(name: str, make_trainer, tiny_model_dir: Path) -> None:
    settings = {**QUICK_TEXT, "num_rounds": 2, **PLANS[name]}
    plan = planned_run({**settings, "trainer": "sft", "model_name_or_path": str(tiny_model_dir), "clients": 3})
    run = describe_run(make_trainer(**settings))
    told = plan.pop("settings")
    assert plan == {key: run[key] for key in plan}
    read = (
        "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "aggregation",
        "min_clients", "client_settings", "label_column", "packing", "local_objective", "publish_client_names",
        "publish_client_metrics", "publish_label_counts",
    )  # fmt: skip
    assert {key: told[key] for key in read} == {key: run["settings"][key] for key in read}
    policy = Policy(most_rounds=2, most_local_steps=2, fewest_clients_per_round=2, may_leave={"example_counts": False})
    later = policy.violations(run, 16)
    assert policy.violations({**plan, "settings": told}, 16, is_plan=True) == later


def test_clients_by_name_or_by_number() -> None:
    assert planned_run({"clients": ["a", "b", "c"], "clients_per_round": 0.7})["num_sampled"] == 2
    assert planned_run({"clients": 5})["num_sampled"] == 5
    assert planned_run({"clients_per_round": 4})["num_sampled"] == 4
    assert planned_run({"clients_per_round": 0.5})["num_sampled"] is None
    (refused,) = Policy(fewest_clients_per_round=1).violations(planned_run({}))
    assert "samples an unknown number of clients (`clients_per_round`)" in refused


def test_of_a_folder_only_the_name_is_compared(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert planned_run({"model_name_or_path": f"{tmp_path / 'base'}/"})["base_model"] == "base"
    assert planned_run({"model_name_or_path": "org/base"})["base_model"] == "org/base"
    assert planned_run({})["base_model"] is None


def test_defaults_are_those_of_the_config_of_the_trainer() -> None:
    assert planned_run({})["trainer"] == "sft"
    assert planned_run({"trainer": "task", **QUICK})["settings"]["num_train_epochs"] == 3.0
    assert "packing" in planned_run({})["settings"] and "packing" not in planned_run({"trainer": "task"})["settings"]
    assert planned_run({})["num_rounds"] == 10


def test_options_that_are_wrong_are_not_stated_weights() -> None:
    run = planned_run({"aggregation": "norm_bounding", "max_steps": 2})
    assert run["weights"] is None
    (refused,) = Policy(may_leave={"example_counts": False}).violations(run)
    assert "`may_leave.example_counts`: the run weights clients by (not stated)" in refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"trainer": "ppo"}, "`trainer` should be one of .*'sft'.* but the value passed is 'ppo'"),
        ({"clients": "a"}, "`clients` should be names, or how many there are, but the value passed is 'a'"),
        ({"clients": 0}, "`clients` should be names"),
        ({"clients": []}, "`clients` should be names"),
        ({"clients": 2, "clients_per_round": 3}, "`clients_per_round` is 3, but there are only 2 clients"),
        ({"aggregation_kwargs": "weights"}, "`aggregation_kwargs` should be a dictionary or its JSON"),
    ],
)
def test_what_is_no_plan_is_refused(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        planned_run(content)


def test_a_check_beforehand() -> None:
    content = {"model_name_or_path": "org/base", "clients": 4, "num_rounds": 30, "max_steps": 10, "min_clients": 3}
    policy = Policy(base_models=["org/*"], most_rounds=20, fewest_clients_per_round=3, largest_upload_mib=1)
    code, text = check_policy(policy, planned_run(content))
    assert code == 2 and "`most_rounds`: the run asks for 30 rounds, but the policy allows 20" in text
    code, text = check_policy(policy, planned_run({**content, "num_rounds": 20}))
    assert code == 0 and text.endswith("as it is not known before: `largest_upload_mib`.")
