# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One live model and engine for the whole federation: load a state, train, read the state."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerControl, TrainingArguments, set_seed
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerState
from transformers.trainer_utils import align_special_tokens

from ..state.adapter_state import AdapterState
from ..state.client_errors import ClientError
from .agreement import AgreementMixin
from .engines import Engine
from .live.state import LiveState
from .local_figures import LocalFiguresMixin
from .put_back import PutBack, remember_flags, remember_frequencies, remember_hooks, restoring
from .tasks import Task, Trained
from .user_optimizer import UserSchedule, check_optimizer


__all__ = ["ClientTimeoutError", "EngineMixin"]


class EngineMixin(AgreementMixin, LocalFiguresMixin):
    """
    Adds `local_rounds` to a [`~transformers.Trainer`]: its own `train()`, run for clients, on the one model it holds.

    The first local round builds the engine as `Trainer` does (wrapped model, optimiser). Later rounds keep it: the
    adapter is overwritten in place, the optimiser goes back to its initial state and a new schedule starts, which
    equals building a new trainer and costs a small part of it. What differs between one process, DDP, DeepSpeed and
    FSDP2 is asked of an [`Engine`]; of several processes all have to call `local_rounds`, with the same tasks.
    """

    optimizer: AcceleratedOptimizer
    _live_adapter: LiveState
    _engine: Engine
    _initial_lrs: list[float] | None = None  # by parameter group, once there is an engine
    _initial_scaler_state: dict[str, Any] | None = None
    _task: Task | None = None  # within a local round
    _user_schedule: UserSchedule | None = None
    _has_rate: bool = False  # whether a step of the last local round had a learning rate that is not zero
    _is_switched_on: bool = False  # what `train()` switches on for good
    _has_liger_kernels: bool = False

    def _take_optimizers(self, optimizer: Any, schedule: Any) -> None:
        """
        What was given as `optimizers`.

        Raises:
            ValueError: If the optimiser does not hold what is trained, or the schedule cannot start afresh at each
                client.
        """
        if optimizer is not None:
            self._check_optimizer(optimizer)
        if schedule is not None:
            self._user_schedule = UserSchedule(schedule, optimizer, self.args.max_steps)

    def _check_optimizer(self, optimizer: Any) -> None:
        model: Any = self.model
        check_optimizer(optimizer, self._live_adapter.parameters(), model)

    def local_rounds(self, tasks: Sequence[Task]) -> list[Trained]:
        """
        Train clients for their local budgets, each from its own start: one after the other, in order, so that a list
        is as good as one call per client. It is the only place that calls `Trainer.train()`.

        Args:
            tasks (`Sequence[Task]`):
                What is trained.

        Returns:
            `list[Trained]`: What has come out of each.

        Raises:
            ClientError: If nothing was learnt: no step, no label, or a loss that is not finite.
            ClientTimeoutError: If it takes longer than `timeout`.
            OtherProcessFailedError: If a batch or a forward pass has failed in another process.
            UnkeptOptimizerError: If what the optimiser remembers was asked for, and it cannot be kept.
        """
        return [self._local_round(task) for task in tasks]

    def _local_round(self, task: Task) -> Trained:
        start = time.perf_counter()
        self._ensure_engine()  # first, as what it makes of `bf16` takes a state that the model would round
        self._live_adapter.write(task.state)
        set_seed(task.seed)
        self.accelerator.dataloader_config.data_seed = task.data_seed
        self.train_dataset = task.dataset
        self._task, self._has_rate = task, False
        model: Any = self.model
        timeout = task.timeout
        is_late = None if timeout is None else lambda: self._any_stops(time.perf_counter() > start + timeout)
        try:
            with (
                self._own_state(task.max_steps, is_late),
                self._breaking_off(),
                restoring(remember_frequencies(model)),
                self._measuring() as measured,
                self._agreeing_in_forward(),
            ):
                output = super().train()
        finally:
            self._task = None  # with the data and the start of the client
        self._is_switched_on = True
        if self._switches_weights():
            self.optimizer.eval()
        metrics = self._figures(output, measured) | {"seconds": time.perf_counter() - start}
        return Trained(self._live_adapter.read(), metrics, self._kept_optimizer() if task.keeps_optimizer else None)

    def _kept_optimizer(self) -> AdapterState:
        return self._engine.read_optimizer(self.optimizer, self._live_adapter.parameters())

    @contextmanager
    def _own_state(self, max_steps: int | None, is_late: Callable[[], bool] | None) -> Iterator[None]:
        """
        Within, `train()` is that of a client. It starts a TrainerState of its own and reports every event, so the
        federation's state and its reports are put aside: callbacks see the steps of a local round, but no
        `on_train_begin`, `on_log` or `on_save` per client.
        """
        federation = self.state, self.control, self.callback_handler
        self.control = TrainerControl()
        self.callback_handler = _LocalCallbackHandler(self.callback_handler, is_late)
        own: dict[str, Any] = {"use_liger_kernel": False}  # the engine has done it
        if max_steps is not None:
            own["max_steps"] = max_steps
        if self._is_switched_on:  # every time it is asked to, `train()` adds hooks
            own |= {"activation_checkpointing": False, "debug": []}
        given = {name: getattr(self.args, name) for name in own}
        try:
            for name, value in own.items():
                setattr(self.args, name, value)
            yield
        finally:
            for name, value in given.items():
                setattr(self.args, name, value)
            self.state, self.control, self.callback_handler = federation
            self.is_in_train = False
            self._free_local_round()  # the data loader, with its workers

    @contextmanager
    def _breaking_off(self) -> Iterator[None]:
        """
        After what breaks off within, wherever it does, model, optimiser and process are as the next local round has to
        find them.
        """
        assert self.model is not None
        with restoring(
            remember_flags(),
            remember_hooks(self.model),
            self._put_engine_in_order,
            only_after_failure=True,
        ):
            yield

    def _remember_figures(self) -> PutBack:
        """What the trainer counts over local rounds and measures; a turn that breaks off is not to be counted."""
        flos = self.current_flos

        def put_back() -> None:
            self.current_flos = flos
            # with `skip_memory_metrics=False` a thread measures from the beginning of a training or an evaluation to
            # its end
            self._memory_tracker.peak_monitoring, self._memory_tracker.cur_stage = False, None

        return put_back

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        # after the last backward of an optimiser step, when the gradients are complete and not yet clipped
        self._has_rate |= any(group["lr"] is None or bool(group["lr"] != 0) for group in self.optimizer.param_groups)
        if self._task is not None and self._task.objective is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self._task.objective.add_gradients(self._live_adapter.parameters(), rate)
        return loss

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        task = self._task
        assert task is not None
        self._live_adapter.train_only(task.trained)
        self._reset_optimizer(task.lr_factor, task.optimizer_state)
        if task.objective is not None:
            task.objective.check_optimizer(self.optimizer.optimizer)
        schedule: Any = None if self._user_schedule is None else self._user_schedule.restart(task.lr_factor)
        self.lr_scheduler = schedule
        self.create_scheduler(num_training_steps=max_steps)
        for attribute in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, attribute, getattr(self, attribute))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

    def _ensure_engine(self) -> None:
        """Build the engine, unless there is one already."""
        if self._initial_lrs is None:
            self._build_engine()

    def _build_engine(self) -> None:
        """What `Trainer` builds at the beginning of a training: wrapped model and optimiser."""
        self._live_adapter.train_only(None)  # the optimiser is to know all that is trained in some round
        model: Any = self.model
        # An evaluation before the first local round needs these too. The kernels replace what the engine wraps, such
        # as a forward in mixed precision, so they have to come before it.
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(model, "config"):
            align_special_tokens(model, self.processing_class)
        if self.args.use_liger_kernel and not self._has_liger_kernels:
            apply_liger_kernel(model, self.args.liger_kernel_config)
            self._has_liger_kernels = True
        with self._engine.building(self._live_adapter, model):
            super()._prepare_for_training(max_steps=1, train_dataloader=None, resume_from_checkpoint=None)
        self._engine.built(self.model_wrapped, self.optimizer)
        if not self._engine.holds_weights:  # the others take none, and split what it holds
            self._check_optimizer(self.optimizer)
        self._initial_scaler_state = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        self._initial_lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        # From now on a local round must not drop the engine; it also saves a full garbage collection per client.
        self.accelerator.free_memory = self._free_local_round

    def _reset_optimizer(self, lr_factor: float = 1.0, start: AdapterState | None = None) -> None:
        assert self._initial_lrs is not None
        self._engine.reset_optimizer(self.optimizer, self._live_adapter.parameters(), start)
        if self._initial_scaler_state is not None:  # fp16: the loss scale starts afresh too
            self.accelerator.scaler.load_state_dict(self._initial_scaler_state)
            # of a step that was broken off: gradients are unscaled once
            self.accelerator.scaler._per_optimizer_states.clear()
            self.optimizer._accelerate_step_called = self.optimizer._is_overflow = False
        if self._user_schedule is not None:
            return  # it multiplies its own rates, which are in the initial state
        for group, lr in zip(self.optimizer.param_groups, self._initial_lrs, strict=True):
            group["lr"] = group["initial_lr"] = lr * lr_factor

    def _switches_weights(self) -> bool:
        """
        Whether the optimiser trains other weights than those to be used, as schedule-free ones do: `eval()` puts these
        in place.
        """
        return any(callable(getattr(self.optimizer.optimizer, name, None)) for name in ("train", "eval"))

    def _drop_engine(self) -> None:
        """
        Let the next local round build an engine anew, because other parameters are trained from now on.

        The model stays as it is, mixed precision and gradient checkpointing included.
        """
        if self._initial_lrs is None:  # there is none yet
            return
        if self._initial_scaler_state is not None:
            self.accelerator.scaler.load_state_dict(self._initial_scaler_state)
        self._initial_lrs = self._initial_scaler_state = None
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model  # type: ignore[assignment]
        del self.accelerator.free_memory
        self.accelerator.free_memory()

    def _put_engine_in_order(self) -> None:
        """After a step that was broken off: gradients, moments and the like are forgotten."""
        self._engine.discard_gradients(self._live_adapter.parameters().values())
        self._reset_optimizer()
        self.accelerator.gradient_state._set_sync_gradients(True)

    def _recover(self) -> None:
        """After a local round that broke off, when nothing holds on to its exception any more."""
        self._all_have_stopped = False
        self._free_local_round()
        gc.collect()  # the exception held on to activations, and to the workers of a data loader
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `train()` calls to evaluate, also for `eval_on_start`: a matter of the run, not of each client."""
        return {}

    def _free_local_round(self, *objects: Any) -> tuple[Any, ...]:
        """`Accelerator.free_memory` for what belongs to a local round only."""
        self.accelerator._dataloaders = []
        self.accelerator._schedulers = []
        self.accelerator.step = 0
        # a local round leaves its data loader before the end, which accelerate does not notice
        self.accelerator.gradient_state.dataloader_references = [None]
        return objects


class ClientTimeoutError(ClientError):
    """A local round that took longer than `client_timeout`."""


class _LocalFlowCallback(DefaultFlowCallback):
    """Ends a local round at its budget; a client neither logs, evaluates nor saves on its own."""

    def __init__(self, is_late: Callable[[], bool] | None) -> None:
        self.is_late = is_late

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop = state.global_step >= state.max_steps
        if self.is_late is not None and not control.should_training_stop and self.is_late():
            raise ClientTimeoutError(
                f"it was not done in time, but had taken {state.global_step} of {state.max_steps} steps"
            )
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return control


class _LocalCallbackHandler(CallbackHandler):
    """Passes on the events of single steps and epochs only."""

    STEP_EVENTS = frozenset(
        {
            *("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"),
            *("on_epoch_begin", "on_epoch_end"),
        }
    )

    def __init__(self, handler: CallbackHandler, is_late: Callable[[], bool] | None) -> None:
        others = [callback for callback in handler.callbacks if type(callback) is not DefaultFlowCallback]
        super().__init__([_LocalFlowCallback(is_late), *others], handler.model, handler.processing_class, None, None)

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if event not in self.STEP_EVENTS:
            return control
        control = super().call_event(event, args, state, control, **kwargs)
        control.should_save = control.should_evaluate = control.should_log = False  # not a client's business
        return control
