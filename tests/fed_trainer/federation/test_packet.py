# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Packets, and that nothing else than packets goes from the server to a client and back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save

from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.federation.base_sum import BaseSum
from fed_trainer.federation.broken_state import BrokenStateError
from fed_trainer.federation.packet import Packet, Reply
from fed_trainer.federation.rounds import Round
from fed_trainer.federation.transport import InProcess
from helpers.transports import OverBytes


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@given(
    kind=st.sampled_from(["train", "update"]),
    names=st.lists(NAMES.filter(lambda name: name != "__metadata__"), unique=True, max_size=4),
    meta=st.dictionaries(st.text(max_size=6), JSON, max_size=4),
    seed=st.integers(0, 1000),
)
def test_a_packet_goes_through_bytes(kind: str, names: list[str], meta: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 100, (2, index), generator=generator).to(DTYPES[(seed + index) % len(DTYPES)])
        for index, name in enumerate(names)
    }
    packet = Packet(kind, tensors, meta)
    back = Packet.from_bytes(packet.to_bytes())
    assert (back.kind, back.meta) == (kind, meta)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor)


def test_figures_that_are_not_finite_are_strict_json() -> None:
    content = Packet("update", {}, {"figures": {"loss": math.nan}}).to_bytes()
    json.loads(content[8:].decode(), parse_constant=lambda name: pytest.fail(name))
    assert Packet.from_bytes(content).meta == {"figures": {"loss": "nan"}}


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", b"\xff" * 40, Packet("train").to_bytes()[:-3], b"\x02\x00\x00\x00\x00\x00\x00\x00{}"],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no packet of a federation"):
        Packet.from_bytes(content)


@pytest.mark.parametrize("number", ["1" + "0" * 400, str(2**63), "NaN", "-Infinity", "1e999"])
def test_numbers_that_arithmetic_cannot_bear_do_not_come_in(number: str) -> None:
    content = save({}, metadata={"packet": f'{{"kind": "failed", "meta": {{"seconds": {{"local": {number}}}}}}}'})
    with pytest.raises(ValueError, match="no packet of a federation"):
        Packet.from_bytes(content)


def test_bytes_are_those_of_the_tensors_the_base_and_the_numbers() -> None:
    tensors = {"state/a": torch.zeros(3), "drawn/b": torch.zeros(100), "objective/a": torch.zeros(2).half()}
    assert Packet("train", tensors, {"base_bytes": 7, "client": "a" * 99}).num_bytes == 12 + 4 + 7
    assert (
        Packet("update", {"delta/a": torch.zeros(3)}, {"numbers": ["num_examples", "num_steps"]}).num_bytes == 12 + 16
    )


# Nothing but packets


