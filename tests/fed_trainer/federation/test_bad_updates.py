# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
One client that sends anything at all: it is named and left out, and the round is, bit for bit, the round without it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fed_trainer import FederatedTaskConfig
from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.client.live.facts import model_facts
from fed_trainer.federation.client_settings import ClientSettings
from fed_trainer.federation.packet import Reply
from fed_trainer.federation.plan import Plan
from fed_trainer.federation.server import Server
from fed_trainer.federation.validation import TooFewClientsError
from fed_trainer.methods.aggregation import METHODS, ClientUpdate
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.low_rank import LowRank
from helpers.comparison import same


pytestmark = [
    pytest.mark.filterwarnings("ignore:" + text) for text in ("The PyTorch API of nested", "torch.quantize_per")
]

OPTIONS: dict[str, dict[str, Any]] = {
    "norm_bounding": {"max_norm": 3.0},
    "trimmed_mean": {"trim": 0.2},
    "slora": {"sparse_rounds": 1},
}
SGD = {"optim": "sgd", "max_grad_norm": 0.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "scaffold": {"local_objective": "scaffold", **SGD},
    "feddyn": {"local_objective": "feddyn", "local_objective_kwargs": {"alpha": 0.1}},
    "rank_pruning": {
        "aggregation": "hetlora",
        "local_objective": "rank_pruning",
        "local_objective_kwargs": {"decay": 0.5, "penalty_weight": 0.1},
    },
}
KINDS = {method: {"aggregation": method, "aggregation_kwargs": OPTIONS.get(method)} for method in METHODS}
KINDS |= OBJECTIVES
KINDS |= {f"{method}, ranks": {"aggregation": method} for method, kind in METHODS.items() if kind.takes_ranks}
KINDS |= {"fedadam": {"server_optimizer": "fedadam"}, "fedavgm": {"server_optimizer": "fedavgm"}}
CLIENTS = [f"c{index}" for index in range(6)]
BAD = "c2"
BASE_DIGEST = "0" * 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)


def make_model(dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=["up"], modules_to_save=["norm"]))
    return model.to(dtype)


class Rounds:
    """Three rounds of a server, without training: what clients send is drawn from their names."""

    def __init__(self, kind: str, tmp_path, dtype: torch.dtype = torch.float32) -> None:
        self.model = make_model(dtype)
        live = LiveAdapter(self.model)
        args = FederatedTaskConfig(
            output_dir=str(tmp_path), num_rounds=3, max_steps=4, use_cpu=True, report_to="none", **KINDS[kind]
        )
        own = {CLIENTS[0]: ClientSettings(r=1), BAD: ClientSettings(r=2)} if kind.endswith("ranks") else {}
        self.state = live.read()
        facts = model_facts(args.aggregation, self.model, live, BASE_DIGEST)
        self.server = Server(Plan(args, facts, self.state, own, len(CLIENTS), len(CLIENTS)))

    def update(self, client: str, round: int) -> tuple[ClientUpdate, AdapterState]:
        asked = self.server.asked_of(client)
        generator = torch.Generator().manual_seed(100 * round + CLIENTS.index(client))
        delta = {
            key: 0.1 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else torch.ones_like(tensor)
            for key, tensor in asked.items()
        }
        objective = self.server.plan.objective
        sends = {} if objective is None else objective.sends
        extras = {key: torch.ones((), dtype=dtype) for key, dtype in sends.items()}
        update = ClientUpdate(
            client, 3 + CLIENTS.index(client), delta, num_steps=4, base_digest=BASE_DIGEST, extras=extras
        )
        return update, asked

    def play(
        self, spoil: Callable[[ClientUpdate], Any] | None
    ) -> tuple[list[AdapterState], list[Any], dict[str, str]]:
        """
        The states, what went into the base, and who was refused, with a client that spoils its update or sends none.
        """
        states, bases, refused = [], [], {}
        for round in (1, 2, 3):
            self.server.begin(self.state, round, CLIENTS)
            for client in CLIENTS:
                update, asked = self.update(client, round)
                if client != BAD:
                    assert self.server.take(update, asked) is None
                elif spoil is not None:
                    self.server.take(spoil(update), asked)
                else:
                    self.server._faulty.add(client)  # as if it had been refused
            refused |= self.server.refused
            self.state, base = self.server.finish()
            states.append(self.state)
            bases.append(base)
        return states, bases, refused


