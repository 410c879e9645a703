# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federated text classification with FeDeRA and the methods it is compared with, on any Hub id or local folder.

    python recipes/federated_classification.py --config recipes/configs/banking77_federa.yaml
    python recipes/federated_classification.py --config recipes/configs/banking77_federa.yaml --method lora

Every field of `FederatedTaskConfig` (hence of `TrainingArguments`) and of `RecipeArguments` below can stand in the
YAML and be overridden on the command line. `--resume_from_checkpoint True` continues a run that died.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from federated_sft import built_config, resume
from peft import LoraConfig, PeftConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.import_utils import is_matplotlib_available
from trl import TrlParser

from fed_trainer import (
    FederatedTaskConfig,
    FederatedTaskTrainer,
    dirichlet_partition,
    iid_partition,
    partition_summary,
    pathological_partition,
)
from fed_trainer.config import json_mapping
from fed_trainer.output.report import write_report
from peft_scl import FederaConfig, SclConfig


@dataclass
class RecipeArguments:
    """
    Model, data, split and method of a federated classification run.

    Args:
        model_name_or_path (`str`):
            Base model, a Hub id or a folder. It gets a new classification head.
        dataset_name (`str`):
            Data, a Hub id or a folder with Parquet, JSON or CSV files, with the splits `train` and `test`.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column with the text.
        target_column (`str`, *optional*, defaults to `"label"`):
            Column with the class, a number or a string. The clients are split by it.
        max_length (`int`, *optional*, defaults to `128`):
            Longer texts are cut to so many tokens.
        max_eval_samples (`int`, *optional*):
            Evaluate on so many test rows only, drawn with `seed`: test splits are often sorted by class.
        partition_method (`str`, *optional*, defaults to `"dirichlet"`):
            How the training split becomes clients: `"dirichlet"`, `"pathological"` or `"iid"`, see
            `fed_trainer.data.partition`.
        num_clients (`int`, *optional*, defaults to `10`):
            Number of clients.
        alpha (`float`, *optional*, defaults to `0.1`):
            Concentration of `"dirichlet"`: the smaller, the more uneven.
        classes_per_client (`int`, *optional*, defaults to `8`):
            For `"pathological"`.
        min_examples (`int`, *optional*, defaults to `32`):
            Least number of examples per client for `"dirichlet"`.
        method (`str`, *optional*, defaults to `"federa"`):
            What is trained beside the head. `"federa"`: LoRA started from the principal singular directions. `"lora"`.
            `"scl"`: compression layers in place of the down projections. `"adapter"`: a GELU bottleneck of width `r`
            in front of each down projection (`SclConfig`; Houlsby et al. put theirs behind the block). `"bitfit"`:
            all biases. `"full"`: everything. Each has a learning rate of its own: set `learning_rate` along.
        r (`int`, *optional*, defaults to `8`):
            Rank or width of the adapter.
        lora_alpha (`int`, *optional*, defaults to `8`):
            For `"federa"` and `"lora"`: their update is scaled by `lora_alpha / r`.
        target_modules (`str`, *optional*, defaults to `"all-linear"`):
            For `"federa"` and `"lora"`: the layers to adapt, a regular expression or `"all-linear"` (all but the
            head).
        peft_config (`dict`, *optional*):
            Further fields of the adapter's PEFT config.
    """

    model_name_or_path: str = field(metadata={"help": "Base model, a Hub id or a folder."})
    dataset_name: str = field(metadata={"help": "Data, a Hub id or a folder with Parquet, JSON or CSV files."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    target_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many test rows only."})
    partition_method: str = field(
        default="dirichlet",
        metadata={
            "help": "How the training split becomes clients.",
            "choices": ["dirichlet", "pathological", "iid"],
        },
    )
    num_clients: int = field(default=10, metadata={"help": "Number of clients."})
    alpha: float = field(default=0.1, metadata={"help": "Concentration of dirichlet."})
    classes_per_client: int = field(default=8, metadata={"help": "Classes per client for pathological."})
    min_examples: int = field(default=32, metadata={"help": "Least number of examples per client for dirichlet."})
    method: str = field(
        default="federa",
        metadata={
            "help": "What is trained beside the head.",
            "choices": ["federa", "lora", "scl", "adapter", "bitfit", "full"],
        },
    )
    r: int = field(default=8, metadata={"help": "Rank or width of the adapter."})
    lora_alpha: int = field(default=8, metadata={"help": "For federa and lora."})
    target_modules: str = field(default="all-linear", metadata={"help": "For federa and lora: a regular expression."})
    peft_config: dict | str | None = field(
        default=None, metadata={"help": "Further fields of the adapter's PEFT config, a mapping or JSON."}
    )

    def __post_init__(self) -> None:
        self.peft_config = json_mapping("peft_config", self.peft_config)
        if self.peft_config and self.method in ("bitfit", "full"):
            raise ValueError(f"`method={self.method!r}` has no adapter, but `peft_config` is {self.peft_config}.")


def load_data(recipe: RecipeArguments) -> tuple[DatasetDict, list[str]]:
    """The splits with the columns `text` and `label` (a number from 0), and the names of the classes."""
    data = load_dataset(recipe.dataset_name)
    text, target = recipe.text_column, recipe.target_column
    if not {"train", "test"} <= set(data):
        raise ValueError(f"{recipe.dataset_name!r} has the splits {list(data)}, but 'train' and 'test' are needed.")
    for name in ("train", "test"):
        if missing := {text, target} - set(data[name].column_names):
            raise ValueError(
                f"The split {name!r} of {recipe.dataset_name!r} has the columns {data[name].column_names}, but not "
                f"{sorted(missing)}. Set `text_column` and `target_column`."
            )
    data = DatasetDict({name: data[name].select_columns([text, target]) for name in ("train", "test")})
    data = data.rename_columns({old: new for old, new in ((text, "text"), (target, "label")) if old != new})
    feature = data["train"].features["label"]
    if isinstance(feature, ClassLabel):
        return data, feature.names
    classes = sorted(set(data["train"]["label"]))
    if unknown := sorted(set(data["test"]["label"]) - set(classes)):
        raise ValueError(f"The test split has classes that the training split has not: {unknown[:5]}.")
    index = {value: number for number, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    encoded = data.map(lambda row: {"label": index[row["label"]]}).cast_column("label", feature)
    return encoded, feature.names


def tokenise(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Adds the inputs of the model; padding is left to the collator."""
    return data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length), batched=True)


def split(rows: Dataset, recipe: RecipeArguments, seed: int) -> tuple[Mapping[str, Dataset], str]:
    """The clients, and the split in words."""
    match recipe.partition_method:
        case "dirichlet":
            clients = dirichlet_partition(rows, recipe.num_clients, recipe.alpha, "label", seed, recipe.min_examples)
            return clients, f"dirichlet(alpha={recipe.alpha}) over {recipe.target_column}"
        case "pathological":
            clients = pathological_partition(rows, recipe.num_clients, recipe.classes_per_client, "label", seed)
            return clients, f"pathological({recipe.classes_per_client} classes per client) over {recipe.target_column}"
        case _:
            return iid_partition(rows, recipe.num_clients, seed), "iid"


def make_model(recipe: RecipeArguments, classes: list[str], seed: int) -> PreTrainedModel:
    """The base model with a new head, the same for a seed."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        recipe.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    if recipe.method == "bitfit":  # Ben Zaken et al., 2022: every bias, and the head
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias") or name.startswith(("classifier.", "score."))
    return model


def make_peft_config(recipe: RecipeArguments) -> PeftConfig | None:
    """The adapter of the method; `None` where a plain model is trained."""
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "r": recipe.r}
    lora = {"lora_alpha": recipe.lora_alpha, "target_modules": recipe.target_modules}
    given: Mapping[str, Any] = recipe.peft_config if isinstance(recipe.peft_config, dict) else {}
    match recipe.method:
        case "federa":
            return built_config(FederaConfig, {**common, **lora, **given})
        case "lora":
            return built_config(LoraConfig, {**common, **lora, **given})
        case "scl":
            return built_config(SclConfig, {**common, **given})
        case "adapter":
            bottleneck = {"variant": "bottleneck", "activation": "gelu", "train_down_proj": "none"}
            return built_config(SclConfig, {**common, **bottleneck, **given})
        case _:
            return None


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the mean over the classes of the F1 score (of those that occur or are predicted)."""
    truth, logits = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    predicted = logits.argmax(-1)
    confusion = np.zeros((logits.shape[-1], logits.shape[-1]))
    np.add.at(confusion, (truth, predicted), 1)
    counted = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * confusion.diagonal()[counted > 0] / counted[counted > 0]
    return {"accuracy": float((truth == predicted).mean()), "macro_f1": float(f1.mean())}


def main() -> None:
    parser = TrlParser([RecipeArguments, FederatedTaskConfig])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config()

    data, classes = load_data(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    data = tokenise(data, tokenizer, recipe.max_length)
    args.label_column = "label"
    clients, args.partition = split(data["train"], recipe, args.seed)
    test = data["test"]
    if recipe.max_eval_samples is not None:
        test = test.shuffle(seed=args.seed).select(range(min(recipe.max_eval_samples, len(test))))

    trainer = FederatedTaskTrainer(
        model=make_model(recipe, classes, args.seed),
        args=args,
        train_dataset=clients,
        eval_dataset=test,
        processing_class=tokenizer,
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
