# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A trainer as the place where a federation runs: its model takes the global state, and it writes down what happens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..federation.broken_state import refuse_broken_loss, refuse_overflow
from ..federation.rounds import Round
from ..output.figures import held_out_metrics
from ..output.progress import RoundProgress
from ..output.timing import timed
from ..state.adapter_state import AdapterState
from ..state.low_rank import LowRank
from ..state.processes import first_alone


__all__ = ["TrainerHost"]


class TrainerHost:
    """
    A [`~fed_trainer.federation.rounds.Host`] of a federation whose clients are in the process of the trainer.

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
    """

    progress: RoundProgress
    """The bar over rounds, within a run."""
    ignored_in_evaluation: list[str] | None = None
    """`ignore_keys_for_eval` of the run."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._base_before: AdapterState = {}

    def before_round(self, round: int) -> None:
        trainer = self._trainer
        if trainer._stage.is_on and round > trainer._stage.rounds:
            trainer._end_sparse_stage()
        trainer._ensure_engine()

    def after_client(self, round: Round, client: str) -> None:
        figures = round.clients[client]
        if self._trainer._serving is not None:
            self._trainer._serving.watch.counted(client, figures)
        self.progress.client(round.number, client, figures["num_examples"], figures)

    def install(self, state: AdapterState, base_change: dict[str, LowRank]) -> None:
        trainer, base = self._trainer, self._trainer._base_changes
        trainer._before_new_state(trainer.federation.state)
        self._base_before = {} if base is None else base.state_dict()  # not copied: nothing changes it in place
        refuse_overflow(state, trainer._live_adapter.dtypes())
        trainer._has_left_start = True
        trainer._live_adapter.write(state)
        if base is not None:
            base.add(base_change)

    def base_sum(self) -> AdapterState:
        base = self._trainer._base_changes
        return {} if base is None else base.state_dict()

    def is_evaluated_at_clients(self, round: int) -> bool:
        trainer = self._trainer
        is_due = trainer.args.eval_on_start if round == 0 else self._is_due(round, trainer.args.eval_rounds)
        return is_due and trainer.eval_dataset is None and bool(trainer.federation.transport.evaluators)

    def enter_evaluation(
        self, figures: dict[str, dict[str, Any]], num_examples: dict[str, int | None]
    ) -> Mapping[str, Any] | None:
        return self._trainer.enter_evaluation(figures, num_examples)

    def settle(self, counted: Mapping[str, int | None]) -> None:
        first_alone(functools.partial(self._trainer.client.store.settle, counted))

    def uninstall(self) -> None:
        if self._trainer._base_changes is not None:
            self._trainer._base_changes.load_state_dict(self._base_before)

    def evaluate(self, round: Round) -> Mapping[str, Any] | None:
        trainer, args = self._trainer, self._trainer.args
        trainer.state.global_step = trainer.state.epoch = round.number
        if not self._is_due(round.number, args.eval_rounds) or trainer.eval_dataset is None:
            return None
        with timed(round.seconds, "evaluate"):
            evaluation: dict[str, float] = trainer.evaluate(ignore_keys=self.ignored_in_evaluation)
            refuse_broken_loss(evaluation, trainer._run_record.evaluations)
        return evaluation

    def finish_round(self, round: Round, evaluation: Mapping[str, Any] | None) -> bool:
        trainer = self._trainer
        if trainer._serving is not None:  # clients may have joined in this round
            trainer.record["clients"] |= trainer._serving.sizes()
        trainer._run_record.add(round, evaluation)
        is_saved = self._is_due(round.number, trainer.args.save_rounds) or trainer.control.should_training_stop
        if is_saved:
            with timed(round.seconds, "checkpoint"):
                trainer._checkpoints.save(round.number)
                trainer.federation.server.visits.save()
            trainer.log({"seconds_checkpoint": round.seconds["checkpoint"]})  # known only now
        trainer._run_record.append(is_saved)
        if trainer._serving is not None:
            for client in round.refused:
                trainer._serving.watch.refused(client)
            trainer._serving.watch.end_round()
        entry = trainer.record["rounds"][-1]
        self.progress.round(entry["train_loss"], held_out_metrics(trainer.record).get(round.number, {}))
        return not trainer.control.should_training_stop  # a callback's

    def _is_due(self, round: int, every: int) -> bool:
        return round % every == 0 or round == self._trainer.args.num_rounds