def every(change: Callable[[torch.Tensor], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: dataclasses.replace(
        update, delta={key: change(tensor) for key, tensor in update.delta.items()}
    )


def one(change: Callable[[torch.Tensor], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    def spoil(update: ClientUpdate) -> ClientUpdate:
        key = next(key for key, tensor in update.delta.items() if tensor.dim() == 2 or "norm" in key)
        return dataclasses.replace(update, delta=update.delta | {key: change(update.delta[key])})

    return spoil


def with_field(name: str, value: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: dataclasses.replace(update, **{name: value})


class Strange(torch.Tensor):
    pass


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    return freed


def placed(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        spoiled = tensor.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    return change


UNUSABLE: dict[str, Callable[[ClientUpdate], Any]] = {
    "nothing": lambda update: None,
    "no update": lambda update: {"client": BAD},
    "unknown client": with_field("client", "mallory"),
    "name that is none": with_field("client", ["c0"]),
    "taken client": with_field("client", "c0"),
    "no delta": with_field("delta", None),
    "list of tensors": lambda update: dataclasses.replace(update, delta=list(update.delta.values())),
    "numbers as names": lambda update: dataclasses.replace(update, delta=dict(enumerate(update.delta.values()))),
    "mixed names": lambda update: dataclasses.replace(update, delta=update.delta | {3: torch.ones(1), None: 1}),
    "more names": lambda update: dataclasses.replace(update, delta=update.delta | {"\ud800": torch.ones(1)}),
    "fewer names": lambda update: dataclasses.replace(update, delta=dict(list(update.delta.items())[1:])),
    "lists": every(torch.Tensor.tolist),
    "none": one(lambda tensor: None),
    "arrays": every(torch.Tensor.numpy),
    "subclass": every(lambda tensor: tensor.as_subclass(Strange)),
    "sparse": one(torch.Tensor.to_sparse),
    "meta": every(lambda tensor: tensor.to("meta")),
    "nested": one(lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1), tensor.reshape(-1)])),
    "jagged": one(
        lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1), tensor.reshape(-1)], layout=torch.jagged)
    ),
    "complex": every(lambda tensor: tensor.to(torch.complex64)),
    "quantised": one(lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)),
    "boolean": every(lambda tensor: tensor > 0),
    "int8": one(lambda tensor: tensor.to(torch.int8)),
    "float8": one(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "float64": one(torch.Tensor.double),
    "without memory": one(without_memory),
    "empty": one(lambda tensor: tensor[:0]),
    "flat": one(lambda tensor: torch.cat([tensor.reshape(-1), tensor.reshape(-1)])),
    "broadcast": one(lambda tensor: tensor.reshape(-1)[:1]),
    "nan": one(placed(math.nan)),
    "infinite": one(placed(-math.inf)),
    "38": one(placed(3e38)),
    "-38": one(placed(-1e38)),
    "1e20": one(placed(1e20)),
    "no examples": with_field("num_examples", 0),
    "boolean examples": with_field("num_examples", True),
    "examples in words": with_field("num_examples", "many"),
    "nan examples": with_field("num_examples", math.nan),
    "examples without end": with_field("num_examples", 10**5000),
    "steps without end": with_field("num_steps", 2**60),
    "more steps than allowed": with_field("num_steps", 5),
    "steps as a tensor": with_field("num_steps", torch.tensor(4)),
    "scalings as a list": with_field("scalings", [1.0]),
    "scalings in words": with_field("scalings", {"up": "1"}),
    "scalings that are none": with_field("scalings", {"up": math.nan}),
    "digest that is a number": with_field("base_digest", 7),
    "another digest": with_field("base_digest", "1" * 64),
    "extras as a list": with_field("extras", [1]),
    "extras that nobody asked for": with_field("extras", {"more": torch.ones(())}),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """By kind what the rounds give without the bad client."""
    played: dict[str, Any] = {}

    def of(kind: str):
        if kind not in played:
            played[kind] = Rounds(kind, tmp_path_factory.mktemp("honest")).play(None)
        return played[kind]

    return of


def same_bases(left: list[dict[str, LowRank]], right: list[dict[str, LowRank]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.fast(
    "fedavg",
    "fedsa_lora",
    "flora",
    "fedex_lora",
    "hetlora, ranks",
    "slora",
    "median",
    "krum",
    "norm_bounding",
    "scaffold",
    "fedadam",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_sends_what_cannot_be_used_changes_nothing(kind: str, honest, tmp_path) -> None:
    states, bases, _ = honest(kind)
    for name, spoil in UNUSABLE.items():
        rounds = Rounds(kind, tmp_path)
        spoiled_states, spoiled_bases, refused = rounds.play(named_or_missing(name, spoil, rounds))
        assert len(refused) == 1 and next(iter(refused.values())), name
        assert all(same(left, right) for left, right in zip(spoiled_states, states, strict=True)), name
        assert same_bases(spoiled_bases, bases), name


def named_or_missing(name: str, spoil: Callable[[ClientUpdate], Any], rounds: Rounds) -> Callable[[ClientUpdate], Any]:
    """
    An update under no name, or another one's, is not the bad client's own: for the rules it then has sent nothing
    usable.
    """

    def spoiled(update: ClientUpdate) -> Any:
        rounds.server._faulty.add(BAD)
        return spoil(update)

    return spoiled


ODD = {
    "part of a graph": every(lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor),
    "result of a graph": every(
        lambda tensor: tensor * torch.ones((), requires_grad=True) if tensor.is_floating_point() else tensor
    ),
    "parameters": every(lambda tensor: nn.Parameter(tensor) if tensor.is_floating_point() else tensor),
    "not contiguous": every(lambda t: t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], dim=-1)[..., 0]),
    "views": every(lambda tensor: torch.cat([tensor.reshape(-1)] * 2)[tensor.numel() :].view(tensor.shape)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_odd_but_right_count_as_plain_ones(kind: str, tmp_path) -> None:
    states, bases, refused = Rounds(kind, tmp_path).play(lambda update: update)
    assert not refused
    for name, spoil in ODD.items():
        odd_states, odd_bases, refused = Rounds(kind, tmp_path).play(spoil)
        assert not refused, name
        assert all(same(left, right) for left, right in zip(odd_states, states, strict=True)), name
        assert same_bases(odd_bases, bases), name
        assert not any(tensor.requires_grad for state in odd_states for tensor in state.values()), name


def filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full_like(tensor, value, dtype=torch.float32) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_values_are_refused_or_what_comes_of_them_is_finite(kind: str, dtype: torch.dtype, tmp_path) -> None:
    for exponent in (0, 3, 6, 8, 12, 14, 38):
        rounds = Rounds(kind, tmp_path, dtype)
        states, bases, refused = rounds.play(every(functools.partial(filled, value=10.0**exponent)))
        assert all(torch.isfinite(tensor).all() for state in states for tensor in state.values()), exponent
        weight = rounds.model.get_base_model().up.get_base_layer().weight
        for base in bases:
            for left, right in base.values():
                assert torch.isfinite((weight.float() + left @ right).to(dtype)).all(), exponent
        assert not refused or exponent > 0, "an update of ordinary size was refused"
        if exponent >= 16 or (exponent >= 8 and kind != "norm_bounding"):
            assert BAD in refused, exponent


@pytest.mark.parametrize(
    "kind, extras",
    [
        ("scaffold", {}),
        ("scaffold", {"sum_of_lrs": 1.0}),
        ("scaffold", {"sum_of_lrs": torch.ones((), dtype=torch.float64)}),
        ("scaffold", {"sum_of_lrs": torch.ones(2)}),
        ("scaffold", {"sum_of_lrs": torch.zeros(())}),
        ("scaffold", {"sum_of_lrs": torch.tensor(-1.0)}),
        ("scaffold", {"sum_of_lrs": torch.tensor(math.nan)}),
        ("scaffold", {"sum_of_lrs": torch.tensor(1e-38)}),
        ("rank_pruning", {"rank": torch.tensor(0)}),
        ("rank_pruning", {"rank": torch.tensor(4)}),
        ("rank_pruning", {"rank": torch.tensor(2.0, dtype=torch.float64)}),
    ],
)
def test_numbers_beside_the_update_are_checked_too(kind: str, extras: Any, honest, tmp_path) -> None:
    states, _, _ = honest(kind)
    spoiled, _, refused = Rounds(kind, tmp_path).play(with_field("extras", extras))
    assert refused.keys() == {BAD}
    assert all(same(left, right) for left, right in zip(spoiled, states, strict=True))


@pytest.mark.parametrize("kind", ["krum", "multi_krum", "trimmed_mean"])
def test_a_refused_client_is_one_of_those_that_a_robust_rule_bears(kind: str, tmp_path, monkeypatch) -> None:
    """A round of the least number of clients goes on without the bad one; without an honest one it does not."""
    monkeypatch.setattr(f"{__name__}.CLIENTS", CLIENTS[:5])
    states, _, refused = Rounds(kind, tmp_path).play(with_field("delta", None))
    assert refused.keys() == {BAD} and len(states) == 3

    rounds = Rounds(kind, tmp_path)
    rounds.server.begin(rounds.state, 1, CLIENTS)
    for client in CLIENTS[1:]:
        rounds.server.take(*rounds.update(client, 1))
    rounds.server.receive(
        Reply(CLIENTS[0], "timeout", reason="it was late")
    )  # so all that are to be borne may be among the others
    with pytest.raises(TooFewClientsError):
        rounds.server.finish()


@settings(max_examples=40)
@given(
    st.sampled_from(["client", "num_examples", "delta", "num_steps", "scalings", "base_digest", "extras"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner),
        max_leaves=5,
    ),
)
def test_whatever_stands_in_a_field_nothing_is_raised(tmp_path_factory, field: str, value: Any) -> None:
    rounds = Rounds("fednova", tmp_path_factory.mktemp("fuzz"))
    rounds.server.begin(rounds.state, 1, CLIENTS)
    update, asked = rounds.update(BAD, 1)
    reason = rounds.server.take(dataclasses.replace(update, **{field: value}), asked)
    assert reason is None or (isinstance(reason, str) and len(reason) < 500)
    for client in ("c0", "c1"):
        rounds.server.take(*rounds.update(client, 1))
    state, _ = rounds.server.finish()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
