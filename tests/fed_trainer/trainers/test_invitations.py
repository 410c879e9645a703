# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a coordinator says of its run, and what a site makes of it, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from fed_trainer import Store
from fed_trainer.client import invitations
from fed_trainer.client.process import DeclinedError
from fed_trainer.federation.packet import Packet
from fed_trainer.federation.transport.roster import Guest
from fed_trainer.trainers.serving import ADAPTER, Serving
from fed_trainer.trainers.taking_part import TakingPart
from helpers.comparison import same
from helpers.data import clients_of
from peft_scl import FederaConfig, SclConfig


ROWS = clients_of(2)
LORA = {"r": 4, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def invited(make_trainer) -> Callable[..., Packet]:
    """The invitation of a coordinator, as it arrives."""

    def invite(**given: Any) -> Packet:
        states: list[Any] = invite.__dict__.setdefault("states", [])
        trainer = make_trainer("server", clients=None, is_made=False, **given)
        serving = Serving(trainer, Store(f"memory://{uuid.uuid4()}", lease=0.05), ["a", "b"], 1.0, 1.0)
        trainer._run_id = "run"
        serving._end = serving._network.server_end()
        serving._found(["a", "b"])
        states.append(trainer.federation.state)
        return Packet.from_bytes(serving._invitation().to_bytes())

    return invite


@pytest.fixture
def site(make_trainer) -> Callable[..., TakingPart]:
    """A site with data of its own, as client `"a"`."""

    def make(**given: Any) -> TakingPart:
        trainer = make_trainer(f"site-{uuid.uuid4()}", clients=ROWS["client_0"], **given)
        trainer._take_names("a")
        return TakingPart(trainer, Store("memory://unused"), ["a"])

    return make


def test_a_site_with_the_same_settings_takes_part_and_says_what_it_has(invited, site):
    held_out = ROWS["client_0"].select(range(4))
    answer = site(eval_dataset=held_out).accept("a", invited())
    assert answer.kind == "joined"
    assert {name: answer.meta[name] for name in ("client", "num_examples", "label_counts", "has_held_out")} == {
        "client": "a", "num_examples": 16, "label_counts": None, "has_held_out": True,
    }  # fmt: skip
    assert site().accept("a", invited()).meta["has_held_out"] is False


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        SclConfig(r=4, task_type="CAUSAL_LM"),
        FederaConfig(**LORA),
        LoraConfig(**LORA, init_lora_weights="pissa"),
    ],
    ids=["LoRA", "SCL", "FeDeRA", "PiSSA"],
)
def test_the_adapter_of_the_coordinator_is_taken_over_bit_for_bit(config, invited, site):
    """Even if the site would have started from another one."""
    invitation = invited(peft_config=dataclasses.replace(config))
    joining = site(peft_config=dataclasses.replace(config))
    live = joining._trainer._live_adapter
    other = {key: tensor + 0.5 for key, tensor in live.read().items()}
    live.write(other)
    joining.accept("a", invitation)
    assert same(live.saved(), invitation.part(ADAPTER))
    assert same(joining._trainer.client._known, invited.states[0])


def test_a_run_may_need_several_clients(invited, site):
    """Of which a site is one."""
    assert site(min_clients=2).accept("a", invited(min_clients=2)).kind == "joined"


@pytest.mark.parametrize("state", ["joined", "silent", "invited"])
def test_the_record_keeps_what_a_client_has_said_whatever_it_does_now(state, make_trainer):
    trainer = make_trainer("server", clients=None, is_made=False)
    serving = Serving(trainer, Store(f"memory://{uuid.uuid4()}", lease=0.05), ["a", "b"], 1.0, 1.0)
    serving._end = serving._network.server_end()
    serving._found(["a", "b"])
    serving._roster._guests["a"] = Guest("session", 1, state, {"num_examples": 16})
    sizes = {client: size["num_examples"] for client, size in serving.sizes().items()}
    assert sizes == {"a": 16, "b": None}


def test_what_concerns_the_machine_may_differ(invited, site):
    given = {"dataloader_num_workers": 1, "gradient_checkpointing": True, "save_rounds": 3, "num_rounds": 9}
    site(**given).accept("a", invited())


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"learning_rate": 0.5}, r"other settings than the run \(`learning_rate`: 0.01 there, 0.5 here"),
        ({"seed": 3}, "`seed`: 42 there, 3 here"),
        ({"max_steps": 5}, "`max_steps`: 2 there, 5 here"),
        ({"aggregation": "fedsa_lora"}, "`aggregation`: 'fedavg' there, 'fedsa_lora' here"),
        ({"peft_config": LoraConfig(**{**LORA, "r": 3})}, "another PEFT config than the server's"),
        ({"peft_config": None}, "the model itself"),
        ({"kind": "dpo", "clients": None}, "one of the trainer 'sft', but client 'a' has a `FederatedDPOTrainer`"),
    ],
)
def test_a_site_that_has_something_else_declines_and_names_it(given, complaint, invited, make_trainer, tmp_path):
    kind = given.get("kind", "sft")
    rows = ROWS["client_0"]
    if kind == "dpo":
        rows = rows.add_column("chosen", rows["completion"]).add_column("rejected", rows["completion"])
    trainer = make_trainer("site", **{**given, "clients": rows})
    trainer._take_names("a")
    before = trainer._live_adapter.read()
    with pytest.raises(DeclinedError, match=complaint):
        TakingPart(trainer, Store("memory://unused"), ["a"]).accept("a", invited())
    assert same(trainer._live_adapter.read(), before)  # nothing was taken over


