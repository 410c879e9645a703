# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Every schedule of transformers, over rounds and within a client: it works, or a sentence says what to set."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.trainer_utils import SchedulerType

from fed_trainer import FederatedConfig
from fed_trainer.config import round_lr_factors


FOLLOWS_METRICS = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}
# by name, what a schedule cannot do without
OPTIONS: dict[SchedulerType, dict[str, Any]] = {
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 2},
}


def make_config(**settings: Any) -> FederatedConfig:
    return FederatedConfig(**{"output_dir": "out", "use_cpu": True, "report_to": "none", "num_rounds": 4} | settings)


@pytest.mark.parametrize("name", list(SchedulerType))
@pytest.mark.parametrize("as_text", [True, False])
def test_every_schedule_over_rounds(name: SchedulerType, as_text: bool) -> None:
    settings: dict[str, Any] = {"round_lr_scheduler_type": name.value if as_text else name}
    if name in FOLLOWS_METRICS:
        with pytest.raises(
            ValueError, match=f"`round_lr_scheduler_type='{name.value}'` follows the figures .* Use 'linear'"
        ):
            make_config(**settings)
    elif name in OPTIONS:
        with pytest.raises(
            ValueError,
            match=f"`round_lr_scheduler_type='{name.value}'` needs options of its own.* Use one that needs none",
        ):
            make_config(**settings)
    else:
        factors = round_lr_factors(make_config(**settings))
        assert len(factors) == 4 and factors[0] == 1 and all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("name", list(SchedulerType))
@pytest.mark.parametrize("max_steps", [-1, 5])
def test_every_schedule_within_a_client(name: SchedulerType, max_steps: int) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": name.value, "max_steps": max_steps}
    if name in FOLLOWS_METRICS:
        with pytest.raises(
            ValueError, match=f"`lr_scheduler_type='{name.value}'` follows the figures .* Use 'linear'"
        ):
            make_config(**settings)
        return
    if name in OPTIONS:
        with pytest.raises(
            ValueError, match=f"`lr_scheduler_type='{name.value}'` is no schedule with `lr_scheduler_kwargs={{}}`"
        ):
            make_config(**settings)
    make_config(**settings, lr_scheduler_kwargs=OPTIONS.get(name))
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        make_config(**settings, lr_scheduler_kwargs={"no_such_option": 1})


@pytest.mark.parametrize("field", ["lr_scheduler_type", "round_lr_scheduler_type"])
@pytest.mark.parametrize("value", ["no_such", None, 3])
def test_what_is_no_schedule(field: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"`{field}` should be one of \[.*'linear'.*\] but the value passed is {value!r}"
    ):
        make_config(**{field: value})


@pytest.mark.parametrize("warmup_steps", [3, 0.5])
def test_warm_up_with_a_schedule_that_has_none(warmup_steps: float) -> None:
    with pytest.raises(ValueError, match=f"`warmup_steps` is {warmup_steps}, but .* Set 'constant_with_warmup'"):
        make_config(warmup_steps=warmup_steps)
    make_config(warmup_steps=warmup_steps, lr_scheduler_type="constant_with_warmup", max_steps=10)


@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(1, 1), (0.5, 1), (20, 1)])
def test_a_local_round_that_is_all_warm_up_from_zero(warmup_steps: float, max_steps: int) -> None:
    settings = {"warmup_steps": warmup_steps, "lr_scheduler_type": "linear", "max_steps": max_steps}
    with pytest.raises(ValueError, match="the learning rate of all 1 steps of a local round is 0"):
        make_config(**settings)
    make_config(**settings, client_settings={"a": {"max_steps": 5}})
