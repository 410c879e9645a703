# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run puts into a folder and onto the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, Trainer
from trl.trainer.utils import get_config_model_id

from peft_scl.file_mode import follow_umask

from .adapter_state import AdapterState, LiveState
from .base_changes import BaseChanges
from .clients import ClientSampler
from .config import FederationArguments
from .hub import model_card, publish
from .record import (
    RECORD_NAME,
    client_sizes,
    peft_fields,
    peft_type_name,
    write_json,
)
from .settings import described_arguments, federation_settings, local_settings


__all__ = ["RunFilesMixin"]

WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")  # as PEFT and transformers name them


class RunFilesMixin(Trainer):
    """Saving, model card, record and publishing of a federation; files are safetensors, JSON and Markdown only."""

    args: FederationArguments
    model: PeftModel | PreTrainedModel
    sampler: ClientSampler
    hub_model_id: Any  # `None` until the repository exists
    _folder: Path
    _clients: Mapping[str, Dataset]
    _live_adapter: LiveState
    _global_state: AdapterState
    _local_keys: set[str]
    _owner: str | None
    _base_digest: str | None  # of the base of an adapter; a plain model has none beside what is trained and saved
    _base_changes: BaseChanges | None
    _record: dict[str, Any]
    _arguments: dict[str, Any]  # what the trainer was given, described
    _initial_digest: str | None  # of `initial_adapter`

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]. All processes have to call it; the first one writes."""
        self._refuse_within_client_model("save")
        self._save(output_dir, self._weights_to_save())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _refuse_within_client_model(self, use: str) -> None:
        if self._owner is not None:
            raise ValueError(
                f"The live model is that of client {self._owner!r}, which is not the federation's to {use}. Leave `client_model` first; "
                "`save_client_model(client, folder)` saves the model of a client."
            )

    def _weights_to_save(self) -> dict[str, torch.Tensor] | None:
        """What `_save_weights` needs: the whole adapter for a LoRA that holds base changes, or the state dict of a model."""
        if self._base_changes is not None:
            return self._live_adapter.read(include_frozen=True)
        # of DeepSpeed and FSDP2, the model holds parts or rounded copies
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self._live_adapter.model_state_dict(self.model) if is_sharded else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `Trainer._save`, without the pickled `training_args.bin` and with the record and the model card."""
        folder = Path(output_dir) if output_dir is not None else self._folder
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(folder, state_dict)
        if self.processing_class is not None:
            # the chat template goes into the JSON: only safetensors, JSON and Markdown are published
            self.processing_class.save_pretrained(str(folder), save_jinja_files=False)
        self._write_record(folder)
        self._card().save(folder / "README.md")

    def _save_weights(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        if self._base_changes is not None:
            assert weights is not None
            self._base_changes.to_lora(weights).save_pretrained(folder)
            return
        # of several adapters, such as the reference of DPO, only the one that is trained
        only: dict[str, Any] = (
            {"selected_adapters": self.model.active_adapters} if isinstance(self.model, PeftModel) else {}
        )
        with self._live_adapter.publishable():
            self.model.save_pretrained(str(folder), state_dict=weights, **only)
        for path in folder.glob("*.safetensors"):
            if WEIGHTS.fullmatch(path.name):
                follow_umask(path)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of the federation to `output_dir`; the arguments are those of TRL's trainers."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            self._card(model_name, dataset_name, tags).save(self._folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Publish the global adapter: safetensors, JSON and Markdown only.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload. If not, a future is returned.
            token (`str`, *optional*):
                Hub token; `args.hub_token` if not given.
            revision (`str`, *optional*):
                Branch to commit to; `args.hub_revision` if not given.
            private (`bool`, *optional*):
                Whether a new repository is private; `args.hub_private_repo` if not given.
            kwargs (`dict[str, Any]`, *optional*):
                Passed to [`~FederatedMixin.create_model_card`].
        """
        self._refuse_within_client_model("publish")
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        revision = revision if revision is not None else self.args.hub_revision
        return publish(self._folder, self.hub_model_id, commit_message, token, revision, blocking)

    def _card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None
    ) -> ModelCard:
        base = get_config_model_id(self.model.config)
        peft_config = self._peft_config
        record = self._record
        if self._base_changes is not None:  # what is published is a LoRA, whatever was trained
            record = {**record, "peft_type": peft_type_name(LoraConfig())}
        return model_card(
            record,
            peft_config.task_type if peft_config is not None else None,
            self.hub_model_id,
            base if base and not os.path.isdir(base) else None,
            model_name,
            dataset_name,
            tags,
            model_class=type(
                self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            ).__name__,
            num_labels=getattr(self.model.config, "num_labels", None),
        )

    def _write_record(self, folder: Path) -> None:
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECORD_NAME, self._record)

    def _new_record(self) -> dict[str, Any]:
        column, base = self.args.label_column, get_config_model_id(self.model.config)
        peft_config = self._peft_config
        return {
            "format": 1,
            # of a local folder only the name
            "base_model": os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base,
            "base_digest": self._base_digest,
            "initial_digest": self._initial_digest,
            "peft_type": peft_type_name(peft_config) if peft_config is not None else None,
            "num_trainable_parameters": sum(tensor.numel() for tensor in self._global_state.values()),
            "num_local_parameters": sum(self._global_state[key].numel() for key in self._local_keys),
            "aggregation": self.args.aggregation,
            "federation": federation_settings(self.args),
            "peft_config": peft_fields(peft_config) if peft_config is not None else {},
            "settings": local_settings(self.args),
            "arguments": self._arguments | described_arguments({}, self.callback_handler.callbacks),
            "seed": self.args.seed,
            "num_rounds": self.args.num_rounds,
            "num_sampled": self.sampler.num_sampled,
            "partition": self.args.partition,
            "label_column": column,
            "clients": client_sizes(self._clients, column),
            "side_metrics": [],
            "start": {"eval": None},
            "rounds": [],
        }

    @property
    def _peft_config(self) -> PeftConfig | None:
        """That of the adapter; `None` for a plain model."""
        return self.model.peft_config[self.model.active_adapters[0]] if isinstance(self.model, PeftModel) else None
