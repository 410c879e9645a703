# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fed_trainer import FederatedConfig, FederatedTaskConfig
from fed_trainer.output.figures import held_out_metrics
from fed_trainer.output.settings import local_settings


PLAIN: dict[str, Any] = {"use_cpu": True, "report_to": "none", "bf16": False}


@pytest.mark.parametrize(
    "changed",
    [
        {"label_smoothing_factor": 0.1},
        {"optim_args": "amsgrad=True"},
        {"optim_target_modules": ["q_proj"]},
        {"lr_scheduler_type": "linear"},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "sequential"},
        {"loss_type": "dft"},
        {"assistant_only_loss": True},
        {"truncation_mode": "keep_end"},
        {"pad_to_multiple_of": 8},
        {"shuffle_dataset": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_decides_a_local_round_is_recorded_as_json(tmp_path: Path, changed: dict[str, Any]) -> None:
    before = local_settings(FederatedConfig(output_dir=str(tmp_path), **PLAIN))
    after = local_settings(FederatedConfig(output_dir=str(tmp_path), **PLAIN, **changed))
    assert {key: value for key, value in after.items() if value != before[key]} == changed
    assert json.loads(json.dumps(after)) == after


def test_only_settings_that_there_are_are_recorded(tmp_path: Path) -> None:
    task = local_settings(FederatedTaskConfig(output_dir=str(tmp_path), **PLAIN))
    assert "label_smoothing_factor" in task
    assert "packing" not in task and "loss_type" not in task


def test_held_out_metrics_are_the_loss_and_what_the_user_computes() -> None:
    evaluation = {
        "eval_accuracy": 0.5,
        "eval_loss": 2.0,
        "eval_runtime": 1.0,
        "eval_entropy": 3.0,
        "eval_mean_token_accuracy": 0.2,
        "eval_num_tokens": 7.0,
        "epoch": 1.0,
    }
    record = {"start": {"eval": evaluation}, "rounds": [{"round": 1, "eval": None}]}
    assert held_out_metrics(record) == {0: {"eval_loss": 2.0, "eval_accuracy": 0.5}}
