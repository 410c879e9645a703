# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rounds of a federation, over any trainer."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

import peft_scl  # noqa: F401  (registers SCL: an adapter to start from may be one)
from peft_scl.foreign_files import check_adapter_files, read_peft_config

from ..client.live import live_state
from ..client.live.adapter import LiveAdapter
from ..client.live.base_changes import BaseChanges
from ..client.live.base_model import base_digest, keep_differentiable
from ..client.live.sparse_change import LiveSparseChange
from ..client.store import PRIVATE_FOLDER, ClientStore
from ..client.turn import ClientTurnMixin
from ..config import FederationArguments, given, round_lr_factors
from ..data.client_datasets import ClientDatasets
from ..data.digests import described_transforms
from ..data.held_out import check_held_out, is_by_client
from ..federation.broken_state import BrokenStateError, refuse_broken_loss, refuse_overflow
from ..federation.client_settings import parse_client_settings
from ..federation.movement import Movement
from ..federation.sampling import ClientSampler
from ..federation.server import Server, freeze_for_good
from ..federation.validation import TooFewClientsError
from ..methods.aggregation import SLoRA
from ..output.checkpoint import (
    has_nothing_to_resume,
    load_adapter,
    refuse_another_run,
    refuse_foreign_checkpoints,
    refuse_later_rounds,
    remove_leftovers,
)
from ..output.digests import TRAINER_STATE_NAME
from ..output.figures import held_out_metrics
from ..output.hub import discard_stages, fetch_adapter
from ..output.progress import RoundProgress
from ..output.record import RECORD_NAME, RecordFiles, read_header
from ..output.run_lock import owning
from ..output.same_run import check_same_data, check_same_run
from ..output.saved_files import fresh_folder, move_into_place
from ..output.settings import described_arguments
from ..output.timing import timed
from ..state.adapter_state import AdapterState, check_same_layout, state_bytes, state_digest
from ..state.processes import first_alone, rest_at_exit, told_by_first, wait_for_first
from .checkpoints import RoundCheckpointsMixin, write_state
from .first_look import telling_row
from .refusals.adapters import check_prompt_arguments, refuse_idle_adapter, refuse_unwrapped_adapter
from .refusals.callbacks import refuse_callback, refuse_callbacks, remove_last
from .refusals.data import check_clients
from .refusals.engines import check_deepspeed, check_fsdp
from .refusals.launch import check_launch
from .refusals.settings import (
    refuse_adapter_names,
    refuse_another_start,
    refuse_empty_held_out,
    refuse_kept_optimizers,
    refuse_one_evaluation,
    refuse_other_weights_in_evaluation,
    refuse_sparse_start,
    refuse_turns_that_differ,
    refuse_what_would_leak,
)
from .round_report import RoundReportMixin


__all__ = ["FederatedMixin"]

logger = logging.get_logger(__name__)


