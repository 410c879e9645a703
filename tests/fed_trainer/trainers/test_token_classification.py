# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Named entities with `FederatedTaskTrainer`: a label per token, padded by the collator of transformers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForTokenClassification, LoraConfig
from safetensors.torch import load_file
from transformers import (
    BertForTokenClassification,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
)

from helpers.models import tiny_bert
from helpers.runs import Dies
from peft_scl import SclConfig


NUM_LABELS = 3  # 0 for all other words
ADAPTERS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], task_type="TOKEN_CLS"),
    "scl": SclConfig(r=4, task_type="TOKEN_CLS"),
}
each_adapter = pytest.mark.parametrize("peft_config", ADAPTERS.values(), ids=ADAPTERS)


def rows_of(client, number=16):
    """
    Words 10 to 14 are of class 1 and 15 to 19 of class 2; the first and last token have no label. Lengths differ.
    """
    draw = np.random.default_rng(client)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(number):
        words = draw.integers(5, 30, size=draw.integers(3, 9)).tolist()
        labels = [(word - 5) // 5 if 10 <= word < 20 else 0 for word in words]
        rows["input_ids"].append([2, *words, 3])
        rows["attention_mask"].append([1] * (len(words) + 2))
        rows["labels"].append([-100, *labels, -100])
    return Dataset.from_dict(rows)


def figures(prediction):
    """Accuracy and macro-F1 over the tokens that have a label."""
    labelled = prediction.label_ids != -100
    truth, predicted = prediction.label_ids[labelled], prediction.predictions.argmax(-1)[labelled]
    scores = []
    for label in range(NUM_LABELS):
        hits = ((truth == label) & (predicted == label)).sum()
        scores.append(2 * hits / max(1, (truth == label).sum() + (predicted == label).sum()))
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": float(np.mean(scores))}


@pytest.fixture
def make_trainer(make_trainer, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(28))]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))

    def make(output, peft_config, **given):
        return make_trainer(
            output,
            peft_config,
            kind="task",
            model=tiny_bert(kind=BertForTokenClassification, num_hidden_layers=2),
            clients={f"ward-{client}": rows_of(client) for client in range(3)},
            eval_dataset=rows_of(9, 32),
            data_collator=DataCollatorForTokenClassification(tokenizer),
            processing_class=tokenizer,
            compute_metrics=figures,
            **{"max_steps": 4, **given},
        )

    return make


@each_adapter
def test_the_tagger_and_its_head_are_trained_and_published(make_trainer, tmp_path, peft_config):
    tiny_bert(kind=BertForTokenClassification, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    trainer = make_trainer("out", peft_config, num_rounds=3)
    start = trainer.federation.state
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= start.keys()
    trainer.train()
    evaluations = [trainer.record["start"]["eval"], *(entry["eval"] for entry in trainer.record["rounds"])]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_macro_f1"] > evaluations[0]["eval_macro_f1"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.classifier.weight"
    assert not torch.equal(saved[key], start[key])
    trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer.save_model(str(tmp_path / "published"))
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "published", num_labels=NUM_LABELS).eval()
    tokens = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


@pytest.mark.fast("lora")
@each_adapter
def test_a_run_that_died_resumes_to_the_same_tagger(make_trainer, tmp_path, peft_config):
    settings = {"peft_config": peft_config, "num_rounds": 3, "clients_per_round": 2}
    whole = make_trainer("whole", **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", callbacks=[Dies()], **settings).train()
    again = make_trainer("died", **settings)
    again.train(resume_from_checkpoint=True)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "died"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert [entry["eval"]["eval_macro_f1"] for entry in whole.record["rounds"]] == [
        entry["eval"]["eval_macro_f1"] for entry in again.record["rounds"]
    ]
