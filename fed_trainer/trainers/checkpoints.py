# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written after rounds, taken over on resuming."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from peft_scl.file_mode import follow_umask
from peft_scl.foreign_files import read_json, read_tensors

from ..client.live.model import load_model
from ..federation.visits import Visits
from ..output.checkpoint import ADAPTER_WEIGHTS, find_checkpoint, load_adapter, rotate_checkpoints, write_checkpoint
from ..output.client_files import CLIENTS_FOLDER
from ..output.digests import FEDERATION_STATE, SERVER_STATE, TRAINER_STATE_NAME, read_digests
from ..output.disk import DamagedFileError, reading
from ..output.record import RECORD_NAME, read_record, write_json
from ..output.saved_files import MODEL_WEIGHTS
from ..state.adapter_state import AdapterState
from ..state.processes import first_alone, told_by_first


__all__ = ["Checkpoint", "Checkpoints", "write_state"]

logger = logging.get_logger(__name__)


class Checkpoint(NamedTuple):
    """
    A checkpoint as it was read: `adapter` is empty if the state of the model is elsewhere, `parts` are those of the
    server's file, `visits` what the server remembers of the clients, `None` in checkpoints of earlier versions.
    """

    folder: Path
    record: dict[str, Any]
    state: TrainerState
    adapter: AdapterState
    parts: dict[str, AdapterState]
    visits: dict[str, Any] | None


def write_state(state: TrainerState, path: Path) -> None:
    """As [`~transformers.TrainerState.save_to_json`], in strict JSON: a metric may be NaN, or no number at all."""
    write_json(path, dict(sorted(dataclasses.asdict(state).items())))


