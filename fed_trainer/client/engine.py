# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One live model and engine for the whole federation: load a state, train, read the state."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerControl, TrainingArguments, set_seed
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerState
from transformers.trainer_utils import align_special_tokens

from ..methods.objectives import LocalObjective
from ..state.adapter_state import AdapterState
from ..state.client_errors import ClientError
from .agreement import AgreementMixin
from .live.deepspeed import DeepSpeedOptimizer
from .live.state import LiveState
from .local_figures import LocalFiguresMixin
from .optimizer_state import read_optimizer, with_state
from .put_back import PutBack, remember_flags, remember_frequencies, remember_hooks, restoring
from .user_optimizer import UserSchedule, check_optimizer


__all__ = ["ClientTimeoutError", "LocalRoundMixin"]


class LocalRoundMixin(AgreementMixin, LocalFiguresMixin):
    """
    Adds `local_round` to a [`~transformers.Trainer`]: its own `train()`, run for one client, on the one model it holds.

    The first local round builds the engine as `Trainer` does (wrapped model, optimiser). Later rounds keep it: the
    adapter is overwritten in place, the optimiser goes back to its initial state and a new schedule starts, which equals
    building a new trainer and costs a small part of it. So it is for one process, DDP, DeepSpeed and FSDP2; of several processes all have
    to call `local_round`, with the same arguments.
    """

    optimizer: AcceleratedOptimizer
    _live_adapter: LiveState
    _initial_lrs: list[float] | None = None  # by parameter group, once there is an engine
    _initial_optimizer_state: dict[str, Any] | None = None
    _initial_scaler_state: dict[str, Any] | None = None
    _lr_factor: float = 1.0
    _trained: Collection[str] | None = None
    _optimizer_start: AdapterState | None = None
    _objective: LocalObjective | None
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

    def local_round(
        self,
        state: AdapterState,
        dataset: Dataset,
        seed: int,
        data_seed: int | None,
        lr_factor: float,
        trained: Collection[str] | None = None,
        max_steps: int | None = None,
        objective: LocalObjective | None = None,
        timeout: float | None = None,
        optimizer_state: AdapterState | None = None,
    ) -> tuple[AdapterState, dict[str, Any]]:
        """
        Train one client for its local budget, starting from `state`.

        Args:
            state (`dict[str, torch.Tensor]`):
                Adapter to start from; not changed.
            dataset (`Dataset`):
                The client's prepared training data.
            seed (`int`):
                Seed of dropout and of the order of the data.
            data_seed (`int`, *optional*):
                Seed of the order of the data, if it is not to follow `seed`.
            lr_factor (`float`):
                Factor on `learning_rate` in this round.
            trained (`Collection[str]`, *optional*):
                Keys of `state` that are trained; all if not given.
            max_steps (`int`, *optional*):
                Local budget, in place of `args.max_steps`.
            objective ([`LocalObjective`], *optional*):
                What to add to the gradients; `begin` has been called.
            timeout (`float`, *optional*):
                Seconds after which it counts as failed, looked at after every optimiser step. Of several processes the slowest
                counts.
            optimizer_state (`dict[str, torch.Tensor]`, *optional*):
                What `optimizer_state` has returned after an earlier local round, to go on with; a fresh optimiser if not given.

        Returns:
            `tuple`: the trained adapter, and `train_loss` (mean per step), `num_steps`, `seconds` and, of a trainer
            that logs more in training, `training_metrics`.

        Raises:
            ClientError: If nothing was learnt: no step, no label, or a loss that is not finite.
            ClientTimeoutError: If it takes longer than `timeout`.
            OtherProcessFailedError: If a batch or a forward pass has failed in another process.
        """
        start = time.perf_counter()
        self._ensure_engine()  # first, as what it makes of `bf16` takes a state that the model would round
        self._live_adapter.write(state)
        set_seed(seed)
        self.accelerator.dataloader_config.data_seed = data_seed
        self.train_dataset = dataset
        self._lr_factor = lr_factor
        self._trained = trained
        self._objective = objective
        self._optimizer_start = optimizer_state
        self._has_rate = False

        model: Any = self.model
        is_late = None if timeout is None else lambda: self._any_stops(time.perf_counter() > start + timeout)
        with (
            self._own_state(max_steps, is_late),
            self._breaking_off(),
            restoring(remember_frequencies(model)),
            self._measuring() as measured,
            self._agreeing_in_forward(),
        ):
            output = super().train()
        self._is_switched_on = True
        if self._switches_weights():
            self.optimizer.eval()
        metrics = self._figures(output, measured) | {"seconds": time.perf_counter() - start}
        return self._live_adapter.read(), metrics

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

    def optimizer_state(self) -> AdapterState:
        """What the optimiser remembers of the tensors that the last local round has trained; see `read_optimizer`."""
        assert self._initial_optimizer_state is not None
        parameters = self._live_adapter.parameters()
        return read_optimizer(self.optimizer.optimizer, parameters, self._initial_optimizer_state)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # after the last backward of an optimiser step, when the gradients are complete and not yet clipped
        if self.accelerator.sync_gradients:
            self._has_rate |= any(
                group["lr"] is None or bool(group["lr"] != 0) for group in self.optimizer.param_groups
            )
        if self._objective is not None and self.accelerator.sync_gradients:
            self._objective.add_gradients(self._live_adapter.parameters(), self.optimizer.param_groups[0]["lr"])
        return loss

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        self._live_adapter.train_only(self._trained)
        self._reset_optimizer()
        if self._objective is not None:
            self._objective.check_optimizer(self.optimizer.optimizer)
        schedule: Any = None if self._user_schedule is None else self._user_schedule.restart(self._lr_factor)
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
        state = self._live_adapter.read() if self.is_deepspeed_enabled else {}
        with self._live_adapter.following(model) if self.is_fsdp_enabled else nullcontext():
            super()._prepare_for_training(max_steps=1, train_dataloader=None, resume_from_checkpoint=None)
        if self.is_deepspeed_enabled:
            self._deepspeed_optimizer = DeepSpeedOptimizer(self.model_wrapped)
            self._live_adapter.write(state)  # with `bf16` its masters are made of copies that were rounded
        else:
            self._initial_optimizer_state = copy.deepcopy(self.optimizer.state_dict())
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:  # which take none, and split what it holds
            self._check_optimizer(self.optimizer)
        self._initial_scaler_state = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        self._initial_lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        # From now on a local round must not drop the engine; it also saves a full garbage collection per client.
        self.accelerator.free_memory = self._free_local_round

    def _reset_optimizer(self) -> None:
        assert self._initial_lrs is not None
        if self._deepspeed_optimizer is not None:
            self._deepspeed_optimizer.reset()
        else:
            assert self._initial_optimizer_state is not None
            state = copy.deepcopy(self._initial_optimizer_state)
            if self._optimizer_start is not None:
                optimizer, parameters = self.optimizer.optimizer, self._live_adapter.parameters()
                state = with_state(state, self._optimizer_start, optimizer, parameters)
            self.optimizer.load_state_dict(state)
        if self._initial_scaler_state is not None:  # fp16: the loss scale starts afresh too
            self.accelerator.scaler.load_state_dict(self._initial_scaler_state)
            self.accelerator.scaler._per_optimizer_states.clear()  # of a step that was broken off: gradients are unscaled once
            self.optimizer._accelerate_step_called = self.optimizer._is_overflow = False
        if self._user_schedule is not None:
            return  # it multiplies its own rates, which are in the initial state
        for group, lr in zip(self.optimizer.param_groups, self._initial_lrs, strict=True):
            group["lr"] = group["initial_lr"] = lr * self._lr_factor

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
        self._initial_lrs = self._initial_optimizer_state = self._initial_scaler_state = None
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model  # type: ignore[assignment]
        del self.accelerator.free_memory
        self.accelerator.free_memory()

    def _put_engine_in_order(self) -> None:
        """After a step that was broken off: gradients, moments and the like are forgotten."""
        for parameter in self._live_adapter.parameters().values():
            parameter.grad = None
        if self._deepspeed_optimizer is not None:
            self._deepspeed_optimizer.discard_gradients()
        else:
            self._optimizer_start = None
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
