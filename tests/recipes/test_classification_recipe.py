# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The classification recipe with each of its methods, on a tiny random Bert and sentences made on the spot."""

import json
import sys

import compare_runs
import federated_classification as recipe
import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, EvalPrediction, PreTrainedTokenizerFast, set_seed

import peft_scl
from fed_trainer import read_record
from helpers.paths import RECIPES


WORDS = ["card", "lost", "top", "up", "rate", "fee", "my", "the"]
federa = pytest.mark.skipif(not hasattr(peft_scl, "FederaConfig"), reason="peft_scl has no FederaConfig")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """Folder with a random Bert without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_bert, tmp_path, monkeypatch):
    """Runs `main` of the recipe on three intents, two clients and two rounds; returns the output folder."""
    (tmp_path / "data").mkdir()
    for split, number in (("train", 36), ("test", 9)):
        with open(tmp_path / "data" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in range(number):
                intent = ("lost_card", "top_up", "fee")[row % 3]
                text = f"my {intent.replace('_', ' ')} {WORDS[row % 8]}" + " the" * (row % 4)
                file.write(json.dumps({"text": text, "label": intent}) + "\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def main(*arguments, config="banking77_federa.yaml"):
        command = [
            "federated_classification.py",
            *("--config", str(RECIPES / "configs" / config)),
            *("--model_name_or_path", str(tiny_bert), "--dataset_name", str(tmp_path / "data")),
            *("--num_clients", "2", "--clients_per_round", "2", "--min_examples", "8", "--alpha", "1.0"),
            *(
                "--num_rounds",
                "2",
                "--max_steps",
                "2",
                "--per_device_train_batch_size",
                "4",
                "--learning_rate",
                "1e-2",
            ),
            *("--eval_rounds", "1", "--use_cpu", "--output_dir", str(tmp_path / "out")),
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", command)
        recipe.main()
        return tmp_path / "out"

    return main


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        pytest.param("federa", "lora_", marks=federa),
        ("lora", "lora_"),
        ("scl", "scl_"),
        ("adapter", "scl_"),
        ("bitfit", "bias"),
        ("full", ""),
    ],
)
def test_every_method_trains_and_reports(run, capsys, method, trained):
    out = run("--method", method)
    record = read_record(out)
    assert record["partition"] == "dirichlet(alpha=1.0) over label"
    evaluations = [record["start"]["eval"], *(entry["eval"] for entry in record["rounds"])]
    assert len(evaluations) == 3
    for key in ("eval_loss", "eval_accuracy", "eval_macro_f1"):
        assert all(key in evaluation for evaluation in evaluations)
    assert evaluations[0]["eval_loss"] != evaluations[2]["eval_loss"]
    (path,) = out.glob("*model.safetensors")
    assert path.name == ("model.safetensors" if method in ("bitfit", "full") else "adapter_model.safetensors")
    assert all(trained in key or "classifier" in key for key in load_file(path)) or method == "bitfit"
    printed = capsys.readouterr().out
    assert f"{method}: {record['num_trainable_parameters']:,} parameters are trained" in printed
    assert "eval accuracy" in printed
    for name in ("learning_curves.png", "split.png"):
        assert (out / name).stat().st_size > 1000


def test_bitfit_sends_the_biases_and_the_head_only(run, tiny_bert):
    record = read_record(run("--method", "bitfit", "--num_rounds", "1"))
    biases = sum(tensor.numel() for key, tensor in load_file(tiny_bert / "model.safetensors").items() if "bias" in key)
    assert record["num_trainable_parameters"] == biases + 3 * 16 + 3


def test_a_run_is_resumed_with_the_head_it_started_from(run):
    run("--method", "lora", "--num_rounds", "1", "--save_rounds", "1")
    out = run("--method", "lora", "--num_rounds", "2", "--resume_from_checkpoint", "True")
    assert len(read_record(out)["rounds"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target_column", "intent"),
            r"has the columns \['text', 'label'\], but not \['intent'\]. Set `text_column`",
        ),
        (("--method", "full", "--peft_config", '{"r": 2}'), "`method='full'` has no adapter, but `peft_config` is"),
        (("--clients_per_round", "9"), "`clients_per_round` is 9, but there are only 2 clients"),
    ],
)
def test_recipe_refuses_in_a_sentence(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--method", "lora", *arguments)


def test_accuracy_and_macro_f1():
    # class 0: 2 right of 3, and 1 wrongly; class 1: 1 of 2, and 1 wrongly; class 2 is predicted never and occurs never
    predicted = np.eye(3)[[0, 0, 1, 1, 0]]
    metrics = recipe.compute_metrics(EvalPrediction(predictions=predicted, label_ids=np.array([0, 0, 0, 1, 1])))
    assert metrics == {"accuracy": pytest.approx(3 / 5), "macro_f1": pytest.approx((4 / 6 + 2 / 4) / 2)}


def test_runs_are_compared_by_accuracy(run, capsys, monkeypatch):
    out = run("--method", "lora")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "--metric", "eval_accuracy", f"LoRA={out}"])
    compare_runs.main()
    table = capsys.readouterr().out.splitlines()
    accuracy = read_record(out)["rounds"][-1]["eval"]["eval_accuracy"]
    assert f"| 2 | {accuracy:.3f} |" in table
