# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, TrlParser

from fed_trainer import FederatedConfig
from fed_trainer.federation.sampling import ClientSampler
from fed_trainer.methods.aggregation import METHODS


DEFAULTS = {field.name: field.default for field in fields(FederatedConfig)}
INHERITED = {field.name: field.default for field in fields(SFTConfig)}


def make_config(**kwargs: Any) -> FederatedConfig:
    return FederatedConfig(output_dir="out", **{"use_cpu": True, "report_to": "none"} | kwargs)


def parse(*args: str, config: Path | None = None) -> FederatedConfig:
    common = ["--output_dir", "out", "--use_cpu", "--report_to", "none"]
    parser = TrlParser((FederatedConfig,))
    (parsed,) = parser.parse_args_and_config([*common, *args, *(["--config", str(config)] if config else [])])
    return parsed


# Defaults


def test_defaults() -> None:
    config = make_config()
    assert config.num_rounds == 10
    assert config.clients_per_round is None
    assert config.aggregation == "fedavg"
    assert config.round_lr_scheduler_type == "constant"
    assert config.initial_adapter is config.initial_adapter_revision is None
    assert config.eval_rounds == config.save_rounds == 1
    assert config.partition is config.label_column is None


def test_defaults_that_differ_from_sft_config() -> None:
    assert {name for name in INHERITED if DEFAULTS[name] != INHERITED[name]} == {"lr_scheduler_type", "eval_on_start"}
    config, sft = make_config(), SFTConfig(output_dir="out", use_cpu=True, report_to="none", bf16=False)
    assert (config.lr_scheduler_type, sft.lr_scheduler_type) == ("constant", "linear")
    assert (config.eval_on_start, sft.eval_on_start) == (True, False)


