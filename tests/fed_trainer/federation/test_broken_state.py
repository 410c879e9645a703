# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A global state that the model cannot compute with is not saved, and the run can go on from the round before."""

from __future__ import annotations

import math

import pytest
import torch

from fed_trainer import FederatedTrainer
from fed_trainer.federation.broken_state import BrokenStateError, refuse_broken_loss, refuse_overflow


pytestmark = pytest.mark.trainer(
    adapter={"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"]},
    num_clients=2,
    rows=8,
    eval_rows=8,
    num_rounds=3,
    max_steps=1,
    max_length=16,
    eval_on_start=False,
)


def weights_of(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "how, method", [("loss", "fedavg"), ("loss", "flora"), ("overflow", "fedavg"), ("base", "flora")]
)
def test_a_broken_state_is_not_saved_and_the_round_before_goes_on(how, method, make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(aggregation=method)
    finish = trainer.federation.server.finish
    seen: list[dict[str, torch.Tensor]] = []
    settle, settled = trainer.federation.server.settle, []
    monkeypatch.setattr(
        trainer.federation.server,
        "settle",
        lambda: settled.append(trainer.federation.server._round) or settle(),
    )

    def spoiled():
        seen.append(weights_of(trainer))
        state, base = finish()
        if trainer.federation.server._round < 2:
            return state, base
        if how == "overflow":
            state = {key: tensor.double() + 1e300 for key, tensor in state.items()}
        elif how == "base":
            base = {module: type(change)(change.left + 3e38, change.right + 3e38) for module, change in base.items()}
        else:
            state = {key: torch.full_like(tensor, 1e30) for key, tensor in state.items()}
        return state, base

    monkeypatch.setattr(trainer.federation.server, "finish", spoiled)
    with pytest.raises(BrokenStateError, match=r"not saved: `train\(resume_from_checkpoint=True\)` goes on"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert len(trainer.record["rounds"]) == 1
    assert settled == ([1, 2] if how == "loss" else [1])  # what clients keep: only an evaluation comes later
    for key, tensor in weights_of(trainer).items():
        assert torch.isfinite(tensor).all(), key
        if "lora" not in key:  # the last client has left its own adapter there, which the global one replaces
            assert torch.equal(tensor, seen[-1][key]), key

    again = make_trainer(aggregation=method)
    again.train(resume_from_checkpoint=True)
    assert len(again.record["rounds"]) == 3


def test_a_loss_that_never_was_finite_is_a_matter_of_the_data() -> None:
    nan, good = {"eval_loss": math.nan}, {"eval_loss": 2.0}
    refuse_broken_loss(nan, [None, nan])
    refuse_broken_loss({"eval_a_loss": math.nan, "eval_b_loss": 1.0}, [{"eval_a_loss": 1.0, "eval_b_loss": 1.0}])
    refuse_broken_loss({"eval_accuracy": math.nan, "eval_loss": 1.0, "eval_loss_note": None}, [good])
    for broken in (math.nan, math.inf):
        with pytest.raises(BrokenStateError, match=r"cannot compute with .* `eval_loss` is (nan|inf)"):
            refuse_broken_loss({"eval_loss": broken}, [None, good, nan])


@pytest.mark.parametrize("dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 3.38e38)])
def test_values_that_the_dtype_of_the_model_cannot_hold_are_found(dtype: torch.dtype, largest: float) -> None:
    state = {"a": torch.tensor([0.0, -largest]), "count": torch.tensor(10**6)}
    dtypes = {"a": dtype, "count": torch.int64}
    refuse_overflow(state, dtypes)
    state["a"][1] = -1.02 * largest if dtype == torch.float16 else -torch.finfo(torch.float32).max
    with pytest.raises(BrokenStateError, match=rf"values in a that {dtype}"):
        refuse_overflow(state, dtypes)