def test_a_site_with_another_base_model_declines(invited, make_trainer, tiny_model_dir, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "other")
    for path in tiny_model_dir.glob("token*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    trainer = make_trainer("site", model=tmp_path / "other", clients=ROWS["client_0"])
    trainer._take_names("a")
    with pytest.raises(DeclinedError, match="holds another base model than the server"):
        TakingPart(trainer, Store("memory://unused"), ["a"]).accept("a", invited())


@pytest.mark.parametrize("what", ["format", "version"])
def test_a_site_of_another_version_declines(what, invited, site, monkeypatch):
    invitation = invited()
    if what == "format":
        monkeypatch.setattr(invitations, "FORMAT", 2)
    else:
        monkeypatch.setattr(invitations, "versions", lambda: {**invitation.meta["versions"], "peft-scl": "9.9"})
    with pytest.raises(DeclinedError, match="Install the same version on both sides"):
        site().accept("a", invitation)


def test_another_version_of_a_library_is_warned_of(invited, site, monkeypatch, caplog):
    invitation = invited()
    monkeypatch.setattr(invitations, "versions", lambda: {**invitation.meta["versions"], "torch": "1.0"})
    site().accept("a", invitation)
    assert "has torch" in caplog.text


def test_several_clients_of_one_process_share_a_base_that_a_rule_would_change(invited, make_trainer):
    trainer = make_trainer("site", aggregation="fedex_lora", clients=ROWS)
    with pytest.raises(DeclinedError, match="Start a process for each"):
        TakingPart(trainer, Store("memory://unused"), list(ROWS)).accept("client_0", invited(aggregation="fedex_lora"))


def test_the_invitation_holds_no_secret_and_no_path(invited, tmp_path, tiny_model_dir):
    meta = invited(hub_token="hf_secret", hub_model_id="me/model", run_name=str(tmp_path)).meta
    told = json.dumps(meta)
    assert "hf_secret" not in told and str(tmp_path) not in told and str(tiny_model_dir.parent) not in told
    assert meta["base_model"] == tiny_model_dir.name and meta["base_is_local"] is True


def test_the_invitation_holds_no_secret_within_a_setting(invited, site, tmp_path):
    """It may be in the store as it is, and a site that has none takes part all the same."""
    init = {"dtype": "float32", "token": "hf_secret", "cache_dir": str(tmp_path)}
    invitation = invited(model_init_kwargs=init, dataset_kwargs={"api_key": "hf_secret"})
    told = json.dumps(invitation.meta)
    assert "hf_secret" not in told and str(tmp_path) not in told
    assert invitation.meta["settings"]["model_init_kwargs"] == {"dtype": "float32"}
    assert site(model_init_kwargs={"dtype": "float32"}, dataset_kwargs={}).accept("a", invitation).kind == "joined"


@pytest.mark.parametrize("folder", ["../../elsewhere", "/tmp/elsewhere", "a\x00b"])
def test_a_run_may_be_called_as_it_likes_and_reaches_no_other_folder(folder, invited, site):
    invitation, joining = invited(), site()
    invitation.meta["run"] = folder
    joining.accept("a", invitation)
    kept = joining._trainer.client.store.folder
    assert kept.resolve().is_relative_to(joining._trainer._files.folder.resolve())
    assert kept != site().accept("a", invited()) and len(kept.name) == 16


class TestTrainersWithoutAllClients:
    def test_a_coordinator_neither_trains_nor_joins(self, make_trainer):
        trainer = make_trainer(clients=None, is_made=False)
        with pytest.raises(ValueError, match="does not have the data of all clients"):
            trainer.train()
        with pytest.raises(ValueError, match="has no training data, so it can coordinate"):
            trainer.join(Store("memory://unused"), "a")

    def test_a_site_does_not_train_by_itself_and_needs_a_name(self, make_trainer):
        trainer = make_trainer(clients=ROWS["client_0"])
        with pytest.raises(ValueError, match="does not have the data of all clients"):
            trainer.train()
        with pytest.raises(ValueError, match="`name` should be the name of this client"):
            trainer.join(Store("memory://unused"))

    def test_a_trainer_of_all_clients_takes_part_as_those_that_are_named(self, make_trainer):
        trainer = make_trainer(clients=ROWS)
        assert trainer._take_names(None) == ["client_0", "client_1"]
        assert trainer._take_names("client_1") == ["client_1"]
        with pytest.raises(ValueError, match="There is no client 'x'"):
            trainer._take_names(["x"])

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            ({"clients": "ab"}, "should be a list of names, or a number"),
            ({"clients": 0}, "`clients` should be an integer of at least 1"),
            ({"clients": ["a"], "wait": 0}, "`wait` should be a positive number of seconds"),
            ({"clients": ["a"], "round_timeout": -1}, "`round_timeout` should be a positive number"),
        ],
    )
    def test_serving_refuses_what_cannot_be(self, given, complaint, make_trainer):
        with pytest.raises(ValueError, match=complaint):
            make_trainer(clients=None, is_made=False).serve(Store("memory://unused"), **given)
