# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Schedules by name: the learning rate within a client's local round, and from round to round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType


__all__ = ["check_local_schedule", "check_schedule_name", "lr_factors"]


_FOLLOWS_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)  # `get_scheduler` drops them
_SOME_STEPS = 10  # to try a schedule whose number of steps follows from the data


def check_schedule_name(field: str, name: str) -> None:
    """
    Refuse what is no schedule over steps.

    Args:
        field (`str`):
            Where the name was given, for the message.
        name (`str`):
            What was given.

    Raises:
        ValueError: If there is no such schedule, or if it follows metrics.
    """
    if name not in list(SchedulerType):
        names = [kind.value for kind in SchedulerType if kind not in _FOLLOWS_METRICS]
        raise ValueError(f"`{field}` should be one of {names} but the value passed is {name!r}")
    if name in _FOLLOWS_METRICS:
        raise ValueError(
            f"`{field}={SchedulerType(name).value!r}` follows the figures of evaluations within a training run, "
            "and a client makes none. Use 'linear' or 'cosine', or another one that follows the number of steps."
        )


def lr_factors(
    field: str,
    name: str,
    num_steps: int,
    num_warmup_steps: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    lr: float = 1.0,
) -> list[float]:
    """
    Factor on the learning rate in each step.

    Args:
        field (`str`):
            Where the name was given, for the message.
        name (`str`):
            Name of the schedule, as in [`~transformers.trainer_utils.SchedulerType`].
        num_steps (`int`):
            Number of steps.
        num_warmup_steps (`int`, *optional*, defaults to `0`):
            How many of them are warm-up.
        kwargs (`dict`, *optional*):
            Options of the schedule.
        lr (`float`, *optional*, defaults to `1.0`):
            The learning rate, which some schedules compare their options with.

    Raises:
        ValueError: If it is no schedule over steps, or its options do not suffice.
    """
    check_schedule_name(field, name)
    options = dict(kwargs or {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    factors = []
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps, num_steps, options)
        for _ in range(num_steps):
            factors.append(optimizer.param_groups[0]["lr"] / lr)
            optimizer.step()
            scheduler.step()
    except (ArithmeticError, TypeError, ValueError) as error:
        given = f"`{field}={SchedulerType(name).value!r}`"
        if field != "lr_scheduler_type":
            raise ValueError(
                f"{given} needs options of its own, for which there is no field. Use one that needs none, such as "
                "'linear' or 'cosine'."
            ) from error
        raise ValueError(
            f"{given} is no schedule with `lr_scheduler_kwargs={options}` ({error}). Set what it needs there, or "
            "use one that needs nothing, such as 'linear' or 'cosine'."
        ) from error
    return factors


def check_local_schedule(
    name: str, warmup_steps: float, kwargs: Mapping[str, Any] | None, lr: float, max_steps: int
) -> None:
    """
    Refuse a schedule that no local round could follow.

    Args:
        name (`str`):
            `lr_scheduler_type`.
        warmup_steps (`float`):
            Number of steps; below 1 a share of them.
        kwargs (`dict`, *optional*):
            `lr_scheduler_kwargs`.
        lr (`float`):
            `learning_rate`.
        max_steps (`int`):
            Local budget of all clients; not known in advance if it is not positive.

    Raises:
        ValueError: Saying what to set instead.
    """
    if kwargs and name in _WITHOUT_KWARGS:
        raise ValueError(
            f"`lr_scheduler_kwargs` is {dict(kwargs)}, but `lr_scheduler_type={SchedulerType(name).value!r}` takes "
            "no options. Name the schedule that they are for (the default of a federation is 'constant'), or leave "
            "them out."
        )
    if warmup_steps > 0 and name == SchedulerType.CONSTANT:
        raise ValueError(
            f"`warmup_steps` is {warmup_steps}, but `lr_scheduler_type='constant'`, the default of a federation, "
            "has no warm-up. Set 'constant_with_warmup' or another schedule, or leave `warmup_steps` out."
        )
    num_steps = max_steps if max_steps > 0 else _SOME_STEPS
    warmup = int(warmup_steps) if warmup_steps >= 1 else math.ceil(num_steps * warmup_steps)
    factors = lr_factors("lr_scheduler_type", name, num_steps, warmup, kwargs, lr or 1.0)
    if max_steps > 0 and not any(factors):
        raise ValueError(
            f"By `lr_scheduler_type={SchedulerType(name).value!r}` with `warmup_steps={warmup_steps}` the learning "
            f"rate of all {max_steps} steps of a local round is 0, so nothing would be learnt. The schedule starts "
            "afresh at each client in each round: lower `warmup_steps`, or raise `max_steps`."
        )
