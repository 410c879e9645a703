# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a run begins, in a folder of its own or from a checkpoint, and how it ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..federation.rounds import Round
from ..federation.validation import TooFewClientsError
from ..output.checkpoint import (
    has_nothing_to_resume,
    refuse_another_run,
    refuse_foreign_checkpoints,
    refuse_later_rounds,
    remove_leftovers,
)
from ..output.digests import TRAINER_STATE_NAME
from ..output.hub import discard_stages
from ..output.progress import RoundProgress
from ..output.record import RECORD_NAME
from ..output.same_run import check_same_data, check_same_run
from ..state.processes import first_alone, told_by_first, wait_for_first
from .checkpoints import Checkpoints, write_state
from .refusals.settings import refuse_another_start


__all__ = ["Run"]

logger = logging.get_logger(__name__)


class Run:
    """
    A run of a trainer, from its beginning to its end; the rounds between are [`Federation`]'s.

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
        checkpoints ([`Checkpoints`]):
            Those of its runs.
    """

    def __init__(self, trainer: Any, checkpoints: Checkpoints) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints

    def run(self, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """As `FederatedMixin.train`, whose arguments these are, in a folder that is this run's alone."""
        trainer = self._trainer
        first_alone(functools.partial(remove_leftovers, trainer._files.folder))
        if resume_from_checkpoint is True and self._starts_again():
            self._claim_folder(starts_again=True)
            resume_from_checkpoint = None
        elif not resume_from_checkpoint:
            self._claim_folder()
        if trainer._engine.holds_weights:
            trainer._ensure_engine()  # a checkpoint is loaded into its float32 masters
        trainer._host.ignored_in_evaluation = ignore_keys_for_eval
        done = self._resume(resume_from_checkpoint) if resume_from_checkpoint else self._start()
        with RoundProgress(trainer.args.num_rounds, done, self._shows_progress) as progress:
            trainer._host.progress = progress
            with self._keeping_the_global_adapter():
                trainer.federation.run()
        return self._end()

    def _starts_again(self) -> bool:
        """Whether the run to be resumed has nothing to go on from."""
        trainer = self._trainer
        starts_again = told_by_first(functools.partial(has_nothing_to_resume, trainer._files.folder))
        if starts_again and trainer.is_world_process_zero():
            died = (trainer._files.folder / RECORD_NAME).is_file()
            why = (
                "died before its first checkpoint: it starts again" if died else "has not been started yet: it starts"
            )
            logger.warning(f"The run in {str(trainer._files.folder)!r} {why}.")
        return starts_again

    def _claim_folder(self, starts_again: bool = False) -> None:
        """
        Refuse a folder with another run or what this one would write over; then nothing of earlier runs is left in it.
        """
        trainer = self._trainer

        def claim() -> None:
            refuse_another_run(trainer._files.folder, starts_again)
            trainer.client.store.clear()

        trainer.client.store.forget()
        first_alone(claim)

    def _start(self) -> int:
        trainer = self._trainer
        self._abandon_sparse_stage()
        trainer._go_back_to_start()
        trainer._before_first_round()
        state = trainer.federation.state
        # from then on the live model holds what a local round or an evaluation has left
        if trainer._initial_lrs is None:
            refuse_another_start(trainer._live_adapter, state)
        if trainer._base_changes is not None:
            trainer._base_changes.reset()
        trainer._run_record.start()
        trainer._total_train_tokens = 0
        trainer._files.published_round = 0
        trainer.federation.restart(state)
        trainer.client.begin(state)
        if trainer._stage.rounds:
            trainer._train_from_now_on(trainer._stage.begin())
        trainer._run_record.begin_files()  # from now on there is something to resume
        self._begin(TrainerState())
        trainer._meet_clients()
        if trainer.args.eval_on_start and (evaluation := self._evaluate_start()) is not None:
            trainer.record["start"]["eval"] = trainer._run_record.evaluation(evaluation)
        trainer._run_record.write(trainer._files.folder)
        return 0

    def _evaluate_start(self) -> Mapping[str, Any] | None:
        trainer = self._trainer
        if trainer.eval_dataset is None:
            evaluation: Mapping[str, Any] | None = trainer.federation.evaluate_at_clients(Round(0, 1.0))
        else:
            evaluation = trainer.evaluate(ignore_keys=trainer._host.ignored_in_evaluation)
        return evaluation

    def _abandon_sparse_stage(self) -> None:
        """Leave the first stage that a run of this trainer broke off in."""
        trainer = self._trainer
        if trainer._stage.is_on:
            trainer._train_from_now_on(trainer._stage.abandon())

    def _resume(self, resume_from_checkpoint: str | bool) -> int:
        trainer = self._trainer
        checkpoint = self._checkpoints.find(resume_from_checkpoint)
        folder, record = checkpoint.folder, checkpoint.record
        self._abandon_sparse_stage()
        fresh = trainer._run_record.fresh()
        check_same_run(record, fresh, folder)
        clients = trainer._clients if trainer._has_all_clients else {}
        check_same_data(record, clients, trainer.eval_dataset, trainer.evaluates_clients, folder)
        done = checkpoint.state.global_step
        refuse_later_rounds(trainer._files.folder, done)
        refuse_foreign_checkpoints(trainer._files.folder, range(done + 1, trainer.args.num_rounds + 1))
        trainer._stage.errors = {}  # of a run that was stopped in its first stage
        if done <= trainer._stage.rounds:
            trainer._train_from_now_on(trainer._stage.begin_again(trainer._live_adapter))
        self._checkpoints.load(checkpoint)
        trainer._has_left_start = True
        state = trainer._live_adapter.read()
        trainer.federation.go_on(state, done)
        trainer.client.begin(state, done)
        trainer._run_record.go_on(record, fresh)
        trainer._run_record.begin_files()
        trainer._files.published_round = done if trainer._files.publishes_rounds else 0
        self._begin(checkpoint.state)
        trainer._meet_clients()
        return done

    def _begin(self, state: TrainerState) -> None:
        trainer = self._trainer
        if trainer.is_world_process_zero():
            discard_stages(trainer._files.folder)
        trainer._files.warn_of_single_clients()
        trainer.state = state
        trainer.state.max_steps = trainer.args.num_rounds
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.control = trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    def _end(self) -> TrainOutput:
        trainer = self._trainer
        rounds = trainer.record["rounds"]
        if trainer._stage.is_on:  # stopped by a callback
            trainer._end_sparse_stage()
        trainer.save_model(_internal_call=True)
        if trainer.is_world_process_zero():
            write_state(trainer.state, trainer._files.folder / TRAINER_STATE_NAME)
        if self._shows_progress:
            # at module level `python -m fed_trainer.output.report` would import itself twice
            from ..output.report import failures, partial_means, round_table

            print(round_table(trainer.record))
            for lines in (failures(trainer.record), partial_means(trainer.record)):
                if lines:
                    print(lines)
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        if trainer.args.push_to_hub:
            trainer.push_to_hub(commit_message=f"Round {len(rounds)}, end of training")
        wait_for_first()  # when any process goes on, all is written
        losses = [entry["train_loss"] for entry in rounds if entry["train_loss"] is not None]
        train_loss = sum(losses) / len(losses) if losses else math.nan
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
        trainer = self._trainer
        is_alone = False
        try:
            yield
        except BaseException as error:
            # of several processes the others may wait elsewhere, and under DeepSpeed they have to write together
            is_alone = trainer._engine.num_processes > 1 and not isinstance(error, TooFewClientsError)
            raise
        finally:
            if not is_alone:
                trainer._live_adapter.write(trainer.federation.state)
                trainer._live_adapter.train_only(None)

    @property
    def _shows_progress(self) -> bool:
        return self._trainer.is_world_process_zero() and not self._trainer.args.disable_tqdm
