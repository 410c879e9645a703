# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A client's policy: each of its fields refuses what exceeds it, by its name, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.client.gate import PolicyGate
from fed_trainer.client.planned_run import planned_run
from fed_trainer.client.policy import MayLeave, Policy, check_policy
from fed_trainer.client.policy_fields import REQUIREMENTS, TRAINERS, PolicyFields
from fed_trainer.client.sent_log import SentLog
from fed_trainer.federation.packet import Packet
from helpers.paths import ROOT


DIGEST, OTHER = "ab" * 32, "cd" * 32
SETTINGS: dict[str, Any] = {
    "max_steps": 10,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "aggregation": "fedavg",
    "min_clients": 3,
    "client_settings": None,
    "label_column": None,
}
RUN: dict[str, Any] = {
    "trainer": "sft",
    "base_model": "org/base-1b",
    "base_digest": DIGEST,
    "num_rounds": 20,
    "num_clients": 8,
    "num_sampled": 4,
    "upload_bytes": 3 * 2**20,
    "weights": "uniform",
    "signed": True,
    "encrypted": True,
    "settings": SETTINGS,
}
OPEN = MayLeave(label_counts=True, client_name=True)


def run_with(**changed: Any) -> dict[str, Any]:
    """The run; settings by their name."""
    own = {name: changed.pop(name) for name in list(changed) if name not in RUN}
    return {**RUN, **changed, "settings": {**SETTINGS, **own}}


# field, a value of it that allows `RUN`, and what in a run exceeds it
EXCESS = [
    ("base_models", ["org/*"], {"base_model": "elsewhere/base-1b"}),
    ("base_models", ["org/*"], {"base_model": "org/../elsewhere/base-1b"}),
    ("base_models", ["org/*"], {"base_model": None}),
    ("base_models", [DIGEST], {"base_digest": OTHER}),
    ("base_models", [DIGEST], {"base_digest": None, "base_model": DIGEST}),
    ("trainers", ["sft", "dpo"], {"trainer": "reward"}),
    ("trainers", ["sft"], {"trainer": None}),
    ("most_rounds", 20, {"num_rounds": 21}),
    ("most_rounds", 20, {"num_rounds": None}),
    ("most_rounds", 20, {"num_rounds": "20"}),
    ("most_local_steps", 10, {"max_steps": 11}),
    ("most_local_steps", 10, {"max_steps": -1, "num_train_epochs": 2.0}),  # of 48 examples in batches of 8
    ("most_local_steps", 10, {"max_steps": -1, "packing": True}),
    ("most_local_steps", 10, {"max_steps": "many"}),
    ("most_local_steps", 10, {"client_settings": {"ward": {"max_steps": 11}}}),
    ("most_local_steps", 10, {"local_objective": "ditto"}),
    ("fewest_clients_per_round", 3, {"num_sampled": 2}),
    ("fewest_clients_per_round", 3, {"num_sampled": None}),
    ("fewest_clients_per_round", 3, {"min_clients": 2}),
    ("largest_upload_mib", 3, {"upload_bytes": 3 * 2**20 + 1}),
    ("largest_upload_mib", 3.0, {"upload_bytes": None}),
    ("aggregations", ["fedavg", "median"], {"aggregation": "flora"}),
    ("aggregations", ["fedavg"], {"aggregation": None}),
    ("needs_signed", True, {"signed": False}),
    ("needs_signed", True, {"signed": "yes"}),
    ("needs_encrypted", True, {"encrypted": None}),
    ("trust_remote_code", False, {"trust_remote_code": True}),
    ("trust_remote_code", False, {"model_init_kwargs": {"trust_remote_code": True}}),
    ("may_leave.example_counts", False, {"weights": "examples"}),
    ("may_leave.example_counts", False, {"weights": "tokens"}),
    ("may_leave.example_counts", False, {"weights": None}),
    ("may_leave.example_counts", False, {"max_steps": -1}),
    ("may_leave.example_counts", False, {"publish_client_metrics": True}),
    ("may_leave.label_counts", False, {"label_column": "diagnosis"}),
    ("may_leave.label_counts", False, {"publish_label_counts": True}),
    ("may_leave.metrics", False, {"publish_client_metrics": True}),
    ("may_leave.client_name", False, {"publish_client_names": True}),
]
OPENED = {
    "trust_remote_code": True,
    "needs_signed": False,
    "needs_encrypted": False,
    **{f"may_leave.{entry.name}": True for entry in fields(MayLeave)},
}


