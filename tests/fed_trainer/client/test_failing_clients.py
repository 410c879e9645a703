# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients whose local round breaks off: they are named, tried again, left out, and leave nothing behind."""

import pytest
import torch

from fed_trainer.federation.validation import TooFewClientsError
from helpers.comparison import same, weights_in


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")


pytestmark = pytest.mark.trainer(
    adapter={"r": 4, "lora_dropout": 0.1, "target_modules": ["v_proj"]},
    max_steps=3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    eval_on_start=False,
)


def fail(trainer, monkeypatch, times, client="client_1", error=OUT_OF_MEMORY):
    """
    Of the given client the first `times` local rounds fail in the second micro-batch, with gradients accumulated.
    """
    turn = {"client": None, "left": times, "batches": 0}
    client_turn, training_step = trainer.client.turn, trainer.training_step

    def remembered(packet):
        turn.update(client=packet.meta["client"], batches=0)
        return client_turn(packet)

    def failing(*args, **kwargs):
        turn["batches"] += 1
        loss = training_step(*args, **kwargs)
        if turn["client"] == client and turn["left"] and turn["batches"] % 2 == 1:
            turn["left"] -= 1
            raise error
        return loss

    monkeypatch.setattr(trainer.client, "turn", remembered)
    monkeypatch.setattr(trainer, "training_step", failing)


def test_a_round_goes_on_without_the_client_that_fails(make_trainer, make_clients, tmp_path, monkeypatch, caplog):
    clients = make_clients(num_clients=3)
    trainer = make_trainer("failing", clients=clients)
    fail(trainer, monkeypatch, times=2)
    trainer.train()
    for entry in trainer.record["rounds"]:
        assert list(entry["clients"]) == ["client_0", "client_2"]
        assert entry["refused"] == {"client_1": "its local round failed: OutOfMemoryError"}
    del clients["client_1"]
    without = make_trainer("without", clients=clients)
    without.train()
    assert same(weights_in(tmp_path / "failing"), weights_in(tmp_path / "without"))


def test_a_client_that_is_tried_again_does_what_it_would_have_done(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer("failing", client_retries=1)
    fail(trainer, monkeypatch, times=1)
    trainer.train()
    make_trainer("healthy").train()
    assert trainer.record["rounds"][0]["refused"] == {}
    assert same(weights_in(tmp_path / "failing"), weights_in(tmp_path / "healthy"))


def test_the_first_client_of_a_run_may_fail(make_trainer, monkeypatch, tmp_path):
    """The engine is built in its local round."""
    trainer = make_trainer("failing", client_retries=2)
    fail(trainer, monkeypatch, times=2, client="client_0")
    trainer.train()
    make_trainer("healthy").train()
    assert same(weights_in(tmp_path / "failing"), weights_in(tmp_path / "healthy"))


def test_too_many_failures_end_the_run_with_the_reasons(make_trainer, monkeypatch):
    trainer = make_trainer(min_clients=3)
    fail(trainer, monkeypatch, times=1, error=RuntimeError("the disk is gone"))
    with pytest.raises(TooFewClientsError, match="Only 2 of at least 3 .*'client_1': .* RuntimeError"):
        trainer.train()


def test_an_interrupt_is_no_failure(make_trainer, monkeypatch):
    trainer = make_trainer(client_retries=5)
    fail(trainer, monkeypatch, times=1, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_client_that_is_too_slow_is_left_out(make_trainer):
    trainer = make_trainer(client_timeout=1e-9)
    with pytest.raises(
        TooFewClientsError, match="ClientTimeoutError: it was not done in time, but had taken 1 of 3 steps"
    ):
        trainer.train()
    patient = make_trainer("patient", client_timeout=1e9, num_rounds=1)
    patient.train()
    assert patient.record["rounds"][0]["refused"] == {}


@pytest.mark.fast("nan-False", "inf-True")
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_failure(value, hides, make_trainer, monkeypatch):
    trainer = make_trainer(num_rounds=1, logging_nan_inf_filter=hides)
    training_step, seen = trainer.training_step, []

    def diverging(*args, **kwargs):
        seen.append(1)
        return training_step(*args, **kwargs) * (value if len(seen) == 2 else 1)  # of the first client

    monkeypatch.setattr(trainer, "training_step", diverging)
    trainer.train()
    assert list(trainer.record["rounds"][0]["clients"]) == ["client_1", "client_2"]
    assert f"The training loss is {value}" in trainer.record["rounds"][0]["refused"]["client_0"]
    assert trainer.args.logging_nan_inf_filter is hides


def test_who_failed_and_why_is_in_the_summary(make_trainer, monkeypatch, capsys):
    trainer = make_trainer(disable_tqdm=False)
    fail(trainer, monkeypatch, times=1)
    trainer.train()
    shown = capsys.readouterr().out
    assert "left out in round 1: client_1, its local round failed: OutOfMemoryError" in shown
    assert "left out in round 2" not in shown


def test_local_rounds_leave_nothing_in_accelerate(make_trainer):
    trainer = make_trainer(num_rounds=3)
    trainer.train()
    assert len(trainer.accelerator.gradient_state._dataloader_references_ref) <= 2


@pytest.mark.parametrize(("setting", "value"), [("client_retries", -1), ("client_timeout", 0.0)])
def test_settings_out_of_range_are_refused(make_trainer, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` should be"):
        make_trainer(**{setting: value})


def test_an_optimiser_that_cannot_be_made_ends_the_run_at_once(make_trainer):
    def no_optimizer(*args, **kwargs):
        raise ImportError("You need to install it")

    trainer = make_trainer()
    trainer.optimizer_cls_and_kwargs = (no_optimizer, {})
    with pytest.raises(ImportError, match="You need to install it"):
        trainer.train()


def test_a_client_whose_data_cannot_be_prepared_is_tried_again_and_left_out(make_trainer, monkeypatch, caplog):
    trainer = make_trainer(client_retries=1, num_rounds=1)
    prepare = trainer._prepare_client_dataset

    def broken(dataset, client):
        if client == "client_1":
            raise TypeError("no text")
        return prepare(dataset, client)

    monkeypatch.setattr(trainer, "_prepare_client_dataset", broken)
    trainer.train()
    entry = trainer.record["rounds"][0]
    assert entry["refused"] == {"client_1": "its local round failed: TypeError"}
    assert "client_1" not in entry["clients"] and len(entry["clients"]) == 2
    sent = {client["bytes_down"] for client in entry["clients"].values()}
    assert (
        len(sent) == 1 and entry["bytes_down"] == 3 * sent.pop() == (entry["bytes_up"] - 2 * 8) * 3 // 2
    )  # it was sent it in vain
    assert caplog.text.count("TypeError: no text") >= 2