class Checkpoints:
    """
    A checkpoint holds what [`RunFiles`] writes and what the next round depends on beside it: the state of the server
    (`server_state.safetensors`, `federation_state.json`), and what the clients keep (`clients/`, hard links).

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def save(self, round: int) -> None:
        """Write the checkpoint of a round, and publish it if rounds are published."""
        trainer = self._trainer
        write = functools.partial(
            self._write,
            weights=trainer._files.weights_to_save(),
            state=self._saved_state(),
            reference=trainer._reference_state(),
        )

        def write_and_publish() -> None:
            folder = write_checkpoint(trainer._files.folder, round, write)
            rotate_checkpoints(trainer._files.folder, trainer.args.save_total_limit)
            is_last = round == trainer.args.num_rounds or trainer.control.should_training_stop
            if trainer._files.publishes_rounds and not is_last:  # the end of the run publishes the last
                self._publish_round(folder, round)

        first_alone(write_and_publish)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def _saved_state(self) -> AdapterState:
        """The state of the model, if it cannot be trained on from the file that is published."""
        return {} if self._saved_file_is_state else self.live_state()

    def live_state(self) -> AdapterState:
        """The state of the live model, on the untouched base, in the form that its `load` takes."""
        trainer = self._trainer
        with trainer._base_changes.taken_out() if trainer._base_changes is not None else nullcontext():
            state: AdapterState = (
                trainer._live_adapter.saved()
            )  # PEFT saves base weights of embeddings and heads along
        return state

    def _write(
        self, folder: Path, weights: dict[str, torch.Tensor] | None, state: AdapterState, reference: AdapterState
    ) -> dict[str, str]:
        """
        Fill the folder of a checkpoint, and return the digests that are known already: those of what the clients keep.
        """
        trainer = self._trainer
        trainer._files.write(folder, weights)
        write_state(trainer.state, folder / TRAINER_STATE_NAME)
        entries = {f"state.{key}": tensor for key, tensor in state.items()}
        entries |= {f"reference.{key}": tensor for key, tensor in reference.items()}
        entries |= {f"server.{key}": tensor for key, tensor in trainer.federation.server.state_dict().items()}
        if trainer._base_changes is not None:
            entries |= {f"base.{key}": tensor for key, tensor in trainer._base_changes.state_dict().items()}
        if entries:
            save_file(entries, folder / SERVER_STATE)
            follow_umask(folder / SERVER_STATE)
        visits = trainer.federation.server.visits
        write_json(folder / FEDERATION_STATE, visits.state_dict())
        kept = trainer.client.store.link_into(folder / CLIENTS_FOLDER, visits.counted)
        return {f"{CLIENTS_FOLDER}/{name}": digest for name, digest in kept.items()}

    @property
    def _saved_file_is_state(self) -> bool:
        """Whether the model can be trained on from the file that is published."""
        return self._trainer._base_changes is None and self._trainer._live_adapter.saved_file_is_state

    def _publish_round(self, folder: Path, round: int) -> None:
        trainer = self._trainer
        try:
            trainer._files.publish(folder, f"Round {round}", trainer.args.hub_token, trainer.args.hub_revision)
        except Exception as error:  # the run, and what it has on disk, is worth more than one upload
            logger.warning(f"Round {round} could not be pushed to {trainer.hub_model_id}: {error}. The run goes on.")

    def find(self, resume_from_checkpoint: str | bool) -> Checkpoint:
        """The checkpoint to go on from. The first process looks for it, and puts damaged ones aside."""
        weights = ADAPTER_WEIGHTS if isinstance(self._trainer.model, PeftModel) else MODEL_WEIGHTS
        found: list[Checkpoint] = []

        def find() -> Path:
            folder, checkpoint = find_checkpoint(
                self._trainer._files.folder, resume_from_checkpoint, self._read, weights
            )
            found.append(checkpoint)
            return folder

        folder = told_by_first(find)
        return found[0] if found else self._read(folder)

    def _read(self, folder: Path) -> Checkpoint:
        """
        All of a checkpoint but what clients keep, and a whole model, which is read when it is taken over.

        Raises:
            DamagedFileError: If something of it cannot be read.
        """
        parts: dict[str, AdapterState] = {"server": {}, "base": {}, "state": {}, "reference": {}}
        with reading(RECORD_NAME):
            record = read_record(folder)
            if rounds := record.get("rounds"):  # if not, it is refused as the checkpoint of no federation
                int(rounds[-1]["round"]), record["start"]["eval"]
        with reading(TRAINER_STATE_NAME):
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            if rounds and state.global_step != rounds[-1]["round"]:
                raise DamagedFileError(
                    f"{TRAINER_STATE_NAME} is of round {state.global_step}, but {RECORD_NAME} of {rounds[-1]['round']}"
                )
        with reading(SERVER_STATE):
            if (folder / SERVER_STATE).is_file():
                for entry, tensor in read_tensors(folder / SERVER_STATE).items():
                    part, _, key = entry.partition(".")
                    parts[part][key] = tensor
        adapter: AdapterState = {}
        if self._saved_file_is_state and isinstance(self._trainer.model, PeftModel):
            with reading(ADAPTER_WEIGHTS):
                adapter = load_adapter(folder)
        visits = None
        with reading(FEDERATION_STATE):
            if (folder / FEDERATION_STATE).is_file():
                visits = read_json(folder / FEDERATION_STATE)
                Visits().load_state_dict(visits)
        return Checkpoint(folder, record, state, adapter, parts, visits)

    def load(self, checkpoint: Checkpoint) -> None:
        """
        Take over a checkpoint: model, server, what clients keep.

        Raises:
            ValueError: If it is not whole, as one that was fetched from the Hub, or does not fit.
        """
        trainer = self._trainer
        folder, parts = checkpoint.folder, checkpoint.parts
        server = trainer.federation.server
        if checkpoint.visits is None and server.objective.remembers_clients:
            raise ValueError(
                f"The checkpoint {str(folder)!r} is of an earlier version, in which the clients alone knew their "
                f"ranks (`local_objective={trainer.args.local_objective!r}`). Finish the run with that version, or "
                "start a new one with this checkpoint as `initial_adapter`."
            )
        if not self._saved_file_is_state:
            saved, source = parts["state"], f"{SERVER_STATE} in {str(folder)!r}"
        elif isinstance(trainer.model, PeftModel):
            saved, source = checkpoint.adapter, f"The adapter in {str(folder)!r}"
        else:
            saved, source = load_model(folder, trainer.model), f"The model in {str(folder)!r}"
        if trainer._base_changes is not None:
            trainer._base_changes.reset()  # the adapter is relative to the untouched base
        trainer._live_adapter.load(saved, source)
        if trainer._base_changes is not None:
            trainer._base_changes.load_state_dict(parts["base"])
        server.load_state_dict(parts["server"])
        visits = server.visits
        if checkpoint.visits is None:
            visits.load_rounds(checkpoint.record["rounds"])
        else:
            visits.load_state_dict(checkpoint.visits)
        trainer._load_reference(parts["reference"])
        trainer.client.store.forget()
        first_alone(functools.partial(self._restore_clients, folder))

    def _restore_clients(self, folder: Path) -> None:
        trainer = self._trainer
        rotate_checkpoints(trainer._files.folder, trainer.args.save_total_limit)  # a full disk needs the room
        of_clients = f"{CLIENTS_FOLDER}/"
        digests = read_digests(folder).items()
        kept = {name.removeprefix(of_clients): digest for name, digest in digests if name.startswith(of_clients)}
        trainer.client.store.restore(folder / CLIENTS_FOLDER, kept)
