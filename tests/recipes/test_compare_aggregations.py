# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The configs of `recipes/configs/aggregations`, and the script that compares them."""

import json
import math
import sys

import compare_aggregations
import pytest
import yaml
from datasets import load_dataset
from federated_sft import make_peft_config, prepare

from fed_trainer import FederatedTrainer, read_record
from fed_trainer.federation.broken_state import BrokenStateError
from fed_trainer.federation.validation import TooFewClientsError
from fed_trainer.methods.aggregation import METHODS
from fed_trainer.methods.objectives import LOCAL_OBJECTIVES
from fed_trainer.methods.server_optimizers import SERVER_OPTIMIZERS
from fed_trainer.state.described import storable


CONFIGS = {path.stem: path for path in sorted(compare_aggregations.CONFIGS.glob("*.yaml"))}
# what may differ between the configs
OWN = {
    "aggregation", "aggregation_kwargs", "client_settings", "server_optimizer", "local_objective",
    "local_objective_kwargs", "optim", "max_grad_norm", "learning_rate", "peft_config", "output_dir",
}  # fmt: skip
COLLECTIONS = (
    "1_CancerGov_QA", "2_GARD_QA", "3_GHR_QA", "4_MPlus_Health_Topics_QA", "5_NIDDK_QA", "6_NINDS_QA",
    "7_SeniorHealth_QA", "8_NHLBI_QA_XML", "9_CDC_QA",
)  # fmt: skip


def read(name):
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_clients):
    """Rows with the columns and the clients of MedQuAD."""
    folder = tmp_path_factory.mktemp("medquad")
    for split, rows in (("train", 12), ("test", 4)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            clients = make_clients(num_clients=len(COLLECTIONS), rows=rows).values()
            for collection, dataset in zip(COLLECTIONS, clients, strict=True):
                for row in dataset:
                    entry = {"question": row["prompt"], "answer": row["completion"], "collection": collection}
                    file.write(json.dumps(entry) + "\n")
    return folder


@pytest.fixture
def options(tiny_model_dir, data):
    return [
        *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data)),
        *("--num_rounds", "1", "--max_steps", "1", "--max_length", "48", "--use_cpu"),
    ]


