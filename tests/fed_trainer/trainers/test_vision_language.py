# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Vision-language models with `FederatedTrainer` and `FederatedDPOTrainer`: images are prepared by TRL's collators."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import SFTConfig, SFTTrainer

from fed_trainer.federation.sampling import client_seed
from helpers.comparison import same, weights_in
from helpers.local_rounds import local_round
from helpers.runs import Dies
from helpers.trainers import QUICK_TEXT


SIDE, PATCH = 16, 8
LOCAL = {**QUICK_TEXT, "per_device_train_batch_size": 2, "max_length": None}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# messages hold text, or a list with the places of images
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer,
        PATCH,
        "default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_model(processor):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=SIDE, patch_size=PATCH, projection_dim=16)
    text = LlamaConfig(**small, vocab_size=len(processor.tokenizer), max_position_embeddings=128)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token, vision_feature_layer=-1, image_seq_length=4
    )
    return LlavaForConditionalGeneration(config)


def message(role, text):
    return [{"role": role, "content": text}]


def rows_of(client, number=8):
    """Bright and dark squares."""
    draw = np.random.default_rng(client)
    rows = {"images": [], "prompt": [], "chosen": [], "rejected": []}
    for row in range(number):
        pixels = draw.integers(0, 100, size=(SIDE, SIDE, 3)) + (150 if row % 2 else 0)
        rows["images"].append([Image.fromarray(pixels.astype(np.uint8))])
        rows["prompt"].append(message("user", "Is it bright?"))
        rows["chosen"].append(message("assistant", "yes" if row % 2 else "no"))
        rows["rejected"].append(message("assistant", "no" if row % 2 else "yes"))
    messages = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(ImageFeature()), **dict.fromkeys(("prompt", "chosen", "rejected"), messages)})
    return Dataset.from_dict(rows, features=features)


def make_clients(is_preference):
    clients = {f"camera-{client}": rows_of(client) for client in range(2)}
    if is_preference:
        return clients
    return {
        name: rows.remove_columns("rejected").rename_column("chosen", "completion") for name, rows in clients.items()
    }


@pytest.fixture
def make_trainer(make_trainer, processor):
    def make(output, is_preference=False, **given):
        clients = make_clients(is_preference)
        given = {
            "clients": clients,
            "eval_dataset": clients["camera-0"],
            "processing_class": processor,
            **LOCAL,
            **given,
        }
        return make_trainer(output, LORA, kind="dpo" if is_preference else "sft", model=make_model(processor), **given)

    return make


def test_the_second_client_is_trained_as_by_the_stock_trainer(make_trainer, processor, tmp_path):
    """The first is prepared by TRL itself; `pixel_values` have to reach the model for the others as well."""
    trainer = make_trainer("out")
    seed = client_seed(42, 1, "camera-1")
    prepared = trainer.client.data.prepared("camera-1")
    local, metrics = local_round(trainer, trainer.federation.state, prepared, seed=seed)

    args = SFTConfig(
        output_dir=str(tmp_path / "stock"), bf16=False, save_strategy="no", lr_scheduler_type="constant", **LOCAL
    )
    stock = SFTTrainer(
        model=make_model(processor),
        args=args,
        train_dataset=make_clients(False)["camera-1"],
        processing_class=processor,
        peft_config=LORA,
    )
    set_seed(seed)
    assert stock.train().training_loss == metrics["train_loss"]
    after = get_peft_model_state_dict(stock.model)
    assert all(torch.equal(local[key], after[key]) for key in local)
    assert not same(local, trainer.federation.state)


@pytest.mark.fast("sft")
@pytest.mark.parametrize("is_preference", [False, True], ids=["sft", "dpo"])
def test_a_run_with_images_that_died_resumes_to_the_same_adapter(make_trainer, tmp_path, is_preference):
    whole = make_trainer("whole", is_preference)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("died", is_preference, callbacks=[Dies()]).train()
    make_trainer("died", is_preference).train(resume_from_checkpoint=True)
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "died"))
    assert any(".vision_tower." in key for key in weights_in(tmp_path / "whole"))
    losses = [whole.record["start"]["eval"]["eval_loss"], whole.record["rounds"][-1]["eval"]["eval_loss"]]
    assert losses[1] < losses[0]
