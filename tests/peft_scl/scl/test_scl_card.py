# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card: says how to load the adapter wherever one is saved, once, and leaves what users wrote alone."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers.hub import REPO
from helpers.scl_models import ARCHITECTURES
from peft_scl import SclConfig
from peft_scl.card import IMPORT_LINE, update_model_card


MINE = """---
license: mit
tags:
- mine
---

# My adapter

What I found, and

```python
## a comment in code
```

## Results

Good.
"""


def _model(task_type="CAUSAL_LM", adapter_name="default"):
    base = ARCHITECTURES["llama"].build()
    base.config._name_or_path = base.name_or_path = "some/base"
    return get_peft_model(base, SclConfig(r=2, task_type=task_type), adapter_name=adapter_name)


def _assert_says_how_to_load(card, loader="AutoPeftModelForCausalLM"):
    assert card.text.count("import peft_scl") == 1
    assert f"```python\n{IMPORT_LINE}\nfrom peft import {loader}\n\nmodel = {loader}.from_pretrained(" in card.text
    assert "https://arxiv.org/abs/2412.07021" in card.text
    assert "scl" in card.data.tags
    assert len(set(card.data.tags)) == len(card.data.tags)


@pytest.mark.parametrize(("task_type", "loader"), [("CAUSAL_LM", "AutoPeftModelForCausalLM"), (None, "PeftModel")])
def test_saving_adds_the_import_to_the_card_of_peft(task_type, loader, tmp_path):
    _model(task_type).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    _assert_says_how_to_load(card, loader)
    assert card.data.tags == ["base_model:adapter:some/base", "scl", "transformers"]
    assert (card.data.library_name, card.data.base_model) == ("peft", "some/base")
    assert card.text.index("import peft_scl") < card.text.index("## Model Details")  # where it is seen


def test_saving_again_changes_nothing(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path).save_pretrained(tmp_path)
    _assert_says_how_to_load(ModelCard.load(tmp_path / "README.md"))


def test_text_of_the_user_stays_and_code_in_it_is_no_heading(tmp_path):
    (tmp_path / "README.md").write_text(MINE)
    for _ in range(2):
        _model().save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        _assert_says_how_to_load(card)
        assert card.data.license == "mit"
        before, after = card.text.split("## How to load this adapter")
        mine, results = MINE.split("---\n")[2].split("## Results")
        assert before == mine
        assert after.split("## Results")[1].startswith(results)


def test_a_card_that_has_the_import_keeps_its_own_words(tmp_path):
    (tmp_path / "README.md").write_text(MINE + "\nDo `import peft_scl` first.\n")
    _model().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_scl") == 1
    assert "## How to load this adapter" not in card.text
    assert "scl" in card.data.tags


def test_a_card_that_says_it_all_is_not_touched(tmp_path):
    path = tmp_path / "README.md"
    text = f"---\ntags: [scl]   # by hand\n---\n{IMPORT_LINE}\n"
    path.write_text(text)
    update_model_card(tmp_path, SclConfig())
    assert path.read_text() == text


def test_a_card_without_metadata_and_headings_gets_both(tmp_path):
    (tmp_path / "README.md").write_text("Just text.\n")
    _model().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    _assert_says_how_to_load(card)
    assert card.text.lstrip().startswith("Just text.\n")
    assert "\n\n## How to load this adapter\n" in card.text


def test_an_adapter_in_a_folder_of_its_own_has_a_card_there(tmp_path):
    _model(adapter_name="x").save_pretrained(tmp_path)
    _assert_says_how_to_load(ModelCard.load(tmp_path / "x" / "README.md"))
    assert "scl" in ModelCard.load(tmp_path / "README.md").data.tags


def test_a_model_that_is_not_of_transformers_has_the_tag_too(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), SclConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    _assert_says_how_to_load(ModelCard.load(tmp_path / "README.md"), "PeftModel")


def test_saving_an_adapter_of_a_transformers_model_writes_a_card(tmp_path):
    base = ARCHITECTURES["llama"].build()
    base.name_or_path = "some/base"
    base.add_adapter(SclConfig(r=2, task_type="CAUSAL_LM"))
    for _ in range(2):
        base.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        _assert_says_how_to_load(card)
        assert (card.data.library_name, card.data.base_model) == ("peft", "some/base")
        assert card.data.tags == ["base_model:adapter:some/base", "scl"]


def test_other_methods_keep_their_cards(tmp_path):
    get_peft_model(ARCHITECTURES["llama"].build(), LoraConfig(r=2, target_modules=["down_proj"])).save_pretrained(
        tmp_path
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert "peft_scl" not in card.text and "scl" not in card.data.tags


def _rows():
    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 2, "labels": [[1, 2, 3]] * 2})


def test_trainers_write_it_into_every_checkpoint(tmp_path):
    arguments = {"max_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(_model(), TrainingArguments(str(tmp_path), **arguments), train_dataset=_rows())
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        _assert_says_how_to_load(ModelCard.load(folder / "README.md"))
    trainer.create_model_card()  # replaces the text
    assert "scl" in ModelCard.load(tmp_path / "README.md").data.tags
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    _assert_says_how_to_load(card)
    assert "## Training procedure" in card.text


def test_the_card_of_trl_keeps_its_text_and_what_it_pushes_has_the_tag(hub, tmp_path, tiny_model_dir):
    config = SFTConfig(
        str(tmp_path / "out"),
        max_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        hub_model_id=REPO,
    )
    trainer = SFTTrainer(
        str(tiny_model_dir),
        config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["What is 1 plus 1?"] * 2, "completion": [" 2"] * 2}),
        peft_config=SclConfig(r=2, task_type="CAUSAL_LM"),
    )
    trainer.train()
    _assert_says_how_to_load(ModelCard.load(tmp_path / "out" / "checkpoint-1" / "README.md"))

    trainer.push_to_hub()  # writes TRL's card, and over it nothing
    assert "scl" in ModelCard(hub.commits(REPO)[-1][2]["README.md"].decode()).data.tags
    trainer.save_model()
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=tmp_path / "out", ignore_patterns="checkpoint-*")
    card = ModelCard(hub.commits(REPO)[-1][2]["README.md"].decode())
    _assert_says_how_to_load(card)
    assert "## Training procedure" in card.text


def test_a_saved_folder_is_published_with_its_card_and_later_pushes_keep_it(hub, tmp_path):
    model = _model()
    model.save_pretrained(tmp_path / "adapter")
    huggingface_hub.create_repo(REPO)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=tmp_path / "adapter")
    published = hub.commits(REPO)[-1][2]
    assert IMPORT_LINE in published["README.md"].decode()

    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.scl_B["default"].weight.fill_(1)
    model.push_to_hub(REPO)
    pushed = hub.commits(REPO)[-1][2]
    assert pushed["adapter_model.safetensors"] != published["adapter_model.safetensors"]
    assert Path(huggingface_hub.hf_hub_download(REPO, "README.md")).read_text().count(IMPORT_LINE) == 1
