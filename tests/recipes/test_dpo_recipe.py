# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The DPO recipe, on a tiny model and preferences made on the spot, as a run that is resumed."""

import json

import federated_dpo as recipe
import pytest
from safetensors.torch import load_file

from fed_trainer import read_record
from helpers.runs import run_recipe


@pytest.fixture
def run(tiny_model_dir, make_clients, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    with open(tmp_path / "rows" / "train.jsonl", "w", encoding="utf-8") as file:
        for name, rows in make_clients(num_clients=2).items():
            for row in rows:
                pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no", "annotator": name}
                file.write(json.dumps(pair) + "\n")

    def run(**settings):
        given = {
            "model_name_or_path": tiny_model_dir, "dataset_name": tmp_path / "rows", "output_dir": tmp_path / "out",
            "partition_column": "annotator", "test_size": 0.2, "max_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "peft_config": '{"peft_type": "LORA", "r": 4}', "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, **settings,
        }  # fmt: skip
        return run_recipe(recipe.main, monkeypatch, **given)

    return run


@pytest.mark.fast("round")
@pytest.mark.parametrize("reference", ["initial", "base", "round"])
def test_the_policy_learns_to_prefer_what_was_chosen(run, reference):
    run(reference=reference, num_rounds=1)
    folder = run(reference=reference, num_rounds=2, resume_from_checkpoint=True)
    record = read_record(folder)
    assert record["settings"]["reference"] == reference
    assert record["clients"].keys() == {"client_0", "client_1"}
    assert record["rounds"][-1]["eval"]["eval_loss"] < record["start"]["eval"]["eval_loss"]
    assert record["rounds"][-1]["eval"]["eval_rewards/margins"] > 0
    assert all(".lora_" in key for key in load_file(folder / "adapter_model.safetensors"))