def policy_with(field: str, value: Any) -> Policy:
    """A policy of one field, which is open otherwise."""
    _, _, inner = field.partition("may_leave.")
    may_leave = replace(OPEN, **{inner: value}) if inner else OPEN
    return Policy(may_leave=may_leave, **({} if inner else {field: value}))


def violations(policy: Policy, run: Mapping[str, Any]) -> list[str]:
    return policy.violations(run, num_examples=48, client="ward")


@pytest.mark.parametrize(("field", "value", "changed"), EXCESS)
def test_a_field_refuses_its_excess_by_name(field: str, value: Any, changed: dict[str, Any]) -> None:
    policy, run = policy_with(field, value), run_with(**changed)
    assert violations(policy, RUN) == []
    refused = violations(policy, run)
    assert len(refused) == 1 and refused[0].startswith(f"`{field}`: ") and refused[0].endswith(".")
    assert violations(policy_with(field, OPENED.get(field)), run) == []


def test_every_field_is_in_the_table() -> None:
    named = {field for field, _, _ in EXCESS} | {"requires", "may_leave"}
    assert named == {entry.name for entry in fields(PolicyFields)} | {
        f"may_leave.{entry.name}" for entry in fields(MayLeave)
    }


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_privacy_that_this_version_cannot_offer_refuses_every_run(name: str) -> None:
    (refused,) = violations(Policy(requires=[name]), RUN)
    assert refused.startswith(f"`requires`: the policy requires '{name}', which this version cannot offer")
    assert violations(Policy(requires=[]), RUN) == []


def test_a_run_hears_of_all_that_it_exceeds() -> None:
    policy = Policy(most_rounds=5, trainers=["dpo"], needs_signed=True)
    refused = violations(policy, run_with(signed=False))
    assert [sentence.split("`")[1] for sentence in refused] == ["trainers", "most_rounds", "needs_signed"]


def test_the_defaults_are_the_careful_ones() -> None:
    policy = Policy()
    assert policy.may_leave.closed == {"label_counts", "client_name"}
    assert violations(policy, RUN) == []
    refused = violations(policy, run_with(label_column="a", publish_client_names=True, trust_remote_code=True))
    assert [sentence.split("`")[1] for sentence in refused] == [
        "may_leave.label_counts", "may_leave.client_name", "trust_remote_code",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_examples", "world_size", "epochs", "steps"), [(48, 1, 1, 6), (49, 1, 1, 7), (48, 2, 1, 3), (48, 1, 2.5, 15)]
)
def test_epochs_are_counted_in_steps(num_examples: int, world_size: int, epochs: float, steps: int) -> None:
    run = run_with(max_steps=-1, num_train_epochs=epochs)
    assert Policy(most_local_steps=steps).violations(run, num_examples, "ward", world_size) == []
    (refused,) = Policy(most_local_steps=max(1, steps - 1)).violations(run, num_examples, "ward", world_size)
    assert f"asks for {steps} local steps" in refused and f"{num_examples} examples" in refused


def test_of_other_clients_no_budget_counts_unless_the_name_is_not_known() -> None:
    policy, run = Policy(most_local_steps=10), run_with(client_settings={"other": {"max_steps": 11}})
    assert policy.violations(run, 48, "ward") == []
    assert len(policy.violations(run, 48)) == 1


def test_the_refusal_does_not_tell_the_number_of_examples_that_may_not_leave() -> None:
    policy = Policy(most_local_steps=10, may_leave={"example_counts": False})
    refused = policy.violations(run_with(max_steps=-1), 1234, "ward")
    assert {sentence.split("`")[1] for sentence in refused} == {"most_local_steps", "may_leave.example_counts"}
    assert not any("1,234" in sentence or "1234" in sentence or "463" in sentence for sentence in refused)


# Laws


