# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The image recipe with each of its methods, on a tiny random ViT and images made on the spot."""

import federated_images as recipe
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fed_trainer import read_record
from helpers.runs import run_recipe


SIDE = 16


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """Folder with a random ViT with a head for four classes, and its processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    set_seed(0)
    config = ViTConfig(
        image_size=SIDE, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=4,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def grey_images(number, seed):
    """Bright images are of class 1; two of three are bright."""
    draw = np.random.default_rng(seed)
    labels = (np.arange(number) % 3 > 0).astype(np.int64)
    return draw.integers(0, 120, (number, SIDE, SIDE)).astype(np.uint8) + (100 * labels[:, None, None]).astype(
        np.uint8
    ), labels


@pytest.fixture
def run(tiny_vit, tmp_path, monkeypatch):
    """Runs `main` of the recipe with two clients and two rounds; returns the output folder."""
    arrays = {}
    for split, number in (("train", 48), ("test", 12)):
        arrays[f"{split}_images"], labels = grey_images(number, len(split))
        arrays[f"{split}_labels"] = labels[:, None]
    np.savez(tmp_path / "squares.npz", **arrays)

    def run(method, output="out", **settings):
        given = {
            "model_name_or_path": tiny_vit, "dataset_name": tmp_path / "squares.npz", "output_dir": tmp_path / output,
            "num_clients": 2, "min_examples": 8, "method": method, "r": 4, "num_rounds": 2, "max_steps": 2,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, **settings,
        }  # fmt: skip
        return run_recipe(recipe.main, monkeypatch, **given)

    return run


@pytest.mark.parametrize("method", ["scl", "lora", "federa", "full"])
def test_every_method_trains_the_head_and_gives_macro_f1(run, tiny_vit, method):
    folder = run(method)
    record = read_record(folder)
    evaluations = [record["start"]["eval"], *(entry["eval"] for entry in record["rounds"])]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all({"eval_accuracy", "eval_macro_f1"} <= figures.keys() for figures in evaluations)
    assert record["partition"] == "dirichlet(alpha=0.5) over label"
    assert sum(sum(client["composition"].values()) for client in record["clients"].values()) == 48
    (path,) = folder.glob("*model.safetensors")
    heads = {key for key in load_file(path) if "classifier" in key}
    assert {key.rpartition(".")[2] for key in heads} == {"weight", "bias"} and len(heads) == 2


def test_the_published_adapter_gives_the_classes_of_the_run(run, tiny_vit):
    folder = run("scl")
    record = read_record(folder)
    example = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]  # the base has four classes
    example = example.replace("path/to/the/base/model", str(tiny_vit)).replace("path/to/this/folder", str(folder))
    namespace = {}
    exec(example, namespace)
    model = namespace["model"].eval()
    images, labels = grey_images(12, len("test"))
    rows = Dataset.from_dict(
        {"image": list(images), "label": labels}, features=Features({"image": Image(), "label": ClassLabel(2)})
    )
    batch = recipe.ImageCollator(ViTImageProcessorPil.from_pretrained(tiny_vit))(list(rows))
    with torch.no_grad():
        hits = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert hits.float().mean().item() == pytest.approx(record["rounds"][-1]["eval"]["eval_accuracy"])


def test_a_folder_with_other_column_names(run, tmp_path):
    for split, number in (("train", 48), ("test", 12)):
        images, labels = grey_images(number, 0)
        features = Features({"scan": Image(), "finding": ClassLabel(names=["dark", "bright"])})
        rows = Dataset.from_dict({"scan": list(images), "finding": labels}, features=features)
        rows.to_parquet(tmp_path / "scans" / f"{split}.parquet")
    folder = run("lora", dataset_name=tmp_path / "scans", image_column="scan", target_column="finding", num_rounds=1)
    assert read_record(folder)["partition"] == "dirichlet(alpha=0.5) over finding"
