# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
An optimiser and a schedule that the user made: whether they fit what is trained, and how the schedule starts afresh.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR


__all__ = ["UserSchedule", "check_optimizer"]

_SOME_STEPS = 3  # to try a schedule whose number of steps follows from the data


def check_optimizer(optimizer: Any, trained: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """
    Refuse an optimiser that does not move all that is trained, or that moves what is not part of the model.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimiser.
        trained (`Mapping[str, torch.nn.Parameter]`):
            All that is trained in some round, by key.
        model (`torch.nn.Module`):
            The model. Its frozen parameters get no gradient, so an optimiser may hold them.

    Raises:
        ValueError: Naming a tensor.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lacking = [key for key, parameter in trained.items() if id(parameter) not in held]
    if lacking:
        raise ValueError(
            f"The optimiser ({type(optimizer).__name__}) lacks {len(lacking)} of the {len(trained)} tensors that "
            f"are trained (the first: {lacking[0]}), so they would stay as they are. One that was made before the "
            "model had its adapter does not know it: pass a `PeftModel` and make the optimiser from its "
            "parameters, or pass `optimizer_cls_and_kwargs`, or set `optim` and `optim_args`."
        )
    foreign = held - {id(parameter) for parameter in model.parameters()}
    if foreign:
        raise ValueError(
            f"The optimiser ({type(optimizer).__name__}) holds {len(foreign)} tensors that are not parameters of "
            "the model, so what one client learns in them would go on to the next and never travel. Make it from "
            "the parameters of the model alone."
        )


class UserSchedule:
    """
    A schedule of `optimizers=(optimizer, schedule)` as the scheduler of the local rounds: in each it starts afresh, at
    the rates that it had when it was given, times the factor of the round.

    Args:
        schedule (`torch.optim.lr_scheduler.LRScheduler`):
            The schedule.
        optimizer (`torch.optim.Optimizer`, *optional*):
            The optimiser that was given with it.
        max_steps (`int`):
            Local budget; not known in advance if it is not positive.

    Raises:
        ValueError: If it belongs to another optimiser, follows metrics, or cannot start afresh.
    """

    def __init__(self, schedule: Any, optimizer: Any, max_steps: int) -> None:
        kind = type(schedule).__name__
        if optimizer is None or getattr(schedule, "optimizer", None) is not optimizer:
            raise ValueError(
                f"The schedule of `optimizers` ({kind}) belongs to {'no' if optimizer is None else 'another'} "
                "optimiser of that pair, so it would set the rates of an optimiser that trains nothing. Give both, "
                "the schedule made for the optimiser; or set `lr_scheduler_type` and `lr_scheduler_kwargs`."
            )
        if isinstance(schedule, (ReduceLROnPlateau, GreedyLR)):
            raise ValueError(
                f"The schedule of `optimizers` ({kind}) follows the figures of evaluations within a training run, "
                "and a client makes none. Give one that follows the number of steps."
            )
        self._schedule: Any = schedule
        self._optimizer: Any = optimizer
        self._rates: list[Any] = []
        self._factor = 1.0
        try:
            self._fresh = self._copied(vars(schedule))
        except Exception as error:  # whatever a class of the user's raises
            raise ValueError(
                f"The schedule of `optimizers` ({kind}) cannot be copied ({type(error).__name__}: {error}), so it "
                "cannot start afresh at each client. Give one that `copy.deepcopy` copies, or set "
                "`lr_scheduler_type` and `lr_scheduler_kwargs`."
            ) from error
        steps = max_steps if max_steps > 0 else _SOME_STEPS
        with self._put_back():
            first, second = self._tried(steps), self._tried(steps)
        if first != second:
            raise ValueError(
                f"The schedule of `optimizers` ({kind}) gives other rates when it starts afresh ({second} after "
                f"{first}): what it remembers is outside of it, so it would go on from client to client. Keep it "
                "in attributes of the schedule, or give one without."
            )

    def restart(self, factor: float) -> UserSchedule:
        """Start afresh; the optimiser's rates are those of its initial state."""
        vars(self._schedule).clear()
        vars(self._schedule).update(self._copied(self._fresh))
        self._factor = factor
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._scale()
        return self

    def step(self) -> None:
        """The next rates: what the schedule makes of its own last ones, times the factor."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self._schedule.step()
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._scale()

    def get_last_lr(self) -> list[Any]:
        """The present rates."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """That of the schedule."""
        return self._schedule.state_dict()

    def _scale(self) -> None:
        if self._factor != 1:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._factor

    def _copied(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(attributes), {id(self._optimizer): self._optimizer})

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Afterwards the schedule and the groups of its optimiser are what they were."""
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self._optimizer.param_groups
        ]
        groups = copy.deepcopy(groups)
        try:
            yield
        finally:
            for group, values in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(values)
            vars(self._schedule).clear()
            vars(self._schedule).update(self._copied(self._fresh))

    def _tried(self, steps: int) -> list[list[float]]:
        """The rates of a local round, by step and group."""
        rates = []
        with self._put_back(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants steps of the optimiser in between
            for _ in range(steps):
                rates.append([float(group["lr"]) for group in self._optimizer.param_groups])
                try:
                    self._schedule.step()
                except Exception as error:  # whatever a class of the user's raises
                    raise ValueError(
                        f"The schedule of `optimizers` ({type(self._schedule).__name__}) fails in a local round of "
                        f"{steps} steps ({type(error).__name__}: {error}). It starts afresh at each client in each "
                        "round: make it for the local budget, and so that `step()` needs no arguments."
                    ) from error
        return rates
