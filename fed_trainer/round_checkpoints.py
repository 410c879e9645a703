# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written after rounds, taken over on resuming."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .adapter_state import AdapterState
from .checkpoint import load_adapter, rotate_checkpoints, write_checkpoint
from .client_store import ClientStore
from .hub import publish
from .live_model import load_model
from .processes import wait_for_first
from .record import write_json
from .run_files import RunFilesMixin
from .server import Server


__all__ = ["CLIENTS_FOLDER", "TRAINER_STATE_NAME", "RoundCheckpointsMixin", "write_state"]

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
SERVER_STATE = "server_state.safetensors"
CLIENTS_FOLDER = "clients"


def write_state(state: TrainerState, path: Path) -> None:
    """As [`~transformers.TrainerState.save_to_json`], in strict JSON: a metric may be NaN, or no number at all."""
    write_json(path, dict(sorted(dataclasses.asdict(state).items())))


class RoundCheckpointsMixin(RunFilesMixin):
    """
    A checkpoint holds what [`RunFilesMixin`] writes and what the next round depends on beside it: the state of the server
    (`server_state.safetensors`), and what the clients keep (`clients/`, hard links).
    """

    server: Server
    _store: ClientStore
    _local_keys: set[str]

    def _save_round(self, round: int) -> None:
        write = functools.partial(
            self._write_checkpoint_files,
            weights=self._weights_to_save(),
            state=self._saved_state(),
            reference=self._reference_state(),
        )
        if self.is_world_process_zero():
            folder = write_checkpoint(self._folder, round, write)
            rotate_checkpoints(self._folder, self.args.save_total_limit)
            is_last = round == self.args.num_rounds or self.control.should_training_stop  # `_end` publishes the last
            if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and not is_last:
                self._publish_round(folder, round)
        wait_for_first()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _saved_state(self) -> AdapterState:
        """The state of the model, if it cannot be trained on from the file that is published."""
        if self._saved_file_is_state:
            return {}
        with self._base_changes.taken_out() if self._base_changes is not None else nullcontext():
            return self._live_adapter.saved()  # PEFT saves the base weights of embeddings and heads along

    def _reference_state(self) -> AdapterState:
        """The policy that a trainer compares with, if a resumed run needs it as it was at the start."""
        return {}

    def _load_reference(self, state: AdapterState) -> None:
        """Take over what `_reference_state` gave."""

    def _write_checkpoint_files(
        self, folder: Path, weights: dict[str, torch.Tensor] | None, state: AdapterState, reference: AdapterState
    ) -> None:
        self._save(str(folder), weights)
        write_state(self.state, folder / TRAINER_STATE_NAME)
        entries = {f"state.{key}": tensor for key, tensor in state.items()}
        entries |= {f"reference.{key}": tensor for key, tensor in reference.items()}
        entries |= {f"server.{key}": tensor for key, tensor in self.server.state_dict().items()}
        if self._base_changes is not None:
            entries |= {f"base.{key}": tensor for key, tensor in self._base_changes.state_dict().items()}
        if entries:
            save_file(entries, folder / SERVER_STATE)
        self._store.link_into(folder / CLIENTS_FOLDER)

    @property
    def _saved_file_is_state(self) -> bool:
        """Whether the model can be trained on from the file that is published."""
        return self._base_changes is None and self._live_adapter.saved_file_is_state

    def _publish_round(self, folder: Path, round: int) -> None:
        try:
            publish(folder, self.hub_model_id, f"Round {round}", self.args.hub_token, self.args.hub_revision)
        except Exception as error:  # the run, and what it has on disk, is worth more than one upload
            logger.warning(f"Round {round} could not be pushed to {self.hub_model_id}: {error}. The run goes on.")

    def _load(self, folder: Path) -> None:
        """
        Take over a checkpoint: model, server, what clients keep.

        Raises:
            ValueError: If it is not whole, as one that was fetched from the Hub, or does not fit.
        """
        parts: dict[str, AdapterState] = {"server": {}, "base": {}, "state": {}, "reference": {}}
        if (folder / SERVER_STATE).is_file():
            for entry, tensor in load_file(folder / SERVER_STATE).items():
                part, _, key = entry.partition(".")
                parts[part][key] = tensor
        if not self._saved_file_is_state:
            saved, source = parts["state"], f"{SERVER_STATE} in {str(folder)!r}"
        elif isinstance(self.model, PeftModel):
            saved, source = load_adapter(folder), f"The adapter in {str(folder)!r}"
        else:
            saved, source = load_model(folder, self.model), f"The model in {str(folder)!r}"
        if self._base_changes is not None:
            self._base_changes.reset()  # the adapter is relative to the untouched base
        self._live_adapter.load(saved, source)
        if self._base_changes is not None:
            self._base_changes.load_state_dict(parts["base"])
        self.server.load_state_dict(parts["server"])
        self._load_reference(parts["reference"])
        if self.is_world_process_zero():
            self._store.restore(folder / CLIENTS_FOLDER)
        wait_for_first()