@pytest.mark.parametrize(
    ("supported", "kwargs", "bf16"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"use_cpu": True}, False),
        (True, {"bf16": False}, False),
        (True, {"fp16": True}, False),
        (False, {"use_cpu": True, "bf16": True}, True),  # asked for: TRL decides
    ],
)
def test_bf16_where_an_accelerator_supports_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, kwargs: dict[str, Any], bf16: bool
) -> None:
    for module in ("fed_trainer.config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: supported)
    assert make_config(**{"use_cpu": False} | kwargs).bf16 is bf16


def test_every_field_is_documented_with_its_default() -> None:
    documentation = inspect.getdoc(FederatedConfig)
    assert documentation is not None
    parameters, _, note = documentation.partition("> [!NOTE]")
    documented = {
        name: default
        for name, _, default in re.findall(
            r"^ +(\w+) \((`[^)]*`), \*optional\*(?:, defaults to `([^`]+)`)?\):$", parameters, re.MULTILINE
        )
    }
    own = {name: default for name, default in DEFAULTS.items() if name not in INHERITED}
    assert documented == {
        name: "" if default is None else f'"{default}"' if isinstance(default, str) else str(default)
        for name, default in own.items()
    }
    for name in ("lr_scheduler_type", "eval_on_start"):
        shown = f'"{DEFAULTS[name]}"' if isinstance(DEFAULTS[name], str) else DEFAULTS[name]
        assert f"- `{name}`: Defaults to `{shown}` instead of" in note


def test_every_own_field_has_a_help_text_for_the_command_line() -> None:
    for field in fields(FederatedConfig):
        if field.name not in INHERITED:
            assert field.metadata["help"].endswith("."), field.name
            assert field.default is not MISSING, field.name


# Refusals


@pytest.mark.parametrize(
    "value",
    [
        {"max_steps": 0},
        {"max_steps": -2},
        {"num_train_epochs": 0},
        {"num_train_epochs": -1.0},
        {"num_train_epochs": float("nan")},
    ],
)
def test_a_budget_without_a_step(value: dict[str, Any]) -> None:
    ((name, number),) = value.items()
    with pytest.raises(
        ValueError, match=f"`{name}` is the budget of a client in a round.* the value passed is {number}$"
    ):
        make_config(**value)
    make_config(**{"max_steps": 1, "num_train_epochs": 0} | ({} if name == "max_steps" else value))


@pytest.mark.parametrize("value", ["5", 1.5, True, None])
@pytest.mark.parametrize("name", ["num_rounds", "min_clients", "eval_rounds", "save_rounds", "client_retries"])
def test_counts_that_are_no_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be an integer of at least"):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["num_rounds", "eval_rounds", "save_rounds"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_of_rounds(name: str, value: int) -> None:
    with pytest.raises(
        ValueError, match=f"`{name}` should be an integer of at least 1 but the value passed is {value}"
    ):
        make_config(**{name: value})


@pytest.mark.parametrize(
    "value",
    [
        *(0, 0.0, -1, -0.5, 1.5, 2.0001),
        float("nan"),
        float("inf"),
        *(True, False, "5", "0.5", "all", [1]),
    ],
)
def test_clients_per_round_that_is_neither_number_nor_fraction(value: Any) -> None:
    message = rf"`clients_per_round` should be .* but the value passed is {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=message):
        make_config(clients_per_round=value)


@pytest.mark.parametrize("value", [None, 0.001, 0.5, 0.999, 1, 1.0, 2, 3.0])
def test_clients_per_round_that_is_one(value: float | None) -> None:
    assert make_config(clients_per_round=value).clients_per_round == value


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"aggregation": "none"}, r"`aggregation` should be one of \[.*'fedavg'.*\] but the value passed is 'none'"),
        ({"initial_adapter_revision": "main"}, "`initial_adapter_revision` is given without `initial_adapter`"),
        (
            {"hub_strategy": "checkpoint"},
            "`hub_strategy='checkpoint'` would push checkpoint folders. Use 'every_save'",
        ),
        ({"hub_strategy": "all_checkpoints"}, "`hub_strategy='all_checkpoints'` would push checkpoint folders"),
        ({"eval_strategy": "steps"}, "`eval_strategy='steps'` would evaluate in the middle of a client's local steps"),
        ({"eval_strategy": "epoch"}, "`eval_strategy='epoch'` would .* Leave it at 'no' and set `eval_rounds`"),
        (
            {"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"},
            "`load_best_model_at_end=True` is not supported by a federation. Every round is kept",
        ),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` would give clients different local batches"),
    ],
)
def test_settings_that_a_federation_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"initial_adapter": "user/adapter", "initial_adapter_revision": "main"},
        {"initial_adapter": "user/adapter"},
        {"hub_strategy": "every_save"},
        {"hub_strategy": "end"},
        {"num_rounds": 1, "eval_rounds": 5, "save_rounds": 7},
        *({"aggregation": name} for name in METHODS),
    ],
)
def test_settings_that_it_takes(kwargs: dict[str, Any]) -> None:
    config = make_config(**kwargs)
    assert {name: getattr(config, name) for name in kwargs} == kwargs


# YAML and the command line


def test_command_line() -> None:
    config = parse(
        *("--num_rounds", "3", "--learning_rate", "1e-3", "--eval_on_start", "False", "--save_rounds", "2"),
        *("--round_lr_scheduler_type", "cosine", "--partition", "dirichlet(alpha=0.1) over topic"),
    )
    assert (config.num_rounds, config.save_rounds) == (3, 2)
    assert config.learning_rate == 1e-3
    assert config.eval_on_start is False
    assert config.round_lr_scheduler_type == "cosine"
    assert config.lr_scheduler_type == "constant"
    assert config.partition == "dirichlet(alpha=0.1) over topic"
    assert config.aggregation == "fedavg"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [("1", 1), ("5", 5), ("3.0", 3), ("0.25", 2), ("0.01", 1), ("1.0", 10), ("1.", 10), ("1e0", 10)],
)
def test_a_whole_number_of_clients_and_the_fraction_of_all(tmp_path: Path, text: str, sampled: int) -> None:
    """`1` is one client and `1.0` all ten, wherever it is written."""
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"clients_per_round: {text}\n")
    values = [
        make_config(clients_per_round=ast.literal_eval(text)).clients_per_round,
        parse("--clients_per_round", text).clients_per_round,
        parse(config=yaml).clients_per_round,
        parse("--clients_per_round", text, config=yaml).clients_per_round,
    ]
    clients = [f"client_{index}" for index in range(10)]
    assert [ClientSampler(clients, value, seed=0).num_sampled for value in values] == [sampled] * 4
    assert parse().clients_per_round is None


@pytest.mark.parametrize("text", ["all", "true", "nan", "-1", "1.5"])
def test_clients_per_round_from_outside_that_is_no_number(tmp_path: Path, text: str) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"clients_per_round: {text}\n")
    for arguments in ({"config": yaml}, {"config": None}):
        with pytest.raises((ValueError, SystemExit)):
            parse(*([] if arguments["config"] else ["--clients_per_round", text]), **arguments)


def test_yaml_is_overridden_by_the_command_line(tmp_path: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        "num_rounds: 15\nclients_per_round: 0.5\nlearning_rate: 1.0e-3\naggregation: fedavg\neval_on_start: false\n"
        "initial_adapter: user/adapter\ninitial_adapter_revision: abc123\nlabel_column: topic\nmax_steps: 10\n"
    )
    config = parse("--num_rounds", "2", "--label_column", "category", config=yaml)
    assert (config.num_rounds, config.label_column) == (2, "category")
    assert (config.clients_per_round, config.learning_rate, config.max_steps) == (0.5, 1e-3, 10)
    assert config.eval_on_start is False
    assert (config.initial_adapter, config.initial_adapter_revision) == ("user/adapter", "abc123")


def test_unknown_aggregation_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--aggregation", "none")
    assert "argument --aggregation: invalid choice: 'none'" in capsys.readouterr().err


def test_unknown_aggregation_in_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text("aggregation: none\n")
    with pytest.raises(ValueError, match="`aggregation` should be one of"):  # argparse checks no defaults
        parse(config=yaml)


def test_unknown_field_in_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text("num_round: 3\n")
    with pytest.raises(ValueError, match="num_round"):
        parse(config=yaml)


@pytest.mark.parametrize("name", ["aggregation", "server_optimizer", "local_objective", "wire_dtype"])
def test_a_name_that_is_a_list_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should be one of .* but the value passed is \\['float32'\\]"):
        make_config(**{name: ["float32"]})
