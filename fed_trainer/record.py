# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run writes down about itself: `federation.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType
from transformers import TrainingArguments

from peft_scl.foreign_files import read_json

from .client_datasets import column_by_client, rows_by_client
from .config import FederationArguments
from .disk import replace_durably, writing


__all__ = [
    "RECORD_NAME",
    "check_same_run",
    "client_sizes",
    "federation_settings",
    "held_out_metrics",
    "local_settings",
    "peft_fields",
    "peft_type_name",
    "read_record",
    "write_json",
]


RECORD_NAME = "federation.json"

# What `Trainer.evaluate` measures of itself rather than of the model.
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "compilation_time", "preparation_time")
# what TRL's trainers log beside the loss; a count of tokens is no figure of quality, and the others follow the loss
_TRL_EXTRAS = (
    "entropy", "mean_token_accuracy", "num_tokens", "/chosen", "/rejected", "min_reward", "mean_reward", "max_reward",
)  # fmt: skip

_LOCAL_SETTINGS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "round_lr_scheduler_type", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "use_liger_kernel", "label_names",
    "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "bf16", "fp16", "tf32",
    # of `SFTConfig`
    "loss_type", "completion_only_loss", "assistant_only_loss", "router_aux_loss_coef", "max_length", "truncation_mode",
    "packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "shuffle_dataset", "eos_token", "dataset_kwargs",
    # of `FederatedDPOConfig` and `FederatedRewardConfig`
    "reference", "beta", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
    "use_weighting", "discopop_tau", "disable_dropout", "center_rewards_coefficient", "chat_template_path",
)  # fmt: skip


_FEDERATION_SETTINGS = (
    "aggregation_kwargs", "tensor_roles", "client_settings", "min_clients", "server_optimizer", "server_lr",
    "server_optimizer_kwargs", "local_objective", "local_objective_kwargs", "keep_optimizer_state",
)  # fmt: skip


def client_sizes(clients: Mapping[str, Dataset], label_column: str | None) -> dict[str, dict[str, Any]]:
    """
    By client: `num_examples`, and `composition`, how often each value of `label_column` occurs (values as strings, sorted), or `None`
    if there is no such column.
    """
    sizes: dict[str, dict[str, Any]] = {
        client: {"num_examples": num_rows, "composition": None} for client, num_rows in rows_by_client(clients).items()
    }
    if label_column is not None:
        for client, values in column_by_client(clients, label_column):
            sizes[client]["composition"] = dict(sorted(Counter(map(str, values)).items()))
    return sizes


def peft_type_name(peft_config: PeftConfig) -> str:
    """The name of the PEFT method, as in `"LORA"`."""
    return PeftType(peft_config.peft_type).value


def peft_fields(peft_config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config as JSON keeps them, without where it was used."""
    skipped = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    fields = {key: value for key, value in peft_config.to_dict().items() if key not in skipped}
    return json.loads(
        json.dumps(fields, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def local_settings(args: TrainingArguments) -> dict[str, Any]:
    """What decides about the result of a local round, apart from data, model and adapter: those of the fields `args` has."""
    return {
        name: json.loads(json.dumps(getattr(args, name), default=str))
        for name in _LOCAL_SETTINGS
        if hasattr(args, name)
    }


def federation_settings(args: FederationArguments) -> dict[str, Any]:
    """What decides about the result of a round, apart from the local rounds."""
    return {name: json.loads(json.dumps(getattr(args, name))) for name in _FEDERATION_SETTINGS}


def held_out_metrics(record: dict[str, Any]) -> dict[int, dict[str, float]]:
    """
    What the evaluations measured by round, 0 before training, of the rounds that were evaluated: the losses first, then the
    figures of `compute_metrics`, without the speed of the evaluation and what TRL logs along (it is in the record).
    """
    evaluations = {0: record["start"]["eval"]}
    evaluations.update({entry["round"]: entry["eval"] for entry in record["rounds"]})
    return {
        number: {
            key: metrics[key]
            for key in sorted(metrics, key=lambda key: not key.endswith("loss"))
            if key.startswith("eval_")
            and not key.endswith((*_SPEED, *_TRL_EXTRAS))
            and isinstance(metrics[key], (int, float))
        }
        for number, metrics in evaluations.items()
        if metrics is not None
    }


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The record in `folder`; empty if there is none.

    Raises:
        ValueError: If it is no JSON, or holds no dictionary.
    """
    path = Path(folder) / RECORD_NAME
    return read_json(path) if path.is_file() else {}


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write beside and rename, so that a reader, or a crash, never sees half a file; on the disk when it returns."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path.name):
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        replace_durably(beside, path)


def check_same_run(record: dict[str, Any], ours: dict[str, Any], folder: str | os.PathLike) -> None:
    """
    Refuse a checkpoint of a run with other settings.

    Args:
        record (`dict`):
            The record in the checkpoint.
        ours (`dict`):
            The record of the run that is to go on.
        folder (`str`):
            The checkpoint, for the message.

    Raises:
        ValueError: Naming what differs.
    """
    if not record.get("rounds"):
        raise ValueError(
            f"{str(folder)!r} has no {RECORD_NAME} with a finished round, so it is not a checkpoint of a federation. Pass "
            "a `checkpoint-<round>` folder, or use it as `initial_adapter`."
        )
    there, here = _comparable(record), _comparable(ours)
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(here[key])} here" for key in differing)
        raise ValueError(
            f"The checkpoint {str(folder)!r} belongs to another run ({shown}). Resume with the settings it was started "
            "with, or choose another `output_dir`."
        )


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What has to agree for a run to be continued, one level deep, so that a difference can be named."""
    keys = ("base_digest", "peft_type", "num_trainable_parameters", "aggregation", "seed", "num_sampled", "clients")
    parts = ("peft_config", "settings", "federation")
    # a run of before there was a setting has its default
    settings = {
        field.name: field.default for field in fields(FederationArguments) if field.name in _FEDERATION_SETTINGS
    }
    settings |= {name: value for part in parts for name, value in record.get(part, {}).items()}
    settings.pop("min_clients")  # a run that ended for want of clients may go on with fewer
    return {key: record.get(key) for key in keys} | settings


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