class FederatedMixin(ClientTurnMixin, RoundReportMixin, RoundCheckpointsMixin):
    """
    Federated rounds over any [`~transformers.Trainer`]: `class MyTrainer(FederatedMixin, SomeTrainer)`.

    `train()` runs the rounds; within one, each sampled client is trained by `SomeTrainer.train()` itself, on the one live
    model. See [`FederatedTrainer`] and [`FederatedTaskTrainer`] for the arguments.
    """

    _config_class: type[FederationArguments] = FederationArguments
    _base_change_bytes = 0
    _first_look: Dataset | None = None  # while the base trainer is made: the row that it is made with
    _sparse_stage_errors: dict[str, float]
    _takes_torch_datasets = True  # as held-out data
    _refuses_callbacks = False  # while `Trainer.__init__` adds a bar over steps

    def __init__(
        self,
        model: str | nn.Module | None,
        args: FederationArguments,
        train_dataset: Mapping[str, Dataset],
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"`args` should be a `{self._config_class.__name__}` but is a {type(args).__name__}. It takes every field of "
                f"`{self._config_class.__bases__[-1].__name__}`, plus `num_rounds` and the like."
            )
        refuse_callbacks(kwargs.get("callbacks"))
        self.args = args  # `Trainer.__init__` sets it again; the checks come first
        self._seen_side_metrics = set()
        check_launch(args)
        rest_at_exit()
        check_clients(train_dataset, args)
        check_held_out(eval_dataset, train_dataset, self._takes_torch_datasets)
        self._check_clients(train_dataset, eval_dataset, model, **kwargs)
        self._arguments = described_arguments({**kwargs, "transforms": described_transforms(train_dataset)}, ())
        self.sampler = ClientSampler(list(train_dataset), args.clients_per_round, args.seed)

        if isinstance(model, (PreTrainedModel, PeftModel)):
            refuse_unwrapped_adapter(model)
        adapter_folder = None
        if args.initial_adapter is not None:
            adapter_folder = self._fetch_initial_adapter(args.initial_adapter, model, peft_config)
            peft_config = read_peft_config(PeftConfig, adapter_folder)
            peft_config.inference_mode = False

        self._folder = Path(args.output_dir or "")
        is_sorted = isinstance(train_dataset, ClientDatasets)
        self._clients = train_dataset if is_sorted else dict(sorted(train_dataset.items()))
        self._first_look = telling_row(self._clients, getattr(args, "dataset_text_field", None))
        # held-out data by client is prepared when it is evaluated on, as there may be very many
        by_client = None
        if is_by_client(eval_dataset, self._clients):
            by_client, eval_dataset = eval_dataset, None
        super().__init__(
            **self._model_arguments(model, peft_config),
            args=args,
            train_dataset=self._first_look,
            eval_dataset=dict(eval_dataset) if isinstance(eval_dataset, Mapping) else eval_dataset,
            **kwargs,
        )
        if by_client is not None:
            self.eval_dataset = by_client
        # the bar over rounds replaces the bar over steps, and the printed dictionaries
        remove_last(self.callback_handler, (DEFAULT_PROGRESS_CALLBACK, PrinterCallback))
        refuse_callbacks(self.callback_handler.callbacks)  # of `report_to`, too
        self._refuses_callbacks = True

        self._prepared_clients: dict[str, Dataset] = {}
        self._num_tokens: dict[str, int] = {}
        self._prepared_held_out: dict[str, Dataset] = {}
        self._first_look = None
        self.train_dataset = self._first_prepared()
        refuse_unwrapped_adapter(self.model)  # of `from_pretrained` of an adapter
        if isinstance(self.model, PeftModel):
            refuse_adapter_names(self.model)
        self._live_adapter = live_state(self.model)
        self._check_model()
        if isinstance(self.model, PeftModel):
            check_prompt_arguments(self.model, args)
            keep_differentiable(self.model.get_base_model())
        refuse_what_would_leak(self.model, self._live_adapter)
        freeze_for_good(args, self.model, self._live_adapter)
        optimizer, schedule = kwargs.get("optimizers") or (None, None)
        self._take_optimizers(optimizer, schedule)
        self._base_digest = base_digest(self.model) if isinstance(self.model, PeftModel) else None
        published = {} if adapter_folder is None else self._start_from(adapter_folder)
        self._initial_digest = state_digest(published) if published else None
        self._global_state = self._shared_start(published)
        # nothing changes it in place; a whole model is too large to be held twice
        self._start_state = self._global_state if isinstance(self.model, PeftModel) else None
        self._has_left_start = False
        self._client_settings = parse_client_settings(
            given(args, "client_settings"), self._clients, self._global_state
        )
        self.server = Server(
            args,
            self.model,
            self._live_adapter,
            self._client_settings,
            len(self._clients),
            self.sampler.num_sampled,
            self._base_digest,
        )
        self._base_changes = None
        if self.server.method.adds_to_base:
            assert isinstance(self.model, PeftModel)  # others have no factor pairs
            self._base_changes = BaseChanges(self.model, self.server.pairs)
        self._sparse_stage_errors = {}
        self._store = ClientStore(self._folder / PRIVATE_FOLDER)
        self._local_keys = self.server.local_keys(self._global_state)
        self._check_settings(has_optimizer=optimizer is not None)
        self._record = self._new_record()
        self._record_files = RecordFiles(self._folder)

    def _check_settings(self, has_optimizer: bool) -> None:
        """Refuse what does not go together, now that all parts are there."""
        args = self.args
        refuse_empty_held_out(self.eval_dataset)
        refuse_kept_optimizers(args)
        refuse_other_weights_in_evaluation(args, self.model, self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if self.server.sparse_rounds and isinstance(self.model, PeftModel):
            refuse_sparse_start(args, self.model, self.server.pairs, has_optimizer)
        if self.has_personal_models and self.eval_dataset is not None and not self.evaluates_clients:
            refuse_one_evaluation(self.eval_dataset, self._local_keys)
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            refuse_turns_that_differ(args, self.server, self._global_state)
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            check_deepspeed(args, plugin, self.model, self._live_adapter, self.server, has_optimizer)
        if self.is_fsdp_enabled:
            check_fsdp(args, self.accelerator.state.fsdp_plugin, self.model, self._live_adapter, self.server)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Run the federation.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues from the last checkpoint in `output_dir` that is not damaged (a run that died before its
                first checkpoint starts again, and one that is not there yet starts), a path from that checkpoint.

        Returns:
            `TrainOutput`: the number of rounds, the mean training loss over rounds, and the totals of the run.

        Raises:
            FileExistsError: If `output_dir` holds a run that is not being resumed, or what the run would write over.
            FolderInUseError: If another run is writing into `output_dir`.
            ValueError: If the checkpoint belongs to another run, or a whole model, which this trainer has trained already,
                is to be trained from its start.
            NothingTrainedError: If no client has changed anything of what it trains, at a learning rate that is not
                zero.
            TooFewClientsError: If fewer than `min_clients` updates of a round can be used. The live model then holds the global
                adapter of the last finished round.
            BrokenStateError: If the model cannot compute with the new global state, which is then not saved. The live
                model holds that of the round before.
        """
        self._refuse_within_client_model("train")
        if trial is not None:
            raise NotImplementedError(
                "Hyperparameter search over a federation is not supported: start one run per trial."
            )
        refuse_callbacks(self.callback_handler.callbacks)
        if not isinstance(self._live_adapter, LiveSparseChange):  # in that stage the LoRA waits
            self._check_model()
        with owning(self._folder):
            return self._run(resume_from_checkpoint, ignore_keys_for_eval)

    def _run(self, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        first_alone(functools.partial(remove_leftovers, self._folder))
        if resume_from_checkpoint is True and self._starts_again():
            self._claim_folder(starts_again=True)
            resume_from_checkpoint = None
        elif not resume_from_checkpoint:
            self._claim_folder()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            self._ensure_engine()  # a checkpoint is loaded into its float32 masters
        done = self._resume(resume_from_checkpoint) if resume_from_checkpoint else self._start(ignore_keys_for_eval)
        lr_factors = round_lr_factors(self.args)  # `num_rounds` may have been raised since
        last = self.args.num_rounds

        with RoundProgress(last, done, self._shows_progress) as progress, self._keeping_the_global_adapter():
            for round in range(done + 1, last + 1):
                seconds: dict[str, float] = {}
                self._bytes_in_vain = Counter()
                clients: dict[str, dict[str, Any]] = {}
                if isinstance(self._live_adapter, LiveSparseChange) and round > self.server.sparse_rounds:
                    self._end_sparse_stage()
                self._ensure_engine()  # what fails here is no client's fault
                sampled = self.sampler.sample(round)
                self.server.begin(self._global_state, round, sampled)
                self._movement.begin()
                if self.is_world_process_zero():
                    self._store.discard()  # of a round that was broken off
                for client in sampled:
                    metrics = self._client_round(client, round, lr_factors[round - 1], seconds)
                    if metrics is None:
                        logger.warning(
                            f"Round {round} goes on without client {client!r}: {self.server.refused[client]}"
                        )
                        continue
                    clients[client] = metrics
                    progress.client(round, client, int(metrics["num_examples"]), metrics)
                self._movement.end(round)
                before = self._turn_back_to()
                with timed(seconds, "aggregate"), self._turning_back(before):
                    self._end_of_round()

                self.state.global_step = self.state.epoch = round
                evaluation = None
                if self._is_due(round, self.args.eval_rounds) and self.eval_dataset is not None:
                    with timed(seconds, "evaluate"), self._turning_back(before):
                        evaluation = self.evaluate(ignore_keys=ignore_keys_for_eval)
                        refuse_broken_loss(evaluation, self._earlier_evaluations)
                self._report(round, clients, lr_factors[round - 1], seconds, evaluation)
                is_saved = self._is_due(round, self.args.save_rounds) or self.control.should_training_stop
                if is_saved:
                    with timed(seconds, "checkpoint"):
                        self._save_round(round)
                    self.log({"seconds_checkpoint": seconds["checkpoint"]})  # known only now
                self._append_round(is_saved)
                progress.round(self._record["rounds"][-1]["train_loss"], held_out_metrics(self._record).get(round, {}))
                if self.control.should_training_stop:  # a callback
                    break
        return self._end()

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        As [`~transformers.Trainer.add_callback`].

        Raises:
            ValueError: For a callback that cannot work in a federation.
        """
        if self._refuses_callbacks:
            refuse_callback(callback)
        super().add_callback(callback)

    def save_client_model(self, client: str, output_dir: str | os.PathLike) -> None:
        """
        Save the model of one client: the global one, with the tensors that the client keeps.

        Args:
            client (`str`):
                Name of the client. One that has not trained yet has the global model.
            output_dir (`str`):
                Folder to write to, as `save_pretrained` does.

        Raises:
            ValueError: If there is no such client.
        """
        with self.client_model(client):
            weights = self._weights_to_save()
            if self.is_world_process_zero():
                with fresh_folder(Path(output_dir)) as beside:
                    self._save_weights(beside, weights)
                    move_into_place(beside, Path(output_dir))

    # The steps of a round

    def _end_of_round(self) -> None:
        self._global_state, base_change = self.server.finish()
        refuse_overflow(self._global_state, self._live_adapter.dtypes())
        self._has_left_start = True
        self._live_adapter.write(self._global_state)
        if self._base_changes is not None:
            self._base_changes.add(base_change)
        first_alone(self._store.commit)  # last: clients keep nothing of a round that has broken the model
        self._base_change_bytes = sum(state_bytes(change._asdict()) for change in base_change.values())

    def _turn_back_to(self) -> tuple[AdapterState, AdapterState]:
        """The global state, and what is in the base weights; neither is copied, as nothing changes them in place."""
        return self._global_state, {} if self._base_changes is None else self._base_changes.state_dict()

    @contextmanager
    def _turning_back(self, before: tuple[AdapterState, AdapterState]) -> Iterator[None]:
        """After a state that the model cannot compute with, the live model holds that of the round before."""
        try:
            yield
        except BrokenStateError:
            self._global_state, base = before
            if self._base_changes is not None:
                self._base_changes.load_state_dict(base)
            raise

    @property
    def _earlier_evaluations(self) -> list[dict[str, float] | None]:
        return [self._record["start"]["eval"], *(entry["eval"] for entry in self._record["rounds"])]

    def _begin_sparse_stage(self) -> None:
        """SLoRA begins with a sparse change of the base weights."""
        rule = self.server.rule
        assert isinstance(rule, SLoRA) and isinstance(self.model, PeftModel)
        self._live_adapter = LiveSparseChange(self.model, self.server.pairs, rule.density, self.args.seed)
        self._global_state = self._live_adapter.read()
        self._drop_engine()

    def _abandon_sparse_stage(self) -> None:
        """Leave the first stage that a run of this trainer broke off in, without a start for the LoRA."""
        if isinstance(self._live_adapter, LiveSparseChange):
            self._live_adapter.abandon()
            self._train_the_lora()

    def _end_sparse_stage(self) -> None:
        """SLoRA goes on with a LoRA that starts from what the first stage has learnt."""
        assert isinstance(self._live_adapter, LiveSparseChange)
        self._sparse_stage_errors = self._live_adapter.finish()
        self._train_the_lora()
        self.server.forget()

    def _train_the_lora(self) -> None:
        """The sparse change has left the model: from now on its LoRA is what is trained."""
        assert isinstance(self.model, PeftModel)
        self._live_adapter = LiveAdapter(self.model)
        self._global_state = self._live_adapter.read()
        self._drop_engine()

    def _check_clients(self, clients: Mapping[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        """Refuse data that the base trainer cannot use; `kwargs` are the base trainer's."""

    def _check_model(self) -> None:
        """Refuse a model of which training would not reach what is trained."""
        refuse_idle_adapter(self.model)

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        """What the base trainer is given of model and adapter. TRL's trainers load and wrap, [`Trainer`] does neither."""
        if not isinstance(model, nn.Module if peft_config is not None else (PreTrainedModel, PeftModel)):
            raise TypeError(
                f"`model` should be a `PreTrainedModel` or a `PeftModel` but is a {type(model).__name__}. Load it first, for "
                "instance with `AutoModelForSequenceClassification.from_pretrained(...)`."
            )
        if peft_config is None:
            return {"model": model}
        if isinstance(model, PeftModel):
            raise ValueError("`model` is a `PeftModel` already, but a `peft_config` was given too. Give one of them.")
        set_seed(self.args.seed)  # adapters start at random
        # a copy: for a classifier PEFT adds the head to `modules_to_save` of the config, each time it gets it
        return {"model": get_peft_model(model, copy.deepcopy(peft_config))}

    # Beginning and end

    def _starts_again(self) -> bool:
        """Whether the run to be resumed has nothing to go on from."""
        starts_again = told_by_first(functools.partial(has_nothing_to_resume, self._folder))
        if starts_again and self.is_world_process_zero():
            died = (self._folder / RECORD_NAME).is_file()
            why = (
                "died before its first checkpoint: it starts again" if died else "has not been started yet: it starts"
            )
            logger.warning(f"The run in {str(self._folder)!r} {why}.")
        return starts_again

    def _claim_folder(self, starts_again: bool = False) -> None:
        """
        Refuse a folder with another run or what this one would write over; then nothing of earlier runs is left in it.
        """

        def claim() -> None:
            refuse_another_run(self._folder, starts_again)
            self._store.clear()

        self._store.forget()
        first_alone(claim)

    def _start(self, ignore_keys_for_eval: list[str] | None) -> int:
        self._abandon_sparse_stage()
        self._go_back_to_start()
        if self._initial_lrs is None:  # from then on the live model holds what a local round or an evaluation has left
            refuse_another_start(self._live_adapter, self._global_state)
        self.server.forget()
        if self._base_changes is not None:
            self._base_changes.reset()
        self._record = self._new_record()
        self._total_train_tokens = 0
        self._movement = Movement()
        self._published_round = 0
        if self.server.sparse_rounds:
            self._begin_sparse_stage()
        self._begin_record()  # from now on there is something to resume
        self._begin(TrainerState())
        if self.args.eval_on_start and self.eval_dataset is not None:
            self._record["start"]["eval"] = self._recorded_evaluation(self.evaluate(ignore_keys=ignore_keys_for_eval))
        self._write_record(self._folder)
        return 0

    def _go_back_to_start(self) -> None:
        """After rounds of which nothing was saved, or was deleted, a run begins where the first one of this trainer did."""
        if not self._has_left_start:
            return
        if self._start_state is None:
            raise ValueError(
                "This trainer has trained its model already, and of a whole model the start is not kept: the run would "
                "begin with what was learnt before. Load the model anew and make a new trainer."
            )
        self._global_state = self._start_state
        self._live_adapter.write(self._global_state)
        self._has_left_start = False

    def _resume(self, resume_from_checkpoint: str | bool) -> int:
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        folder, record = checkpoint.folder, checkpoint.record
        self._abandon_sparse_stage()
        fresh = self._new_record()
        check_same_run(record, fresh, folder)
        check_same_data(record, self._clients, self.eval_dataset, self.evaluates_clients, folder)
        done = record["rounds"][-1]["round"]
        refuse_later_rounds(self._folder, done)
        refuse_foreign_checkpoints(self._folder, range(done + 1, self.args.num_rounds + 1))
        self._sparse_stage_errors = {}  # of a run that was stopped in its first stage
        if done <= self.server.sparse_rounds:
            state = self._live_adapter.read(include_frozen=True)  # of a later stage, if this trainer has got there
            self._live_adapter.write({pair.key_B: torch.zeros_like(state[pair.key_B]) for pair in self.server.pairs})
            self._begin_sparse_stage()
        self._load(checkpoint)
        self._has_left_start = True
        self._global_state = self._live_adapter.read()
        self._go_on_recording(record, fresh)
        self._begin_record()
        self._movement = Movement(has_begun=True)
        self._published_round = done if self._publishes_rounds else 0
        self._begin(checkpoint.state)
        return done

    def _begin(self, state: TrainerState) -> None:
        if self.is_world_process_zero():
            discard_stages(self._folder)
        self._warn_of_single_clients()
        self.state = state
        self.state.max_steps = self.args.num_rounds
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _end(self) -> TrainOutput:
        rounds = self._record["rounds"]
        if isinstance(self._live_adapter, LiveSparseChange):  # stopped by a callback
            self._end_sparse_stage()
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            write_state(self.state, self._folder / TRAINER_STATE_NAME)
        if self._shows_progress:
            # at module level `python -m fed_trainer.output.report` would import itself twice
            from ..output.report import failures, partial_means, round_table

            print(round_table(self._record))
            for lines in (failures(self._record), partial_means(self._record)):
                if lines:
                    print(lines)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message=f"Round {len(rounds)}, end of training")
        wait_for_first()  # when any process goes on, all is written
        train_loss = sum(entry["train_loss"] for entry in rounds) / len(rounds)
        metrics = {
            "train_loss": train_loss,
            "bytes_up": sum(entry["bytes_up"] for entry in rounds),
            "bytes_down": sum(entry["bytes_down"] for entry in rounds),
            "train_runtime": sum(sum(entry["seconds"].values()) for entry in rounds),
        }
        return TrainOutput(len(rounds), train_loss, metrics)

    @contextmanager
    def _keeping_the_global_adapter(self) -> Iterator[None]:
        """After a local round has failed or was interrupted, the live model holds the last global adapter."""
        is_alone = False
        try:
            yield
        except BaseException as error:
            # of several processes the others may wait elsewhere, and under DeepSpeed they have to write together
            is_alone = self.accelerator.num_processes > 1 and not isinstance(error, TooFewClientsError)
            raise
        finally:
            if not is_alone:
                self._live_adapter.write(self._global_state)
                self._live_adapter.train_only(None)

    # Small things

    @property
    def _shows_progress(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    def _is_due(self, round: int, every: int) -> bool:
        return round % every == 0 or round == self.args.num_rounds

    def _shared_start(self, published: AdapterState) -> AdapterState:
        """
        The adapter of the first process, in all of them: they may have drawn other random numbers before they made theirs. What is
        `published` is the same everywhere, and has been written.
        """
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            whole = self._live_adapter.read(include_frozen=True)
            self._live_adapter.write({key: broadcast(tensor.to(device)).cpu() for key, tensor in whole.items()})
        state = self._live_adapter.read()
        makes_masters = self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"
        if self.is_deepspeed_enabled or makes_masters:
            # as the masters, which are made later, whatever the dtype of the model: TRL makes it bfloat16 for ZeRO-3 with `bf16`
            state = {key: published.get(key, tensor) for key, tensor in state.items()}
            state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        return state

    def _fetch_initial_adapter(self, source: str, model: Any, peft_config: PeftConfig | None) -> Path:
        """The folder of `initial_adapter`, whose files have been looked at."""
        if peft_config is not None or isinstance(model, PeftModel):
            raise ValueError(
                f"`initial_adapter` is {source!r}, which brings its own PEFT config, but a "
                f"{'`peft_config`' if peft_config is not None else '`PeftModel`'} was given too. Give one of them."
            )
        folder = fetch_adapter(source, self.args.initial_adapter_revision, self.args.hub_token)
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"`initial_adapter` takes adapters only, but {source!r} has no {CONFIG_NAME}. To start from a "
                f"whole model, load it with `from_pretrained({source!r})` and pass it as `model`."
            )
        check_adapter_files(folder)
        return folder

    def _start_from(self, folder: Path) -> AdapterState:
        source = f"The adapter {self.args.initial_adapter!r}"
        state = self._live_adapter.from_saved(load_adapter(folder, self._live_adapter.saved_shapes()), source)
        check_same_layout(state, self._live_adapter.read(include_frozen=True), source)
        record = read_header(folder)
        theirs, ours = record.get("base_digest"), self._base_digest
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(
                f"{source} was trained on another base model ({record['base_model']!r}) than "
                f"{get_config_model_id(self.model.config)!r}: the shapes agree, the weights do not. Load that base model, or "
                "start without `initial_adapter`."
            )
        self._live_adapter.write(state)
        return state
