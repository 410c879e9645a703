# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the recipes refuse of their arguments, in a sentence that names the argument."""

import json
import sys

import compare_runs
import federated_classification
import pytest
from datasets import Dataset
from federated_sft import RecipeArguments, make_peft_config, prepare

from fed_trainer import FederatedConfig


COLUMNS = ["question", "answer", "ward"]
FIELDS = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "prompt_template": "{question}\n",
    "completion_column": "answer",
    "partition_column": "ward",
}


@pytest.fixture
def rows():
    return Dataset.from_dict({column: [f"{column} {row % 2}" for row in range(4)] for column in COLUMNS})


@pytest.fixture
def args(tmp_path):
    return FederatedConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"completion_column": "reply"}, f"`completion_column` is 'reply', but the columns of 'data' are {COLUMNS}"),
        (
            {"partition_column": "hospital"},
            f"`partition_column` is 'hospital', but the columns of 'data' are {COLUMNS}",
        ),
        ({"label_column": "diagnosis"}, f"`label_column` is 'diagnosis', but the columns of 'data' are {COLUMNS}"),
        ({"prompt_template": "{title}"}, f"names the column 'title', but the columns of 'data' are {COLUMNS}"),
        ({"prompt_template": "{}: "}, "cannot be filled in"),
        ({"prompt_template": "{question: "}, "cannot be filled in"),
    ],
)
def test_a_column_that_is_missing_is_named_beside_those_of_the_data(rows, args, fields, message):
    args.label_column = fields.pop("label_column", None)
    with pytest.raises(ValueError) as error:
        prepare(RecipeArguments(**{**FIELDS, **fields}), args, rows, rows)
    assert message in str(error.value)


def test_held_out_rows_need_the_column_of_the_clients_only_where_clients_are_evaluated(rows, args):
    held_out = rows.remove_columns("ward")
    clients, test = prepare(RecipeArguments(**FIELDS), args, rows, held_out)
    assert list(clients) == ["ward 0", "ward 1"] and len(test) == 4
    with pytest.raises(
        ValueError, match=r"`partition_column` is 'ward', but the columns of 'data' are \['question', 'an"
    ):
        prepare(RecipeArguments(**FIELDS, evaluate_clients=True), args, rows, held_out)


def test_rows_without_anything_to_learn_are_refused(rows, args):
    empty = rows.map(lambda row: {"answer": " "})
    with pytest.raises(ValueError, match="No row of 'data' has anything in its column 'answer'"):
        prepare(RecipeArguments(**FIELDS), args, empty, rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{r: 4}", "`peft_config` should be a dictionary or its JSON, but '{r: 4}' is neither"),
        ("[4]", "`peft_config` should be a dictionary but the value passed is [4]"),
        ("{}", "`peft_config` has the `peft_type` None, but it should be one of"),
        ('{"r": 4}', "`peft_config` has the `peft_type` None, but it should be one of"),
        ('{"peft_type": "lora"}', "`peft_config` has the `peft_type` 'lora', but it should be one of"),
        ('{"peft_type": "LORA", "rank": 4}', "`peft_config` has ['rank'], which `LoraConfig` does not take"),
    ],
)
def test_a_peft_config_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        make_peft_config(RecipeArguments(**FIELDS, peft_config=given))
    assert message in str(error.value)


def test_a_peft_config_of_the_command_line_is_that_of_a_yaml():
    fields = {"peft_type": "SCL", "r": 4}
    assert make_peft_config(RecipeArguments(**FIELDS, peft_config=json.dumps(fields))).r == 4
    assert make_peft_config(RecipeArguments(**FIELDS, peft_config=fields)).r == 4
    assert make_peft_config(RecipeArguments(**FIELDS, peft_config="null")) is None


@pytest.mark.parametrize("method", ["federa", "lora", "scl", "adapter"])
def test_a_classifiers_peft_config_is_refused_alike(method):
    fields = {"model_name_or_path": "model", "dataset_name": "data", "method": method}
    with pytest.raises(ValueError, match="`peft_config` should be a dictionary or its JSON"):
        federated_classification.RecipeArguments(**fields, peft_config="{r: 4}")
    recipe = federated_classification.RecipeArguments(**fields, peft_config='{"rank": 4}')
    with pytest.raises(ValueError, match=r"`peft_config` has \['rank'\], which `\w+Config` does not take"):
        federated_classification.make_peft_config(recipe)


def test_a_metric_that_was_not_measured_is_named_beside_those_that_were(tmp_path, monkeypatch, capsys):
    record = {
        "start": {"eval": None},
        "rounds": [{"round": 1, "eval": {"eval_loss": 1.0}}],
        "num_trainable_parameters": 3,
    }
    (tmp_path / "federation.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "--metric", "eval_f1", f"LoRA={tmp_path}"])
    with pytest.raises(SystemExit):
        compare_runs.main()
    assert "not every run of LoRA measured 'eval_f1'. They measured ['eval_loss']" in capsys.readouterr().err
