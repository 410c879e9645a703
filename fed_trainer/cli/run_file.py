# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`RUN.yaml`: all that a federation is, apart from data and policies."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

from peft_scl.foreign_files import short_repr

from ..config import (
    FederatedConfig,
    FederatedDPOConfig,
    FederatedRewardConfig,
    FederatedTaskConfig,
    FederationArguments,
)
from ..trainers.dpo import FederatedDPOTrainer
from ..trainers.mixin import FederatedMixin
from ..trainers.reward import FederatedRewardTrainer
from ..trainers.sft import FederatedTrainer
from ..trainers.task import FederatedTaskTrainer
from .data import DataFields


__all__ = ["TRAINERS", "Part", "RunFile", "config_of", "names_in", "peft_config_of", "read_yaml"]


@dataclass(frozen=True)
class Part:
    """A trainer with its config, and the task of its adapters."""

    trainer: type[FederatedMixin]
    config: type[FederationArguments]
    task_type: str


TRAINERS: dict[str, Part] = {
    "sft": Part(FederatedTrainer, FederatedConfig, "CAUSAL_LM"),
    "dpo": Part(FederatedDPOTrainer, FederatedDPOConfig, "CAUSAL_LM"),
    "reward": Part(FederatedRewardTrainer, FederatedRewardConfig, "SEQ_CLS"),
    "task": Part(FederatedTaskTrainer, FederatedTaskConfig, "SEQ_CLS"),
}


@dataclass
class RunFile:
    """
    A run, as its coordinator describes it in a YAML file. Every field of the trainer's config stands beside these.

    Args:
        model_name_or_path (`str`):
            Base model, a Hub id or a folder. Its dtype and the like go into `model_init_kwargs`.
        clients (`int` or `list[str]`):
            The names of the clients, or how many there are.
        trainer (`str`, *optional*, defaults to `"sft"`):
            `"sft"`, `"dpo"`, `"reward"` or `"task"` (sequence classification).
        peft_config (`dict`, *optional*):
            Fields of any PEFT config, with `peft_type`: `{peft_type: SCL, r: 16}`. Without it and without
            `initial_adapter` the whole model is trained.
        num_labels (`int`, *optional*):
            Of a classifier.
        eval_dataset (`str` or `list[str]`, *optional*):
            Held-out rows of the coordinator: files, or a dataset id. Without them the clients evaluate on theirs.
        prompt_template, completion_column, text_column (`str`, *optional*):
            See [`DataFields`].
        wait, round_timeout (`float`, *optional*, defaults to `3600.0`):
            See [`FederatedMixin.serve`].
        config (`dict[str, Any]`):
            The fields of the trainer's config.
    """

    model_name_or_path: str
    clients: int | list[str]
    trainer: str = "sft"
    peft_config: dict[str, Any] | None = None
    num_labels: int | None = None
    eval_dataset: list[str] | None = None
    prompt_template: str | None = None
    completion_column: str | None = None
    text_column: str | None = None
    wait: float = 3600.0
    round_timeout: float = 3600.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunFile:
        """
        The run in a YAML file.

        Raises:
            ValueError: Naming the file and the field.
        """
        try:
            return cls.of(read_yaml(path))
        except ValueError as error:
            raise ValueError(f"The run {os.fspath(path)!r} cannot be used: {error}") from error

    @classmethod
    def of(cls, content: Any) -> RunFile:
        """
        The run in a dictionary.

        Raises:
            ValueError: Naming the field.
        """
        if not isinstance(content, dict):
            raise ValueError("it should have fields with values, as in `num_rounds: 10`.")
        trainer = content.get("trainer", "sft")
        if not isinstance(trainer, str) or trainer not in TRAINERS:
            raise ValueError(f"`trainer` should be one of {sorted(TRAINERS)} but the value is {trainer!r}.")
        own = {field.name for field in dataclasses.fields(cls)} - {"config"}
        of_config = {field.name for field in dataclasses.fields(TRAINERS[trainer].config) if field.init}
        unknown = sorted(str(name) for name in content if name not in own | of_config)
        if unknown:
            raise ValueError(
                f"it has the field `{unknown[0]}`, which neither a run nor `{TRAINERS[trainer].config.__name__}` has. "
                "Look for a misspelling."
            )
        missing = sorted({"model_name_or_path", "clients"} - content.keys())
        if missing:
            raise ValueError(f"it lacks the field `{missing[0]}`.")
        fields = {name: value for name, value in content.items() if name in own}
        if isinstance(fields.get("eval_dataset"), str):
            fields["eval_dataset"] = [fields["eval_dataset"]]
        run = cls(**fields, config={name: value for name, value in content.items() if name not in own})
        run.check()
        return run

    def check(self) -> None:
        """
        Raises:
            ValueError: For a field of the wrong type.
        """
        clients = self.clients
        are_names = isinstance(clients, list) and bool(clients) and all(isinstance(name, str) for name in clients)
        if not are_names and not (type(clients) is int and clients >= 1):
            raise ValueError(f"`clients` should be a list of names, or a number, but the value is {clients!r}.")
        if not isinstance(self.model_name_or_path, str):
            shown = short_repr(self.model_name_or_path)
            raise ValueError(f"`model_name_or_path` should be an id or a folder but the value is {shown}.")
        held_out = self.eval_dataset
        if held_out is not None and not (
            isinstance(held_out, list) and all(isinstance(each, str) for each in held_out)
        ):
            raise ValueError(f"`eval_dataset` should be files, or an id, but the value is {short_repr(held_out)}.")
        if self.peft_config is not None and not isinstance(self.peft_config, dict):
            raise ValueError(f"`peft_config` should have fields but the value is {short_repr(self.peft_config)}.")
        if self.trainer == "task" and (type(self.num_labels) is not int or self.text_column is None):
            raise ValueError("a classifier (`trainer: task`) needs `num_labels` and `text_column`.")
        _ = self.data_fields

    @property
    def data_fields(self) -> DataFields:
        """How rows become examples."""
        return DataFields(self.prompt_template, self.completion_column, self.text_column)

    @property
    def part(self) -> Part:
        """The trainer."""
        return TRAINERS[self.trainer]