TEXT = st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
SOME_RUNS = st.fixed_dictionaries(
    {
        "trainer": st.sampled_from(TRAINERS),
        "base_model": st.sampled_from(["a", "b"]),
        "base_digest": st.sampled_from([DIGEST, OTHER]),
        "num_rounds": st.integers(1, 5),
        "num_sampled": st.integers(1, 5),
        "upload_bytes": st.integers(0, 5 * 2**20),
        "weights": st.sampled_from(["examples", "tokens", "uniform"]),
        "signed": st.booleans(),
        "encrypted": st.booleans(),
        "settings": st.fixed_dictionaries(
            {
                "max_steps": st.sampled_from([-1, 1, 2, 3, 4]),
                "num_train_epochs": st.sampled_from([0.5, 1, 3.0]),
                "per_device_train_batch_size": st.integers(1, 30),
                "gradient_accumulation_steps": st.integers(1, 3),
                "min_clients": st.integers(1, 5),
                "aggregation": st.sampled_from(["fedavg", "median"]),
                "label_column": st.sampled_from([None, "topic"]),
                "publish_client_names": st.booleans(),
                "publish_client_metrics": st.booleans(),
                "publish_label_counts": st.booleans(),
                "trust_remote_code": st.booleans(),
            }
        ),
    }
)
BOUNDS = st.none() | st.integers(1, 6)
CHOICES = {
    "base_models": ["a", "b", DIGEST, OTHER], "trainers": list(TRAINERS), "aggregations": ["fedavg", "median"],
}  # fmt: skip
SOME_POLICIES = st.builds(
    Policy,
    most_rounds=BOUNDS,
    most_local_steps=BOUNDS,
    fewest_clients_per_round=BOUNDS,
    largest_upload_mib=BOUNDS,
    may_leave=st.builds(MayLeave, st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    needs_signed=st.booleans(),
    needs_encrypted=st.booleans(),
    trust_remote_code=st.booleans(),
    **{
        name: st.none() | st.lists(st.sampled_from(choices), min_size=1, unique=True)
        for name, choices in CHOICES.items()
    },
)


def loosened(data: st.DataObject, policy: Policy) -> Policy:
    """A policy that allows at least as much, in one field."""
    name = data.draw(st.sampled_from([entry.name for entry in fields(Policy) if entry.name != "requires"]))
    value = getattr(policy, name)
    if name == "may_leave":
        opened = data.draw(st.sampled_from([entry.name for entry in fields(MayLeave)]))
        return replace(policy, may_leave=replace(value, **{opened: True}))
    if name in ("needs_signed", "needs_encrypted", "trust_remote_code"):
        return replace(policy, **{name: name == "trust_remote_code"})
    if value is None or data.draw(st.booleans()):
        return replace(policy, **{name: None})
    if name in CHOICES:
        return replace(policy, **{name: [*value, data.draw(st.sampled_from(CHOICES[name]))]})
    step = data.draw(st.integers(0, 3))
    return replace(policy, **{name: max(1, value - step) if name.startswith("fewest") else value + step})


@given(run=SOME_RUNS, policy=SOME_POLICIES, data=st.data())
def test_what_allows_more_refuses_no_more(run: dict[str, Any], policy: Policy, data: st.DataObject) -> None:
    def named(policy: Policy) -> set[str]:
        return {sentence.split("`")[1] for sentence in policy.violations(run, 20)}

    assert named(loosened(data, policy)) <= named(policy)


@given(run=SOME_RUNS, num_examples=st.integers(1, 100))
def test_a_policy_of_what_a_run_asks_allows_it(run: dict[str, Any], num_examples: int) -> None:
    settings = run["settings"]
    steps = settings["max_steps"] if settings["max_steps"] > 0 else 3 * num_examples + 3
    policy = Policy(
        base_models=[run["base_digest"]],
        trainers=[run["trainer"]],
        most_rounds=run["num_rounds"],
        most_local_steps=steps,
        fewest_clients_per_round=min(run["num_sampled"], settings["min_clients"]),
        largest_upload_mib=max(run["upload_bytes"], 1) / 2**20,
        aggregations=[settings["aggregation"]],
        may_leave=OPEN,
        needs_signed=run["signed"],
        needs_encrypted=run["encrypted"],
        trust_remote_code=settings["trust_remote_code"],
    )
    assert policy.violations(run, num_examples) == []


@given(
    run=st.dictionaries(st.sampled_from([*RUN, "else"]), JSON),
    settings=JSON | st.dictionaries(st.sampled_from([*SETTINGS, "packing", "local_objective"]), JSON),
    policy=SOME_POLICIES,
)
def test_whatever_a_coordinator_says_is_answered_in_sentences(run: dict, settings: Any, policy: Policy) -> None:
    refused = policy.violations({**run, "settings": settings}, 20, "ward")
    assert all(sentence.startswith("`") and sentence.endswith(".") for sentence in refused)


# The file


def load(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "POLICY.yaml"
    path.write_text(text, encoding="utf-8")
    return Policy.load(path)


def test_a_file_of_all_fields(tmp_path: Path) -> None:
    content = {
        "base_models": ["org/*"],
        "trainers": ["sft"],
        "most_rounds": 20,
        "most_local_steps": 10,
        "fewest_clients_per_round": 3,
        "largest_upload_mib": 2.5,
        "aggregations": ["median"],
        "requires": ["noise"],
        "may_leave": {"example_counts": False, "metrics": False, "label_counts": True, "client_name": True},
        "needs_signed": True,
        "needs_encrypted": True,
        "trust_remote_code": True,
    }
    policy = load(tmp_path, yaml.safe_dump(content))
    assert policy == Policy(**content)
    assert set(content) == {entry.name for entry in fields(Policy)}
    assert policy.may_leave.closed == {"example_counts", "metrics"}
    assert load(tmp_path, "{}") == Policy()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it is empty"),
        ("# a comment\n", "it is empty"),
        ("- most_rounds", "the policy is \\['most_rounds'\\], but it should be a dictionary"),
        ("most_round: 3", "the policy has the field `most_round`, which there is not. There are .*'most_rounds'"),
        ("may_leave: {metric: true}", "may_leave has the field `metric`, which there is not"),
        ("may_leave: true", "may_leave is True, but it should be a dictionary"),
        ("may_leave: {metrics: 'no way'}", "`may_leave.metrics` should be True or False"),
        ("most_rounds: 3\nmost_rounds: 4", "`most_rounds` occurs more than once"),
        ("may_leave: {metrics: true, metrics: false}", "`metrics` occurs more than once"),
        ("most_rounds: '3'", "`most_rounds` should be an integer of at least 1 or None"),
        ("most_rounds: true", "`most_rounds` should be an integer"),
        ("most_local_steps: 0", "`most_local_steps` should be an integer of at least 1"),
        ("fewest_clients_per_round: 1.5", "`fewest_clients_per_round` should be an integer"),
        ("largest_upload_mib: -1", "`largest_upload_mib` should be a positive number of MiB"),
        ("largest_upload_mib: .nan", "`largest_upload_mib` should be a positive number of MiB"),
        ("needs_signed: 1", "`needs_signed` should be True or False"),
        ("needs_encrypted: 'false'", "`needs_encrypted` should be True or False"),
        ("trust_remote_code: 'no code'", "`trust_remote_code` should be True or False"),
        ("base_models: org/base", "`base_models` should be a list of texts"),
        (f"base_models: [{'1' * 64}]", "Put a digest between quotation marks"),
        ("base_models: []", "`base_models` is an empty list, which would refuse every run"),
        ("trainers: [ppo]", "`trainers` names 'ppo', which there is not. There are .*'sft'"),
        ("aggregations: [fedav]", "`aggregations` names 'fedav', which there is not"),
        ("requires: [privacy]", "`requires` names 'privacy', which there is not. There are .*'noise'"),
        ("a: [", "it is no YAML"),
        ("most_rounds: !!python/object/apply:os.getcwd []", "it is no YAML"),
        ("#" * (2**20 + 1), "more than the 1048576"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"The policy '.*POLICY.yaml' cannot be used: .*{expected}"):
        load(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used: it cannot be read"):
        Policy.load(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be used: it is no text in UTF-8"):
        Policy.load(tmp_path / "binary.yaml")


# Beforehand


PLAN = {
    name: value for name, value in RUN.items() if name not in ("base_digest", "upload_bytes", "signed", "encrypted")
}


def test_a_plan_that_is_allowed() -> None:
    assert check_policy(Policy(), PLAN) == (
        0,
        "The policy allows this run. It holds back: client_name, label_counts (`may_leave`).",
    )
    assert check_policy(Policy(may_leave=OPEN), PLAN)[1].endswith("It holds back: nothing (`may_leave`).")


def test_what_a_plan_cannot_say_yet_is_checked_when_the_client_joins() -> None:
    policy = Policy(base_models=[DIGEST], largest_upload_mib=1, needs_signed=True, needs_encrypted=True)
    code, text = check_policy(policy, PLAN)
    assert code == 0
    assert text.splitlines()[1] == (
        "Checked when the client joins, as it is not known before: `base_models`, `largest_upload_mib`, "
        "`needs_signed`, `needs_encrypted`."
    )
    assert len(policy.violations(PLAN, 48)) == 4  # the coordinator of a run has to say it
    assert check_policy(Policy(base_models=["org/*"]), PLAN)[1].count("\n") == 0
    assert check_policy(Policy(base_models=["else/*"]), PLAN)[0] == 2


def test_what_a_plan_says_counts() -> None:
    code, text = check_policy(Policy(largest_upload_mib=1, needs_signed=True), {**RUN, "signed": False})
    assert code == 2
    assert text.splitlines()[0] == "The policy refuses this run, for 2 reasons:"
    assert [line.split("`")[1] for line in text.splitlines()[1:]] == ["largest_upload_mib", "needs_signed"]


# The page


PAGE = (ROOT / "docs" / "how-to" / "policy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [block.split("```")[0] for block in PAGE.split(f"```{language}\n")[1:]]


def test_the_page_has_every_field_with_its_default() -> None:
    rows = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("| `")]
    told = {field.strip().strip("`"): default.strip().strip("`") for field, default in rows}
    expected = {entry.name: getattr(Policy(), entry.name) for entry in fields(PolicyFields)}
    expected |= {f"may_leave.{entry.name}": entry.default for entry in fields(MayLeave)}
    del expected["may_leave"]
    assert expected.keys() <= told.keys()
    for field, default in expected.items():
        words = ("any", "no bound", "nothing") if default is None else (str(default).lower(),)
        assert told[field] in words, field


def test_the_check_on_the_page_says_what_it_says(tmp_path: Path) -> None:
    policy, (run, (refused, allowed)) = load(tmp_path, blocks("yaml")[0]), (blocks("yaml")[1], blocks("text"))
    plan = yaml.safe_load(run)
    assert check_policy(policy, planned_run(plan), 1200, "clinic_a") == (2, refused.strip())
    plan |= {"num_rounds": 20, "max_steps": 50, "aggregation_kwargs": {"weights": "uniform"}}
    assert check_policy(policy, planned_run(plan), 1200, "clinic_a") == (0, allowed.strip())


def test_the_line_on_the_page_is_one_that_the_gate_writes(tmp_path: Path) -> None:
    figures = {"train_loss": 1.0, "num_steps": 1, "training_metrics": {}, "seconds": 1.0}
    figures["training_metrics"] = {"entropy": 1.0, "mean_token_accuracy": 1.0, "num_tokens": 32.0}
    meta = {
        "round": 1, "client": "clinic_a", "num_examples": 16, "num_steps": 1, "num_tokens": None,
        "base_digest": DIGEST, "numbers": [], "figures": figures, "moved": True, "has_rate": True,
        "seconds": {"prepare": 1.0, "local": 1.0},
    }  # fmt: skip
    tensors = {f"delta/{index}": torch.zeros(96) for index in range(4)}
    policy = replace(load(tmp_path, blocks("yaml")[0]), needs_signed=False)
    gate = PolicyGate(SentLog(tmp_path / "sent.jsonl"), policy)
    gate.check({**RUN, "base_model": "Qwen/Qwen3-0.6B", "run": "clinics-f3c8351d"}, "clinic_a", 16, 1)
    gate.out("clinic_a", Packet("update", tensors, meta))
    gate.sent("clinic_a", 2568)
    written = json.loads((tmp_path / "sent.jsonl").read_text())
    assert {**written, "time": ""} == {**json.loads(blocks("json")[0]), "time": ""}