def test_everything_that_can_be_chosen_has_a_config():
    configs = [read(name) for name in CONFIGS]
    assert {config["aggregation"] for config in configs} == set(METHODS)
    assert {config.get("server_optimizer", "sgd") for config in configs} == set(SERVER_OPTIMIZERS)
    # rank pruning is a part of HetLoRA that its configs leave out
    assert {config.get("local_objective") for config in configs} == {None, *LOCAL_OBJECTIVES} - {"rank_pruning"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_differs_from_that_of_fedavg_in_its_own_fields_only(name):
    config, fedavg = read(name), read("fedavg")
    assert {field for field in config | fedavg if config.get(field) != fedavg.get(field)} <= OWN
    assert config["output_dir"] == f"out/aggregations/{name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_a_trainer(name, options, tmp_path, data):
    recipe, args = compare_aggregations.parse(
        CONFIGS[name], [*options, "--num_rounds", "9", "--output_dir", str(tmp_path)]
    )
    splits = load_dataset(str(data))
    clients, test = prepare(recipe, args, splits["train"], splits["test"])
    trainer = FederatedTrainer(recipe.model_name_or_path, args, clients, test, make_peft_config(recipe))
    assert trainer.evaluates_clients
    assert trainer.federation.server.rule.min_updates <= trainer.sampler.num_sampled == 5


def compare(monkeypatch, capsys, options, tmp_path, *arguments):
    command = ["compare_aggregations.py", "--output_dir", str(tmp_path), "--validation_rows", "18", *arguments]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    compare_aggregations.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_comparison_prints_a_table_and_repeats_nothing(monkeypatch, capsys, options, tmp_path):
    own = ("--own", "ffa_lora", "weight_decay", "0.5")
    arguments = (*own, "--methods", "fedavg", "ffa_lora", "--seeds", "1", "--lr_scale", "50", "--search_rounds", "2")
    results = tmp_path / "results.jsonl"
    first = compare(monkeypatch, capsys, options, tmp_path, *arguments, "--results", str(results))
    rows = [line for line in first.splitlines() if line.startswith("| `")]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["fedavg", "ffa_lora"]
    for line in lines:
        rate = f"{line['learning_rate']:.2g}"
        record = read_record(tmp_path / line["method"] / f"lr-{rate}" / "seed-0")
        assert line["eval_loss"]["1"] == record["rounds"][0]["eval"]["eval_loss"]
        (row,) = (row for row in rows if f"`{line['method']}`" in row)
        assert record["settings"]["weight_decay"] == (0.5 if line["method"] == "ffa_lora" else 0.0)
        loss = line["eval_loss"]["1"]
        alike = [client["eval_loss"] for client in record["rounds"][0]["client_eval"].values()]
        figures = loss, loss - lines[0]["eval_loss"]["1"], sum(alike) / len(COLLECTIONS)
        assert f"| {rate} | {' | '.join(f'{figure:.3f}' for figure in figures)} |" in row
        # the chosen learning rate is the best of those tried
        losses = {
            folder.name: compare_aggregations.last_loss(read_record(folder / "validation"))
            for folder in (tmp_path / line["method"]).iterdir()
        }
        assert min(losses, key=losses.get) == f"lr-{rate}"

    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(compare_aggregations, "FederatedTrainer", refuse)
    again = compare(monkeypatch, capsys, options, tmp_path, *arguments)
    assert [line for line in again.splitlines() if line.startswith("| `")] == rows
    with pytest.raises(ValueError, match=r"holds a finished run with `max_steps=1`, but 2 is asked for"):
        compare(monkeypatch, capsys, [*options, "--max_steps", "2"], tmp_path, *arguments)


@pytest.mark.parametrize("error", [TooFewClientsError, BrokenStateError])
def test_a_learning_rate_at_which_training_diverges_has_an_infinite_loss(error, monkeypatch, tmp_path):
    def diverge(*args, **kwargs):
        raise error("diverged")

    comparison = compare_aggregations.Comparison(tmp_path, [], [], validation_rows=1)
    monkeypatch.setattr(comparison, "_record", diverge)
    assert comparison.validation_loss("fedavg", 1.0) == math.inf


def test_figures_that_are_not_finite_are_told_and_not_left_out():
    entry = {"train_loss": 1.0, "bytes_up": 1, "bytes_down": 1, "clients": {"a": {}}, "seconds": {"local": 1.0}}
    entry |= {
        "round": 1,
        "eval": {"eval_loss": "nan"},
        "client_eval": {"a": {"eval_loss": "nan"}, "b": {"eval_loss": 1.0}},
    }
    record = {"num_trainable_parameters": 1, "start": {"eval": {"eval_loss": 2.0}}, "rounds": [entry], "clients": {}}
    assert math.isnan(compare_aggregations.client_losses(record)["a"])
    line = compare_aggregations.summary("fedavg", 1.0, 0, record)
    assert line["eval_loss"] == {0: 2.0}
    assert '"client_eval_loss": {"a": "nan", "b": 1.0}' in json.dumps(storable(line), allow_nan=False)


def test_held_out_rows_go_to_their_clients(options, data):
    recipe, args = compare_aggregations.parse(CONFIGS["fedavg"], [*options, "--max_eval_samples", "3"])
    splits = load_dataset(str(data))
    keep = {"1_CancerGov_QA", "9_CDC_QA"}
    clients, test = prepare(
        recipe, args, splits["train"].filter(lambda row: row["collection"] in keep), splits["test"]
    )
    assert clients.keys() == test.keys() == keep
    for client, rows in test.items():
        assert rows["collection"] == [client] * 3
