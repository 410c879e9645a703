# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federated image classification with a vision transformer, on any Hub id or local folder, or a `.npz` of MedMNIST.

    python recipes/federated_images.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name pneumoniamnist.npz --method scl --num_rounds 15 --clients_per_round 5 --max_steps 10 \
        --learning_rate 5e-3 --output_dir out

Every field of `FederatedTaskConfig` (hence of `TrainingArguments`) and of `RecipeArguments` below can stand in a
YAML too (`--config`). `--resume_from_checkpoint True` continues a run that died.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from federated_classification import compute_metrics
from federated_sft import resume
from peft import LoraConfig, PeftConfig
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils.import_utils import is_matplotlib_available
from trl import TrlParser

from fed_trainer import FederatedTaskConfig, FederatedTaskTrainer, dirichlet_partition, partition_summary
from fed_trainer.output.report import write_report
from peft_scl import FederaConfig, SclConfig


HEAD = "classifier"  # of the image classifiers of transformers


@dataclass
class RecipeArguments:
    """
    Model, data, split and method of a federated image classification run.

    Args:
        model_name_or_path (`str`):
            Base model, a Hub id or a folder with a ViT or the like and its image processor. It gets a new
            classification head.
        dataset_name (`str`):
            Data with the splits `train` and `test`: a Hub id, a folder, or a `.npz` of MedMNIST.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column with the images.
        target_column (`str`, *optional*, defaults to `"label"`):
            Column with the class (a `ClassLabel`). The clients are split by it.
        num_clients (`int`, *optional*, defaults to `10`):
            Number of clients.
        alpha (`float`, *optional*, defaults to `0.5`):
            Concentration of the Dirichlet split: the smaller, the more uneven.
        min_examples (`int`, *optional*, defaults to `32`):
            Least number of examples per client.
        method (`str`, *optional*, defaults to `"scl"`):
            What is trained beside the head. `"scl"`: compression layers in place of the down projections. `"lora"`,
            `"federa"`: on all linear layers. `"full"`: everything. Each has a learning rate of its own: set
            `learning_rate` along.
        r (`int`, *optional*, defaults to `8`):
            Rank or width of the adapter.
    """

    model_name_or_path: str = field(metadata={"help": "Base model, a Hub id or a folder."})
    dataset_name: str = field(metadata={"help": "Data, a Hub id, a folder or a `.npz` of MedMNIST."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    target_column: str = field(default="label", metadata={"help": "Column with the class."})
    num_clients: int = field(default=10, metadata={"help": "Number of clients."})
    alpha: float = field(default=0.5, metadata={"help": "Concentration of the Dirichlet split."})
    min_examples: int = field(default=32, metadata={"help": "Least number of examples per client."})
    method: str = field(
        default="scl",
        metadata={"help": "What is trained beside the head.", "choices": ["scl", "lora", "federa", "full"]},
    )
    r: int = field(default=8, metadata={"help": "Rank or width of the adapter."})


def load_data(recipe: RecipeArguments) -> DatasetDict:
    """The splits with the columns `image` and `label`."""
    if recipe.dataset_name.endswith(".npz"):
        return load_medmnist(recipe.dataset_name)
    data = load_dataset(recipe.dataset_name)
    columns = {recipe.image_column: "image", recipe.target_column: "label"}
    data = DatasetDict({name: data[name].select_columns(list(columns)) for name in ("train", "test")})
    return data.rename_columns({old: new for old, new in columns.items() if old != new})


def load_medmnist(path: str) -> DatasetDict:
    """The arrays `<split>_images` and `<split>_labels` of MedMNIST."""
    arrays = np.load(path)
    classes = [str(label) for label in range(int(arrays["train_labels"].max()) + 1)]
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"image": list(arrays[f"{name}_images"]), "label": arrays[f"{name}_labels"].ravel()}, features=features
            )
            for name in ("train", "test")
        }
    )


@dataclass
class ImageCollator:
    """
    Prepares the images of a batch when it is needed: prepared ones would take many times the space of the files.

    Args:
        processor (`BaseImageProcessor`):
            That of the model.
    """

    processor: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {**self.processor(images, return_tensors="pt"), "labels": labels}


def make_model(recipe: RecipeArguments, classes: list[str], seed: int) -> PreTrainedModel:
    """The base model with a new head, the same for a seed."""
    set_seed(seed)
    return AutoModelForImageClassification.from_pretrained(
        recipe.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        ignore_mismatched_sizes=True,
    )


def make_peft_config(recipe: RecipeArguments) -> PeftConfig | None:
    """The adapter of the method with the head; `None` where the whole model is trained."""
    # PEFT has no task type for images, so the head is named
    common: dict[str, Any] = {"r": recipe.r, "modules_to_save": [HEAD]}
    linear: dict[str, Any] = {"lora_alpha": recipe.r, "target_modules": "all-linear", "exclude_modules": [HEAD]}
    match recipe.method:
        case "scl":
            return SclConfig(**common)
        case "lora":
            return LoraConfig(**common, **linear)
        case "federa":
            return FederaConfig(**common, **linear)
        case _:
            return None


def main() -> None:
    parser = TrlParser([RecipeArguments, FederatedTaskConfig])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config()

    data = load_data(recipe)
    classes = data["train"].features["label"].names
    args.label_column = "label"
    args.remove_unused_columns = False  # the collator needs the images
    args.partition = f"dirichlet(alpha={recipe.alpha}) over {recipe.target_column}"
    clients = dirichlet_partition(
        data["train"], recipe.num_clients, recipe.alpha, "label", args.seed, recipe.min_examples
    )

    trainer = FederatedTaskTrainer(
        model=make_model(recipe, classes, args.seed),
        args=args,
        train_dataset=clients,
        eval_dataset=data["test"],
        data_collator=ImageCollator(AutoImageProcessor.from_pretrained(recipe.model_name_or_path)),
        compute_metrics=compute_metrics,
        peft_config=make_peft_config(recipe),
    )
    if trainer.is_world_process_zero():
        print(partition_summary(clients, "label"))
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        print(f"{recipe.method}: {trained:,} parameters are trained")
    trainer.train(resume_from_checkpoint=resume(args.resume_from_checkpoint))
    if trainer.is_world_process_zero() and is_matplotlib_available():
        for path in write_report(args.output_dir):
            print(f"wrote {path}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
