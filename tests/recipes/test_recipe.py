# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe as a user runs it: data in a folder, a YAML and overrides, and once in a process of its own."""

import json
import os
import re
import subprocess
import sys

import federated_sft
import pytest
import torch
from safetensors.torch import load_file

from fed_trainer import read_record
from helpers.paths import RECIPES


@pytest.fixture
def workspace(tmp_path, make_clients):
    """A data folder with the columns of MedQuAD."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 24), ("test", 6)):
        with open(tmp_path / "data" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for client, dataset in make_clients(num_clients=3, rows=rows).items():
                for row in dataset:
                    entry = {"question": row["prompt"], "answer": row["completion"], "collection": client}
                    file.write(json.dumps(entry) + "\n")
            file.write(json.dumps({"question": "?", "answer": "", "collection": "client_0"}) + "\n")
    return tmp_path


def arguments_of(workspace, tiny_model_dir, *arguments):
    return [
        str(RECIPES / "federated_sft.py"),
        *("--config", str(RECIPES / "configs/medquad_scl.yaml")),
        *("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(workspace / "data")),
        *("--num_rounds", "2", "--max_steps", "2", "--max_length", "48", "--output_dir", str(workspace / "out")),
        *arguments,
    ]


def launch(workspace, tiny_model_dir, *arguments, launcher=(sys.executable,)):
    command = [*launcher, *arguments_of(workspace, tiny_model_dir, *arguments)]
    environment = {**os.environ, "HF_HOME": str(workspace / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=workspace, env=environment, check=True)


@pytest.fixture
def run(workspace, tiny_model_dir, monkeypatch):
    """Runs `main` of the recipe in this process."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workspace / "cache"))
    monkeypatch.chdir(workspace)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", arguments_of(workspace, tiny_model_dir, "--use_cpu", *arguments))
        federated_sft.main()

    return main


def test_recipe_trains_reports_and_reloads_in_a_fresh_process(workspace, tiny_model_dir, make_clients):
    output = launch(workspace, tiny_model_dir).stdout
    assert "client_2" in output and "train loss" in output
    out = workspace / "out"
    record = read_record(out)
    # rows with an empty answer were dropped
    expected = {
        name: sum(bool(answer.strip()) for answer in rows["completion"])
        for name, rows in make_clients(num_clients=3, rows=24).items()
    }
    assert {name: client["num_examples"] for name, client in record["clients"].items()} == expected
    assert record["partition"] == "natural, by collection"
    assert (out / "learning_curves.png").stat().st_size > 1000
    assert (out / "split.png").stat().st_size > 1000

    code = (
        "import sys, torch, peft_scl\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(torch.arange(10)[None]).logits.detach(), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(out), str(workspace / "logits.pt")], check=True)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import peft_scl  # noqa: F401

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    untouched = base(torch.arange(10)[None]).logits.detach()
    here = PeftModel.from_pretrained(base, str(out)).eval()(torch.arange(10)[None]).logits
    there = torch.load(workspace / "logits.pt", weights_only=True)
    assert torch.equal(here, there)
    assert not torch.equal(untouched, there)


def test_recipe_fine_tunes_the_whole_model_without_a_peft_config(run, workspace, tiny_model_dir, capsys):
    run("--peft_config", "null", "--num_rounds", "1")
    output = capsys.readouterr().out
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(workspace / "out" / "model.safetensors")
    assert f"trainable parameters: {sum(tensor.numel() for tensor in before.values()):,}" in output
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_recipe_resumes_and_overrides_any_adapter_and_split(run, workspace):
    lora = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    arguments = ("--peft_config", lora, "--partition_method", "iid", "--num_clients", "2", "--clients_per_round", "1")
    run(*arguments, "--num_rounds", "1")
    run(*arguments, "--num_rounds", "2", "--resume_from_checkpoint", "True")
    record = read_record(workspace / "out")
    assert record["peft_type"] == "LORA"
    assert [len(entry["clients"]) for entry in record["rounds"]] == [1, 1]
    assert sorted(record["clients"]) == ["client_0", "client_1"]
    assert all("q_proj" in key for key in load_file(workspace / "out" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_recipe_runs_under_accelerate_launch(workspace, tiny_model_dir):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    launch(workspace, tiny_model_dir, "--num_rounds", "1", launcher=launcher)
    assert (workspace / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--partition_column", "hospital"), "`partition_column` is 'hospital', but the columns of"),
        (("--clients_per_round", "9"), "`clients_per_round` is 9, but there are only 3 clients"),
    ],
)
def test_recipe_refuses_in_a_sentence(run, workspace, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(*arguments)
    assert not (workspace / "out" / "checkpoint-1").exists()