def read_yaml(path: str | os.PathLike) -> Any:
    """
    What a YAML file holds.

    Raises:
        ValueError: In words that follow the name of the file.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())}).") from error


def config_of(part: Part, fields: Mapping[str, Any]) -> FederationArguments:
    """
    The config of a trainer.

    Raises:
        ValueError: For a value that it does not take.
    """
    try:
        return part.config(**fields)
    except TypeError as error:  # of a value of another type, deep in a comparison
        raise ValueError(f"`{part.config.__name__}` does not take these settings ({error}).") from error


def peft_config_of(fields: Mapping[str, Any] | None, task_type: str | None) -> PeftConfig | None:
    """
    A PEFT config of a dictionary with `peft_type`.

    Raises:
        ValueError: Naming the type or the field.
    """
    if fields is None:
        return None
    kind = fields.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(str(getattr(each, "value", each)) for each in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise ValueError(f"`peft_config` has the `peft_type` {kind!r}, but it should be one of {known}.")
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = [field.name for field in dataclasses.fields(config)]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ValueError(f"`peft_config` has {unknown}, which `{config.__name__}` does not take. It takes {names}.")
    try:
        built: PeftConfig = config(**{"task_type": task_type, **fields})
    except TypeError as error:  # of a value of another type, deep in a comparison
        raise ValueError(f"`{config.__name__}` does not take this `peft_config` ({error}).") from error
    return built


def names_in(values: Sequence[str]) -> dict[str, Any]:
    """
    `name=value` pairs of a command line, with values as in YAML.

    Raises:
        ValueError: For one without `=`.
    """
    pairs = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not sign:
            raise ValueError(f"{value!r} should be `name=value`.")
        try:
            pairs[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{value!r} has a value that is no YAML ({' '.join(str(error).split())}).") from error
    return pairs
