# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Clients with small random factors, and what they amount to as dense float64 matrices; uses none of the rules' helpers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from fed_trainer.methods.aggregation import Aggregator, ClientUpdate
from fed_trainer.state.adapter_state import AdapterState
from fed_trainer.state.factors import FactorPair


@dataclass(frozen=True)
class Layer:
    """One adapted layer of the tests."""

    name: str
    d_in: int
    d_out: int
    r: int
    scaling: float
    kind: str = "lora"  # or "federa" (keeps its start) or "scl" (trains the change relative to its start)

    @property
    def keys(self) -> tuple[str, str]:
        prefix = f"base_model.model.{self.name}."
        prefix += "scl" if self.kind == "scl" else "lora"
        return f"{prefix}_A.weight", f"{prefix}_B.weight"

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        return randn((self.r, self.d_in), f"A0 {self.name}"), randn((self.d_out, self.r), f"B0 {self.name}")

    def pair(self) -> FactorPair:
        start = None if self.kind == "lora" else self.start()
        return FactorPair(self.name, *self.keys, self.scaling, start=start, trains_change=self.kind == "scl")

    def factors(self, state: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole factors in float64."""
        A, B = (state[key].double() for key in self.keys)
        if self.kind == "scl":
            A, B = A + self.start()[0].double(), B + self.start()[1].double()
        return A, B

    def change(self, state: AdapterState, scaling: float | None = None) -> torch.Tensor:
        """What an adapter does to the weight of the layer, `(out, in)`."""
        A, B = self.factors(state)
        product = B @ A
        if self.kind != "lora":
            start_A, start_B = self.start()
            product = product - start_B.double() @ start_A.double()
        return (self.scaling if scaling is None else scaling) * product


# not square, ranks that differ; alpha / r with alpha = 3 and r = 2, and rsLoRA with alpha = 8 and r = 3
LORA = (Layer("q_proj", 7, 5, 2, 3 / 2), Layer("mlp.up", 4, 9, 3, 8 / math.sqrt(3)))
FEDERA = tuple(Layer(layer.name, layer.d_in, layer.d_out, layer.r, layer.scaling, "federa") for layer in LORA)
SCL = tuple(Layer(layer.name, layer.d_in, layer.d_out, layer.r, layer.scaling, "scl") for layer in LORA)
HEAD = "base_model.model.classifier.weight"
ADAPTERS = {"lora": LORA, "federa": FEDERA, "scl": SCL}


def randn(shape: tuple[int, ...], seed: str | int) -> torch.Tensor:
    """Normal values that no other seed gives."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def random_state(
    layers: tuple[Layer, ...], seed: str | int, rank: int | None = None, size: float = 1.0
) -> AdapterState:
    state = {HEAD: size * randn((3, 2), f"{seed} head")}
    for layer in layers:
        r = layer.r if rank is None else min(rank, layer.r)
        for key, shape in zip(layer.keys, [(r, layer.d_in), (layer.d_out, r)], strict=True):
            state[key] = size * randn(shape, f"{seed} {key[-9:]} {layer.d_in}")
    return state


def add(state: AdapterState, delta: AdapterState) -> AdapterState:
    assert delta.keys() == state.keys()
    return {key: tensor + delta[key] for key, tensor in state.items()}


def updates_of(
    layers: tuple[Layer, ...], num_examples: list[int] | tuple[int, ...], seed: str | int = 0
) -> list[ClientUpdate]:
    return [ClientUpdate(f"c{i}", n, random_state(layers, f"{seed} {i}")) for i, n in enumerate(num_examples)]


def aggregate(
    rule: Aggregator, state: AdapterState, updates: list[ClientUpdate], round: int = 1
) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    """The new adapter, and the change of the base in float64."""
    rule.begin(state, round)
    for update in updates:
        rule.add(update)
    new = add(state, rule.finish())
    return new, {module: left.double() @ right.double() for module, (left, right) in rule.base_change.items()}


def shares_of(updates: list[ClientUpdate]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def mean_of_changes(layer: Layer, state: AdapterState, updates: list[ClientUpdate]) -> torch.Tensor:
    """`sum_k p_k` of the changes the clients ended with."""
    return sum(
        share * layer.change(add(state, update.delta))
        for share, update in zip(shares_of(updates), updates, strict=True)
    )


def mean_of(key: str, state: AdapterState, updates: list[ClientUpdate]) -> torch.Tensor:
    return sum(
        share * (state[key].double() + update.delta[key].double())
        for share, update in zip(shares_of(updates), updates, strict=True)
    )


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance * max(1, expected.abs().max()))
