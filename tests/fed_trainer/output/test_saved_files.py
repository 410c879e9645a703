# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a run writes: adapters of any name, nothing that lacks what is trained, and all that is needed to load the result.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from fed_trainer import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedDPOTrainer,
    FederatedRewardConfig,
    FederatedRewardTrainer,
    FederatedTaskConfig,
    FederatedTaskTrainer,
    FederatedTrainer,
)
from fed_trainer.output.run_lock import HOLDER_NAME, LOCK_NAME
from helpers.comparison import assert_same, weights_in
from peft_scl import FederaConfig, SclConfig


OF_THE_LOCK = {HOLDER_NAME, LOCK_NAME}
ADAPTERS = {
    "SCL": partial(SclConfig, r=2),
    "FeDeRA": partial(FederaConfig, r=2, target_modules=["q_proj"]),
    "LoRA": partial(LoraConfig, r=2, target_modules=["q_proj"]),
    "prompt": partial(PromptTuningConfig, num_virtual_tokens=2),
    "prefix": partial(PrefixTuningConfig, num_virtual_tokens=2),
}
COMMON = {
    "num_rounds": 2,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
TASK = {"SCL": "down_proj", "FeDeRA": "q_proj", "LoRA": "q_proj"}


@pytest.fixture
def make_sft(tiny_model_dir, make_clients, tmp_path):
    def make(output, kind=None, name="default", wrapped=True, **settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        config = ADAPTERS[kind](task_type="CAUSAL_LM") if kind else None
        if config is not None and wrapped:
            model, config = get_peft_model(model, config, adapter_name=name), None
        args = FederatedConfig(output_dir=str(tmp_path / output), max_length=32, **{**COMMON, **settings})
        clients = make_clients(num_clients=2, rows=4)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        return FederatedTrainer(model, args, clients, peft_config=config, processing_class=tokenizer)

    return make


def files_in(folder):
    """But for the lock of the run."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".fed_run."))
    return {path.relative_to(folder).as_posix() for path in files}


# Adapters that are not called "default"


@pytest.mark.fast("SCL", "prompt", "FeDeRA")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_any_name_is_saved_resumed_and_published_like_default(kind, make_sft, hub, tmp_path):
    for name in ("default", "ward"):
        make_sft(name, kind, name, push_to_hub=True, hub_model_id=name).train()
    assert files_in(tmp_path / "ward") == files_in(tmp_path / "default")
    for folder in ("", "checkpoint-1", "checkpoint-2"):
        assert_same(weights_in(tmp_path / "ward" / folder), weights_in(tmp_path / "default" / folder))
        config = json.loads((tmp_path / "ward" / folder / "adapter_config.json").read_text())
        assert config == json.loads((tmp_path / "default" / folder / "adapter_config.json").read_text())
    for commit, expected in zip(hub.commits("user/ward"), hub.commits("user/default"), strict=True):
        assert commit[2].keys() == expected[2].keys()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert commit[2].get(file) == expected[2].get(file)

    resumed = make_sft("resumed", kind, "ward", num_rounds=2)
    checkpoint = tmp_path / "ward" / "checkpoint-1"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights_in(tmp_path / "resumed"), weights_in(tmp_path / "ward"))


@pytest.mark.parametrize("aggregation", ["flora", "fedex_lora", "slora"])
def test_rules_that_publish_another_lora_take_any_name(aggregation, make_sft, tmp_path):
    settings = {"aggregation": aggregation}
    if aggregation == "slora":
        settings["aggregation_kwargs"] = {"sparse_rounds": 1}
    for name in ("default", "ward"):
        make_sft(name, "LoRA", name, **settings).train()
    assert files_in(tmp_path / "ward") == files_in(tmp_path / "default")
    assert_same(weights_in(tmp_path / "ward"), weights_in(tmp_path / "default"))


@pytest.mark.fast("SCL-task", "LoRA-reward")
@pytest.mark.parametrize("trainer", ["task", "reward"])
@pytest.mark.parametrize("kind", TASK)
def test_an_adapter_of_any_name_in_the_other_trainers(trainer, kind, tiny_model_dir, tmp_path):
    from transformers import AutoModelForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = {"input_ids": [[3, 4, 5, 6]] * 4, "attention_mask": [[1] * 4] * 4, "labels": [0, 1, 0, 1]}
    pairs = {"chosen": ["What is 3 plus 4? 7"] * 4, "rejected": ["What is 3 plus 4? 8"] * 4}
    for name in ("default", "ward"):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_model_dir, num_labels=2 if trainer == "task" else 1
        )
        model = get_peft_model(model, ADAPTERS[kind](task_type="SEQ_CLS"), adapter_name=name)
        output = str(tmp_path / name)
        if trainer == "task":
            data = {"a": Dataset.from_dict(rows), "b": Dataset.from_dict(rows)}
            FederatedTaskTrainer(
                model, FederatedTaskConfig(output, **COMMON), data, processing_class=tokenizer
            ).train()
        else:
            data = {"a": Dataset.from_dict(pairs), "b": Dataset.from_dict(pairs)}
            args = FederatedRewardConfig(output, max_length=32, **COMMON)
            FederatedRewardTrainer(model, args, data, processing_class=tokenizer).train()
    assert files_in(tmp_path / "ward") == files_in(tmp_path / "default")
    assert_same(weights_in(tmp_path / "ward"), weights_in(tmp_path / "default"))


def test_dpo_refuses_another_name(tiny_model_dir, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), ADAPTERS["LoRA"](), adapter_name="ward"
    )
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "chosen": ["b"] * 4, "rejected": ["c"] * 4})
    with pytest.raises(ValueError, match="trains the adapter 'default' of a `PeftModel`.* `initial_adapter`"):
        FederatedDPOTrainer(model, FederatedDPOConfig(str(tmp_path / "out"), **COMMON), {"a": rows})


@pytest.mark.parametrize("kind", ["SCL", "FeDeRA", "LoRA"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp", "is called like a module of the model"),
        ("0", "is called like a module of the model"),
        ("a/ward", "without slashes"),
        ("/ward", "without slashes"),
        ("a\\b", "without slashes"),
    ],
)
def test_names_that_cannot_be_saved_are_refused_at_the_start(kind, name, message, make_sft):
    with pytest.raises(ValueError, match=message):
        make_sft("out", kind, name)


@pytest.mark.parametrize("kind", ["SCL", "LoRA"])
@pytest.mark.parametrize("name", ["mlp", "self_attn", "0"])
def test_a_neighbour_called_like_a_module_is_refused_at_the_start(kind, name, tiny_model_dir, make_clients, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(model, ADAPTERS[kind](task_type="CAUSAL_LM"))
    model.add_adapter(name, ADAPTERS[kind](task_type="CAUSAL_LM"))
    args = FederatedConfig(str(tmp_path / "out"), max_length=32, **COMMON)
    with pytest.raises(ValueError, match=f"'{name}' is called like a module of the model"):
        FederatedTrainer(
            model, args, make_clients(2, 4), processing_class=AutoTokenizer.from_pretrained(tiny_model_dir)
        )


# Nothing is written that lacks what is trained


def losing(model, change):
    """`save_pretrained` of the model, after which `change` is done to the tensors that were written."""
    from safetensors.torch import save_file

    save = model.save_pretrained

    def save_pretrained(folder, **kwargs):
        save(folder, **kwargs)
        (path,) = Path(folder).rglob("*model.safetensors")
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    model.save_pretrained = save_pretrained


CHANGES = {
    "empty": lambda tensors: {},
    "one missing": lambda tensors: dict(sorted(tensors.items())[1:]),
    "one emptied": lambda tensors: tensors | {max(tensors): torch.zeros(0)},
    "one cut": lambda tensors: tensors | {max(tensors): tensors[max(tensors)][:1]},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [*ADAPTERS, None])
def test_what_lacks_something_is_not_written(kind, change, make_sft, tmp_path):
    if kind in ("prompt", "prefix") and change == "one cut":
        pytest.skip("the size of a prompt is not that of what computes it")
    trainer = make_sft("out", kind, "ward")
    losing(trainer.model, CHANGES[change])
    with pytest.raises(ValueError, match="is not what is trained"):
        trainer.train()
    assert files_in(tmp_path / "out") - OF_THE_LOCK == {"federation.json", "federation.jsonl"}
    with pytest.raises(ValueError, match="is not what is trained"):
        trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="is not what is trained"):
        trainer.save_client_model("client_0", tmp_path / "saved")
    assert files_in(tmp_path / "saved") == set()


@pytest.mark.parametrize("change", ["empty", "one missing", "one emptied"])
def test_what_lacks_a_factor_of_the_base_is_not_written(change, make_sft, tmp_path, monkeypatch):
    trainer = make_sft("out", "LoRA", aggregation="fedex_lora")
    to_lora = trainer._base_changes.to_lora
    trainer._base_changes.to_lora = lambda *args: (export := to_lora(*args))._replace(
        state_dict=CHANGES[change](export.state_dict)
    )
    with pytest.raises(ValueError, match="is missing or empty"):
        trainer.train()
    assert files_in(tmp_path / "out") - OF_THE_LOCK == {"federation.json", "federation.jsonl"}


# What is needed to load the result


WRITTEN = (
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
)  # fmt: skip
PICKLED = {"voices.bin": b"text", "cache": b"\x80\x05N."}
THEIRS = {
    "credentials.json",
    "vocab.json",
    "notes.md",
    "model-00001-of-00009.safetensors",
    "train.py",
    "runs/events.json",
}


class Processing:
    """What prepares data, with files of its own, as custom tokenizers and processors have."""

    model_input_names = ("pixel_values",)

    def save_pretrained(self, folder, **kwargs):
        for name, content in {**dict.fromkeys(WRITTEN, b"ours"), **PICKLED}.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)


def images(num_clients=2):
    rows = {"pixel_values": torch.zeros(4, 3, 16, 16).tolist(), "labels": [0, 1, 0, 1]}
    return {f"hospital_{index}": Dataset.from_dict(rows) for index in range(num_clients)}


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("pixel_values", "labels")}


def image_model(model_class=ViTForImageClassification, config_class=ViTConfig):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model_class(config_class(**sizes, image_size=16, patch_size=8, num_labels=2))


def image_trainer(output, model=None, **settings):
    args = FederatedTaskConfig(str(output), **{**COMMON, **settings})
    return FederatedTaskTrainer(
        model or image_model(),
        args,
        images(),
        data_collator=collate,
        processing_class=Processing(),
    )


def test_what_the_run_has_written_is_published_and_nothing_else(hub, tmp_path, caplog):
    out = tmp_path / "out"
    for name in THEIRS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("theirs")
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        image_trainer(out, push_to_hub=True, hub_model_id="model").train()
    base = {"README.md", "config.json", "federation.json", "model.safetensors", "trainer_state.json"}
    for _, _, files in hub.commits("user/model")[1:]:
        assert files.keys() - {".gitattributes"} == base | set(WRITTEN)
        assert all(files[name] == b"ours" for name in WRITTEN)
    warned = {record.getMessage().split()[0] for record in caplog.records if "is not published" in record.getMessage()}
    assert warned == set(PICKLED)
    manifest = json.loads((out / "digests.json").read_text())
    assert manifest.keys() == {"config.json", "model.safetensors", *WRITTEN, *PICKLED}
    assert all((out / name).read_text() == "theirs" for name in THEIRS)


def test_code_of_a_model_of_ones_own_is_published_with_it(hub, tmp_path, monkeypatch):
    class OwnConfig(ViTConfig):
        model_type = "own-vit"

    class OwnForImageClassification(ViTForImageClassification):
        config_class = OwnConfig

    for own in (OwnConfig, OwnForImageClassification):
        monkeypatch.setattr(own, "__module__", __name__)
    OwnConfig.register_for_auto_class()
    OwnForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    trainer = image_trainer(tmp_path / "out", image_model(OwnForImageClassification, OwnConfig))
    trainer.train()
    trainer.push_to_hub()
    code = f"{Path(__file__).stem}.py"
    files = hub.commits("user/out")[-1][2]
    assert files[code] == Path(__file__).read_bytes()
    assert json.loads(files["config.json"])["auto_map"]["AutoConfig"] == f"{Path(__file__).stem}.OwnConfig"


# Weights in several files


INDEX = "model.safetensors.index.json"


def sharded(trainer, size="20KB"):
    trainer.model.save_pretrained = partial(trainer.model.save_pretrained, max_shard_size=size)
    return trainer


def test_split_weights_are_found_resumed_and_published(hub, tmp_path):
    whole = image_trainer(tmp_path / "whole", num_rounds=3)
    whole.train()
    expected = ViTForImageClassification.from_pretrained(tmp_path / "whole").state_dict()

    settings = {"num_rounds": 3, "push_to_hub": True, "hub_model_id": "model"}
    first = sharded(image_trainer(tmp_path / "out", **settings | {"num_rounds": 2}), "5KB")
    first.train()
    files = files_in(tmp_path / "out" / "checkpoint-2")
    assert INDEX in files and "model.safetensors" not in files and sum(name.startswith("model-") for name in files) > 2
    with pytest.raises(FileExistsError, match="already holds a run"):
        image_trainer(tmp_path / "out").train()

    resumed = sharded(image_trainer(tmp_path / "out", **settings), "5KB")
    resumed.train(resume_from_checkpoint=True)
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert_same(loaded, expected)
    again = image_trainer(tmp_path / "again", num_rounds=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(ViTForImageClassification.from_pretrained(tmp_path / "again").state_dict(), expected)

    published = hub.commits("user/model")[-1][2]
    assert {name for name in published if name.startswith("model")} == {
        name for name in files_in(tmp_path / "out") if name.startswith("model")
    }
    assert_same(ViTForImageClassification.from_pretrained("user/model").state_dict(), expected)


@pytest.mark.parametrize("size", ["5KB", "1GB"])
def test_a_result_without_checkpoints_is_told_from_a_run_that_died(size, tmp_path):
    sharded(image_trainer(tmp_path / "out"), size).save_model()
    with pytest.raises(FileExistsError, match="already holds a run"):
        image_trainer(tmp_path / "out").train()
    with pytest.raises(ValueError, match="there is no checkpoint .* only a saved model .* in another `output_dir`"):
        image_trainer(tmp_path / "out").train(resume_from_checkpoint=True)


def test_weights_of_another_sharding_do_not_stay_beside_the_new_ones(tmp_path):
    """transformers takes `model.safetensors` before an index."""
    trainer = image_trainer(tmp_path / "out")
    trainer.save_model()
    theirs = tmp_path / "out" / "vocab.txt"
    theirs.write_text("theirs")  # was ours, is theirs now
    trainer.processing_class = None
    sharded(trainer, "5KB").save_model()
    files = files_in(tmp_path / "out")
    assert "model.safetensors" not in files and INDEX in files
    assert "spiece.model" not in files and theirs.read_text() == "theirs"


def test_the_result_of_a_run_is_no_checkpoint(make_sft, tmp_path):
    make_sft("out", "LoRA", server_optimizer="fedadam").train()
    with pytest.raises(ValueError, match="federation.json is not in digests.json"):
        make_sft("more", "LoRA", server_optimizer="fedadam", num_rounds=3).train(
            resume_from_checkpoint=str(tmp_path / "out")
        )
