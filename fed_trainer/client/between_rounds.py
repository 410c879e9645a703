# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation and prediction between rounds, after which training goes on as if there had been none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..state.client_errors import ClientError
from .engine import LocalRoundMixin
from .put_back import remember_flags, remember_frequencies, remember_modes, remember_weights, restoring


__all__ = ["BetweenRoundsMixin"]


class BetweenRoundsMixin(LocalRoundMixin):
    """
    Evaluates with the engine of the local rounds, and leaves model and trainer as they are. `Trainer` evaluates within
    one training, or after it: it leaves the model in evaluation mode, cast for `bf16_full_eval`, and keeps data
    loaders under the name of their set.
    """

    _is_between_rounds: bool = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]; model and trainer stay as they are."""
        with self._leaving_all_as_it_is(is_logged=True):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As [`~transformers.Trainer.predict`]; model and trainer stay as they are."""
        with self._leaving_all_as_it_is():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`], with the engine of the local rounds."""
        # `Trainer` would prepare the model for evaluation alone, and then not wrap it any more: each process of DDP
        # would train for itself. For DeepSpeed it would build an engine without an optimiser.
        self._ensure_engine()
        with self._leaving_all_as_it_is(), self._leaving_the_model():
            try:
                return super().evaluation_loop(dataloader, *args, **kwargs)
            finally:
                self._forget_loader(dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As [`~transformers.Trainer.get_eval_dataloader`], always of the data that is asked for."""
        # with persistent workers `Trainer` returns the loader of the last set of this name, which is "eval" for all
        # that have none
        self._eval_dataloaders: dict[str, DataLoader] = {}
        return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _leaving_all_as_it_is(self, is_logged: bool = False) -> Iterator[None]:
        if self.is_in_train:
            raise ClientError(
                "It was to evaluate or predict in the middle of a local round, on a model that is half trained, and its figures would "
                "enter those of the client. Do it between rounds, as in `on_evaluate` or `on_log`."
            )
        # from one door to the next, such as from set to set: what is logged depends on the mode
        if self._is_between_rounds:
            yield
            return
        assert self.model is not None
        gather = self.gather_function  # `Trainer` takes another from its second evaluation on
        loaders = self.accelerator.gradient_state.dataloader_references  # one that is broken off would stay there
        # what is not logged, the next evaluation would be reported with
        figures = restoring(self._remember_figures(), only_after_failure=is_logged)
        self._is_between_rounds = True
        try:
            with figures, restoring(remember_modes(self.model), remember_flags()):
                yield
        finally:
            self.gather_function, self._is_between_rounds = gather, False
            self.accelerator.gradient_state.dataloader_references = loaders

    def _leaving_the_model(self) -> AbstractContextManager[None]:
        """
        Within, `Trainer` may cast the model, and its data stretch it: it is given its own weights and frequencies
        back.
        """
        assert self.model is not None
        is_cast = self.args.fp16_full_eval or self.args.bf16_full_eval
        weights = [remember_weights(self.model)] if is_cast else []
        return restoring(remember_frequencies(self.model), *weights)

    def _forget_loader(self, dataloader: DataLoader) -> None:
        """Nothing holds on to the data loader, so that workers which persist end with it."""
        self.accelerator._dataloaders = [
            loader for loader in self.accelerator._dataloaders if loader is not dataloader
        ]
        self._eval_dataloaders = {}
        if self.args.dataloader_persistent_workers:
            self.callback_handler.eval_dataloader = None
