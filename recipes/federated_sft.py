# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Federated supervised fine-tuning of any causal language model on any Hub id or local folder.

    python recipes/federated_sft.py --config recipes/configs/dolly_scl.yaml
    accelerate launch recipes/federated_sft.py --config recipes/configs/dolly_scl.yaml --num_rounds 30 --seed 1

Every field of `FederatedConfig` (hence of TRL's `SFTConfig`) and of `RecipeArguments` below can stand in the YAML
and be overridden on the command line. `--resume_from_checkpoint True` continues a run that died.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.utils.import_utils import is_matplotlib_available
from trl import TrlParser

import peft_scl  # noqa: F401  (registers the PEFT type SCL)
from fed_trainer import (
    FederatedConfig,
    FederatedTrainer,
    dirichlet_partition,
    iid_partition,
    natural_partition,
    partition_summary,
    pathological_partition,
    quantity_skew_partition,
)
from fed_trainer.config import FederationArguments, json_mapping
from fed_trainer.output.report import write_report


@dataclass
class RecipeArguments:
    """
    Model, data, split and adapter of a federated fine-tuning run.

    Args:
        model_name_or_path (`str`):
            Base model, a Hub id or a folder. Its dtype and the like go into `model_init_kwargs`.
        dataset_name (`str`):
            Data, a Hub id or a folder with Parquet, JSON or CSV files.
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split that is spread over the clients.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split. If the dataset has none, `test_size` of the training split is held out.
        test_size (`float`, *optional*, defaults to `0.05`):
            Fraction to hold out, drawn with `seed`.
        max_eval_samples (`int`, *optional*):
            Evaluate on the first so many held-out rows only; of each client with `evaluate_clients`.
        evaluate_clients (`bool`, *optional*, defaults to `False`):
            Evaluate the model of every client on the held-out rows that have its value of `partition_column`;
            `eval_loss` is the mean weighted by rows. Needs `partition_method="natural"`, and is needed where
            clients keep tensors to themselves.
        prompt_template (`str`, *optional*):
            Prompt made of the columns of a row, as in `"Question: {question}\nAnswer: "`. Needs `completion_column`.
            Rows with an empty completion are dropped. Without it the rows are used as they are.
        completion_column (`str`, *optional*):
            Column with the text to learn.
        partition_method (`str`, *optional*, defaults to `"natural"`):
            How the training split becomes clients: `"natural"`, `"dirichlet"`, `"pathological"`, `"iid"` or
            `"quantity_skew"`, see `fed_trainer.data.partition`.
        partition_column (`str`, *optional*):
            Column that `"natural"`, `"dirichlet"` and `"pathological"` split by.
        num_clients (`int`, *optional*, defaults to `10`):
            Number of clients, except for `"natural"`.
        alpha (`float`, *optional*, defaults to `0.5`):
            Concentration of `"dirichlet"` and `"quantity_skew"`: the smaller, the more uneven.
        classes_per_client (`int`, *optional*, defaults to `2`):
            For `"pathological"`.
        min_examples (`int`, *optional*, defaults to `32`):
            Least number of examples per client for `"dirichlet"` and `"quantity_skew"`.
        peft_config (`dict`, *optional*):
            Fields of any PEFT config, with `peft_type`: `{peft_type: SCL, r: 16}`. Without it
            (`--peft_config null`) and without `initial_adapter`, the whole model is fine-tuned.
    """

    model_name_or_path: str = field(metadata={"help": "Base model, a Hub id or a folder."})
    dataset_name: str = field(metadata={"help": "Data, a Hub id or a folder with Parquet, JSON or CSV files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that is spread over the clients."})
    dataset_test_split: str = field(default="test", metadata={"help": "Held-out split, if the dataset has one."})
    test_size: float = field(default=0.05, metadata={"help": "Fraction held out of the training split otherwise."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many held-out rows only."})
    evaluate_clients: bool = field(
        default=False, metadata={"help": "Evaluate every client's model on the held-out rows of that client."}
    )
    prompt_template: str | None = field(default=None, metadata={"help": "Prompt made of the columns of a row."})
    completion_column: str | None = field(default=None, metadata={"help": "Column with the text to learn."})
    partition_method: str = field(
        default="natural",
        metadata={
            "help": "How the training split becomes clients.",
            "choices": ["natural", "dirichlet", "pathological", "iid", "quantity_skew"],
        },
    )
    partition_column: str | None = field(default=None, metadata={"help": "Column to split by."})
    num_clients: int = field(default=10, metadata={"help": "Number of clients, except for natural."})
    alpha: float = field(default=0.5, metadata={"help": "Concentration of dirichlet and quantity_skew."})
    classes_per_client: int = field(default=2, metadata={"help": "Classes per client for pathological."})
    min_examples: int = field(default=32, metadata={"help": "Least number of examples per client."})
    peft_config: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of any PEFT config with `peft_type`, a mapping or JSON; without: all of the model."},
    )

    def __post_init__(self) -> None:
        self.peft_config = json_mapping("peft_config", self.peft_config)
        if (self.prompt_template is None) != (self.completion_column is None):
            raise ValueError(
                f"`prompt_template` is {self.prompt_template!r} and `completion_column` is "
                f"{self.completion_column!r}: give both to make prompts and completions from columns, or neither "
                "to use the rows as they are."
            )
        if self.partition_method in ("natural", "dirichlet", "pathological") and self.partition_column is None:
            raise ValueError(
                f"`partition_method={self.partition_method!r}` splits by a column, but `partition_column` is not "
                "given."
            )
        if self.evaluate_clients and self.partition_method != "natural":
            raise ValueError(
                "`evaluate_clients` takes a client's held-out rows by `partition_column`, but "
                f"`partition_method={self.partition_method!r}` does not give every client a value of its own. Use "
                "'natural', or leave `evaluate_clients` out."
            )


def load_data(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the held-out rows."""
    data = load_dataset(recipe.dataset_name, recipe.dataset_config)
    if not isinstance(data, DatasetDict) or recipe.dataset_train_split not in data:
        raise ValueError(f"{recipe.dataset_name!r} has no split {recipe.dataset_train_split!r}: it has {list(data)}.")
    train = data[recipe.dataset_train_split]
    if recipe.dataset_test_split in data:
        return train, data[recipe.dataset_test_split]
    parts = train.train_test_split(test_size=recipe.test_size, seed=seed)
    return parts["train"], parts["test"]


def to_prompt_completion(rows: Dataset, recipe: RecipeArguments, label_column: str | None) -> Dataset:
    """Rows with `prompt` and `completion`, and the column to split by."""
    if recipe.prompt_template is None or recipe.completion_column is None:
        return rows
    template, completion = recipe.prompt_template, recipe.completion_column
    rows = rows.filter(lambda row: bool(row[completion] and row[completion].strip()))
    if len(rows) == 0:
        raise ValueError(f"No row of {recipe.dataset_name!r} has anything in its column {completion!r} to be learnt.")
    try:
        template.format(**rows[0])
    except KeyError as error:
        raise ValueError(
            f"`prompt_template` names the column {error}, but the columns of {recipe.dataset_name!r} are "
            f"{rows.column_names}."
        ) from None
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"`prompt_template` is {template!r}, which cannot be filled in ({error}). Name columns in braces, as in "
            "'{question}', and write other braces twice."
        ) from None

    def to_pair(row: dict[str, str]) -> dict[str, str]:
        prompt = template.format(**row)
        # Tokenizers attach white space to the word behind it, so it goes to the completion: the prompt stays a prefix.
        space = prompt[len(prompt.rstrip()) :]
        return {"prompt": prompt.rstrip(), "completion": space + row[completion]}

    kept = {recipe.partition_column, label_column}
    return rows.map(to_pair, remove_columns=[name for name in rows.column_names if name not in kept])


def split(rows: Dataset, recipe: RecipeArguments, seed: int) -> tuple[Mapping[str, Dataset], str]:
    """The clients, and the split in words."""
    column = recipe.partition_column or ""
    match recipe.partition_method:
        case "natural":
            return natural_partition(rows, column), f"natural, by {column}"
        case "dirichlet":
            clients = dirichlet_partition(rows, recipe.num_clients, recipe.alpha, column, seed, recipe.min_examples)
            return clients, f"dirichlet(alpha={recipe.alpha}) over {column}"
        case "pathological":
            clients = pathological_partition(rows, recipe.num_clients, recipe.classes_per_client, column, seed)
            return clients, f"pathological({recipe.classes_per_client} classes per client) over {column}"
        case "quantity_skew":
            clients = quantity_skew_partition(rows, recipe.num_clients, recipe.alpha, seed, recipe.min_examples)
            return clients, f"quantity_skew(alpha={recipe.alpha})"
        case _:
            return iid_partition(rows, recipe.num_clients, seed), "iid"


def held_out(rows: Dataset, recipe: RecipeArguments, clients: Iterable[str]) -> Dataset | dict[str, Dataset]:
    """The rows to evaluate on, by client if every client's model is evaluated."""

    def first(rows: Dataset) -> Dataset:
        return rows if recipe.max_eval_samples is None else rows.select(range(min(recipe.max_eval_samples, len(rows))))

    if not recipe.evaluate_clients:
        return first(rows)
    parts = natural_partition(rows, recipe.partition_column or "")
    own = {client: first(parts[client]) for client in clients if client in parts}
    if not own:
        raise ValueError(
            f"`evaluate_clients` needs held-out rows of the clients, but those have the values {list(parts)} of "
            f"{recipe.partition_column!r}, and none of the clients has. Hold out rows of the same "
            f"{recipe.partition_column!r}."
        )
    return own


def check_columns(rows: Dataset, recipe: RecipeArguments, **columns: str | None) -> None:
    """
    Refuse fields that name a column which the data does not have, while it still has its own.

    Raises:
        ValueError: Naming the field and the columns that there are.
    """
    for name, column in columns.items():
        if column is not None and column not in rows.column_names:
            raise ValueError(
                f"`{name}` is {column!r}, but the columns of {recipe.dataset_name!r} are {rows.column_names}."
            )


def make_peft_config(recipe: RecipeArguments) -> PeftConfig | None:
    """The PEFT config named in the recipe; `None` leaves it to `initial_adapter`, or trains the whole model."""
    if not isinstance(recipe.peft_config, dict):
        return None
    kind = recipe.peft_config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"`peft_config` has the `peft_type` {kind!r}, but it should be one of "
            f"{sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)}."
        )
    return built_config(PEFT_TYPE_TO_CONFIG_MAPPING[kind], {"task_type": "CAUSAL_LM", **recipe.peft_config})


def built_config(kind: type[PeftConfig], values: Mapping[str, Any]) -> PeftConfig:
    """
    A PEFT config with the values of a `peft_config` field.

    Raises:
        ValueError: If `kind` does not have one of the fields; the message has those that it has.
    """
    names = [own.name for own in fields(kind)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"`peft_config` has {unknown}, which `{kind.__name__}` does not take. It takes {names}.")
    return kind(**values)


def prepare(
    recipe: RecipeArguments, args: FederationArguments, train: Dataset, test: Dataset
) -> tuple[Mapping[str, Dataset], Dataset | dict[str, Dataset]]:
    """The clients and the rows to evaluate on; `args` is told of the split."""
    args.label_column = args.label_column or recipe.partition_column
    own = {"completion_column": recipe.completion_column}
    split_by = {"partition_column": recipe.partition_column}
    check_columns(train, recipe, **own, **split_by, label_column=args.label_column)
    check_columns(test, recipe, **own, **(split_by if recipe.evaluate_clients else {}))
    clients, args.partition = split(to_prompt_completion(train, recipe, args.label_column), recipe, args.seed)
    return clients, held_out(to_prompt_completion(test, recipe, args.label_column), recipe, clients)


def main() -> None:
    parser = TrlParser([RecipeArguments, FederatedConfig])  # type: ignore[list-item]
    recipe, args = parser.parse_args_and_config()

    clients, test = prepare(recipe, args, *load_data(recipe, args.seed))
    trainer = FederatedTrainer(
        model=recipe.model_name_or_path,
        args=args,
        train_dataset=clients,
        eval_dataset=test,
        peft_config=make_peft_config(recipe),
    )
    if trainer.is_world_process_zero():
        print(partition_summary(clients, recipe.partition_column))
        print(f"trainable parameters: {trainer.get_num_trainable_parameters():,}")
    trainer.train(resume_from_checkpoint=resume(args.resume_from_checkpoint))
    if trainer.is_world_process_zero() and is_matplotlib_available():
        for path in write_report(args.output_dir):
            print(f"wrote {path}")
    trainer.accelerator.end_training()


def resume(value: str | None) -> str | bool | None:
    """What `train` takes; the command line gives a string."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


if __name__ == "__main__":
    main()