@pytest.fixture
def make_trainer(tiny_model_dir, make_clients, tmp_path):
    def make(output, **settings):
        args = FederatedConfig(
            output_dir=str(tmp_path / output),
            **{
                "num_rounds": 3,
                "clients_per_round": 2,
                "max_steps": 1,
                "per_device_train_batch_size": 2,
                "max_length": 16,
                "gradient_checkpointing": False,
                "use_cpu": True,
                "report_to": "none",
                "disable_tqdm": True,
                "save_rounds": 100,
                **settings,
            },
        )
        return FederatedTrainer(
            model=str(tiny_model_dir),
            args=args,
            train_dataset=make_clients(num_clients=3, rows=4),
            peft_config=LoraConfig(r=4, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"),
        )

    return make


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
PRUNING = {"decay": 0.5, "penalty_weight": 100.0}
METHODS = {
    "fedavg": {},
    "rolora": {"aggregation": "rolora"},
    "flora": {"aggregation": "flora"},
    "hetlora": {"aggregation": "hetlora", "client_settings": {"client_0": {"r": 2}}},
    "rank_pruning": {
        "aggregation": "hetlora",
        "local_objective": "rank_pruning",
        "local_objective_kwargs": PRUNING,
        **SGD,
    },
    "scaffold": {"local_objective": "scaffold", **SGD},
    "ditto": {"local_objective": "ditto", "local_objective_kwargs": {"mu": 0.1}},
    "fedsa_lora": {"aggregation": "fedsa_lora"},
    "slora": {"aggregation": "slora", "aggregation_kwargs": {"sparse_rounds": 1, "density": 0.1}},
    "bfloat16": {"wire_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_client_needs_nothing_but_its_packet(name: str, make_trainer) -> None:
    """Between machines it gets bytes only, and from them the same bits come."""
    plain, remote = (make_trainer(output, **METHODS[name]) for output in ("plain", "remote"))
    remote.federation.transport = OverBytes(remote)
    plain.train()
    remote.train()
    for key, tensor in plain.federation.state.items():
        assert torch.equal(tensor, remote.federation.state[key]), key
    for ours, theirs in zip(plain.record["rounds"], remote.record["rounds"], strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert (ours["bytes_up"], ours["bytes_down"]) == (theirs["bytes_up"], theirs["bytes_down"])


class Unreliable(InProcess):
    """The first client is silent, the second answers twice, the third to another round, and a stranger joins in."""

    def exchange(self, packets, round, timeout=None):
        _silent, twice, late = packets
        for reply in super().exchange({client: packets[client] for client in (twice, late)}, round, timeout):
            packet = reply.packet
            if reply.client == late:
                packet = Packet(packet.kind, packet.tensors, {**packet.meta, "round": round - 1})
            yield Reply(reply.client, packet=packet, seconds=reply.seconds)
            if reply.client == twice:
                yield reply
                yield Reply("stranger", packet=Packet("update", packet.tensors, {**packet.meta, "client": "stranger"}))


def test_one_answer_of_each_client_counts_whatever_a_transport_does(make_trainer) -> None:
    trainer = make_trainer("out", clients_per_round=3, num_rounds=2)
    trainer.federation.transport = Unreliable(trainer.client)
    trainer.train()
    for entry in trainer.record["rounds"]:
        assert list(entry["clients"]) == ["client_1"]
        refused = {client: reason.split(".")[0] for client, reason in entry["refused"].items()}
        assert refused == {
            "client_0": "it has not answered (lost)",
            "client_1": "it has sent one in this round already",
            "client_2": "its answer is to another packet than that of this round",
            "'stranger'": "it was not sampled in this round",
        }
    visits = trainer.federation.server.visits
    assert visits.counted == {"client_1": 2} and visits.seen == {"client_1": 2}


class Lossy(InProcess):
    """In one round a packet does not arrive."""

    def exchange(self, packets, round, timeout=None):
        for client in packets:
            if (round, client) == (3, "client_0"):
                yield Reply(client, "lost")
            else:
                yield from super().exchange({client: packets[client]}, round, timeout)


def test_what_was_in_a_packet_that_is_lost_is_sent_again(make_trainer) -> None:
    """RoLoRA sends one factor per round: that of round 2, in the packet of round 3, and again in that of round 4."""
    trainer = make_trainer("out", aggregation="rolora", clients_per_round=3, num_rounds=4)
    trainer.federation.transport = Lossy(trainer.client)
    trainer.train()
    last, state = trainer.record["rounds"][-1]["clients"], trainer.federation.state
    assert last["client_0"]["bytes_down"] == 4 * sum(tensor.numel() for tensor in state.values())
    assert last["client_1"]["bytes_down"] < last["client_0"]["bytes_down"]


BAD_ANSWERS = {
    "no kind": ({}, "train"),
    "no figures": ({"figures": None}, "update"),
    "no loss": ({"figures": {"loss": 1.0}}, "update"),
    "a text for a loss": ({"figures": {"train_loss": "nan"}}, "update"),
    "metrics that are none": ({"figures": {"train_loss": 1.0, "training_metrics": 5}}, "update"),
    "bytes that are none": ({"numbers": 7, "base_bytes": "all"}, "update"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_is_none_costs_its_client_the_round(name: str, make_trainer) -> None:
    meta, kind = BAD_ANSWERS[name]

    class Spoilt(InProcess):
        def exchange(self, packets, round, timeout=None):
            for reply in super().exchange(packets, round, timeout):
                packet = reply.packet
                if reply.client == "client_0":
                    packet = Packet(kind, packet.tensors, {**packet.meta, **meta})
                yield Reply(reply.client, packet=packet, seconds=reply.seconds)

    trainer = make_trainer("out", clients_per_round=3, num_rounds=1)
    trainer.federation.transport = Spoilt(trainer.client)
    trainer.train()
    (entry,) = trainer.record["rounds"]
    assert list(entry["refused"]) == ([] if name == "bytes that are none" else ["client_0"])


def test_an_update_that_a_codec_cannot_decode_costs_its_client_the_round(make_trainer, monkeypatch) -> None:
    trainer = make_trainer("out", clients_per_round=3, num_rounds=1, wire_dtype="bfloat16")
    up = trainer.client.plan.up
    decode, calls = up.decode, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise IndexError
        return decode(*args)

    monkeypatch.setattr(up, "decode", failing)
    trainer.train()
    (entry,) = trainer.record["rounds"]
    assert list(entry["refused"]) == ["client_1"] and "should be a dictionary by name" in entry["refused"]["client_1"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_a_dtype_is_half_the_bytes_and_nearly_the_same_model(dtype: str, make_trainer) -> None:
    whole, half = make_trainer("whole"), make_trainer("half", wire_dtype=dtype)
    whole.train()
    half.train()
    for ours, theirs in zip(whole.record["rounds"], half.record["rounds"], strict=True):
        numbers = 8 * len(ours["clients"])
        assert theirs["bytes_down"] * 2 == ours["bytes_down"]
        assert (theirs["bytes_up"] - numbers) * 2 == ours["bytes_up"] - numbers
    for key, tensor in whole.federation.state.items():
        assert not torch.equal(tensor, half.federation.state[key])
        torch.testing.assert_close(half.federation.state[key], tensor, rtol=0.05, atol=1e-4)


def test_a_run_with_half_a_dtype_resumes_to_the_same_bits(make_trainer) -> None:
    settings = {"wire_dtype": "bfloat16", "aggregation": "rolora", "save_rounds": 1, "num_rounds": 4}
    whole = make_trainer("whole", **settings)
    whole.train()
    for first in (1, 2, 3):
        make_trainer(f"half{first}", **(settings | {"num_rounds": first})).train()
        resumed = make_trainer(f"half{first}", **settings)
        resumed.train(resume_from_checkpoint=True)
        for key, tensor in whole.federation.state.items():
            assert torch.equal(tensor, resumed.federation.state[key]), (first, key)


def test_an_objective_that_needs_the_very_update_goes_with_no_rounding(make_trainer) -> None:
    with pytest.raises(
        ValueError, match="scaffold'` draws the same conclusions on both sides .* but DtypeStep changes it"
    ):
        make_trainer("out", wire_dtype="float16", local_objective="scaffold", **SGD)
    with pytest.raises(ValueError, match="`codecs` names 'zip', which there is not"):
        make_trainer("out", codecs={"zip": {}})


@pytest.mark.parametrize("options", ["bfloat16", 16, ["bfloat16"]])
def test_options_of_codecs_that_are_no_dictionary_are_refused(options: object, make_trainer) -> None:
    with pytest.raises(ValueError, match="`codecs` should have the options of 'dtype' as a dictionary"):
        make_trainer("out", codecs={"dtype": options})


def test_a_state_that_cannot_be_sent_is_not_saved(make_trainer, tmp_path) -> None:
    trainer = make_trainer("out", wire_dtype="float16", num_rounds=3, save_rounds=1)
    step = trainer.federation.server.optimizer.step

    def beyond(state, *given):
        far = 1e5 if trainer.federation.server._round == 2 else 0.0
        return {key: tensor + far for key, tensor in step(state, *given).items()}

    trainer.federation.server.optimizer.step = beyond
    with pytest.raises(BrokenStateError, match=r"The new global state cannot be sent: .*It is not saved"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    again = make_trainer("out", wire_dtype="float16", num_rounds=3, save_rounds=1)
    again.train(resume_from_checkpoint=True)
    assert len(again.record["rounds"]) == 3


def test_a_step_of_codecs_is_that_of_the_wire_dtype(make_trainer) -> None:
    trainer = make_trainer("out", codecs={"dtype": {"dtype": "bfloat16", "rounding": "nearest"}})
    trainer.train()
    entry = trainer.record["rounds"][-1]
    assert entry["bytes_up"] < 0.6 * entry["bytes_down"]


@pytest.mark.parametrize(
    "answer", [Reply("client_0", "timeout"), Reply("client_0", "error", reason="it is out of memory")]
)
def test_a_client_that_may_have_taken_over_what_it_did_not_evaluate_is_sent_the_sum(
    answer: Reply, make_trainer
) -> None:
    """The change of a round would be added to its base twice."""

    class Evaluating(InProcess):
        evaluators = ("client_0", "client_1")

        def exchange(self, packets, round, timeout=None):
            yield answer
            yield Reply("client_1", packet=Packet("metrics", {}, {"metrics": {"eval_loss": 1.0}, "num_examples": 2}))

    federation = make_trainer("out", aggregation="fedex_lora").federation
    federation.transport = Evaluating(None)
    federation.host.is_evaluated_at_clients = lambda round: True
    federation.host.enter_evaluation = lambda *measured: None
    visits, base = federation.server.visits, BaseSum(lambda: {"m.left": torch.ones(1, 1), "m.right": torch.ones(1, 1)})
    visits.seen = {"client_0": 3, "client_1": 3}
    base.end_round(3, {})
    federation.evaluate_at_clients(Round(3, 1.0))
    kinds = {client: base.for_client(visits.seen.get(client), 4)[1] for client in ("client_0", "client_1")}
    assert kinds == {"client_0": "sum", "client_1": None}
