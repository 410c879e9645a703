# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The aggregation methods by name: the rule, and what a round has to arrange for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...state.adapter_state import AdapterState
from ...state.factors import FactorPair
from ...state.roles import A_FACTORS, B_FACTORS, TensorRoles
from .base import Aggregator
from .fedavg import FedAvg, FedNova
from .fedex_lora import FedExLoRA, LoRAFair
from .flexlora import FlexLoRA
from .flora import FLoRA
from .hetlora import HetLoRA
from .robust import CoordinateMedian, GeometricMedian, Krum, MultiKrum, NormBounding, TrimmedMean
from .slora import SLoRA


__all__ = ["METHODS", "Method"]


def _check_frozen_factors(state: AdapterState) -> None:
    """Refuse adapters for which FFA-LoRA would train nothing, or not be exact."""
    for key, tensor in state.items():
        if ".scl_delta" in key:
            raise ValueError(
                f"'ffa_lora' is exact because one factor is the same everywhere, but {key} belongs to a second "
                "product, which multiplies the first. Use `variant='compress'` or `train_down_proj='none'`, or "
                "'fedavg'."
            )
        if ".lora_magnitude_vector" in key:
            raise ValueError(
                f"'ffa_lora' is exact because the adapter is linear in `B`, but with {key} (DoRA) the sum of base "
                "weight and product is rescaled. Use plain LoRA, or 'fedavg'."
            )
        if ".lora_" in key and re.search(A_FACTORS, key) and not tensor.any():
            raise ValueError(
                f"'ffa_lora' trains with {key} frozen, but it is zero (PEFT starts the `A` of embeddings so), so "
                "nothing would be trained. Leave embeddings out of `target_modules`, or use 'fedavg'."
            )


def _all_shared(round: int) -> TensorRoles:
    return TensorRoles()


def _ffa_lora(round: int) -> TensorRoles:
    return TensorRoles(frozen=(A_FACTORS,))


def _fedsa_lora(round: int) -> TensorRoles:
    return TensorRoles(shared=(A_FACTORS,), default="local")  # the task head stays with the client as `B` does


def _rolora(round: int) -> TensorRoles:
    return TensorRoles(frozen=(A_FACTORS if round % 2 == 1 else B_FACTORS,))


@dataclass(frozen=True)
class Method:
    """
    An aggregation method.

    Args:
        rule (`type[Aggregator]`):
            The class of the aggregator. It takes the factor pairs first if `uses_pairs`, then the options of its
            class.
        roles (`Callable[[int], TensorRoles]`, *optional*):
            Roles of the tensors as a function of the round (from 1); all are shared if not given.
        uses_pairs (`bool`, *optional*, defaults to `False`):
            Whether the rule combines the factors of [`FactorPair`]s, and so needs an adapter that has them.
        linear (`bool`, *optional*, defaults to `False`):
            Whether the rule is a weighted sum with weights that do not depend on the values: what secure
            aggregation can do.
        adds_to_base (`bool`, *optional*, defaults to `False`):
            Whether the rule has a `base_change`, to be added to the base of the server and of every client.
        restarts (`bool`, *optional*, defaults to `False`):
            Whether the delta starts the adapter afresh: the trained adapter of the round is in the base.
        takes_server_optimizer (`bool`, *optional*, defaults to `True`):
            Whether the delta is a direction to step along. It is not where the rule sets the factors to new values,
            or balances them with its change of the base: half a step of FedEx-LoRA does not go with the whole of
            its residual, and momentum would carry the directions that HetLoRA sets to zero beyond it.
        takes_ranks (`bool`, *optional*, defaults to `False`):
            Whether every client may have a rank of its own.
        takes_layers (`bool`, *optional*, defaults to `False`):
            Whether clients may train different subsets of the layers: the rule has the option `partial`.
        keeps_updates (`bool`, *optional*, defaults to `False`):
            Whether memory grows with the number of clients.
        needs_factors (`bool`, *optional*, defaults to `False`):
            Whether the method is about the two factors of an adapter, although the rule does not combine them.
        needs_pairs (`bool`, *optional*, defaults to `False`):
            Whether it needs them to be a product, although the rule does not combine them: with one factor fixed,
            RoLoRA is exact for what is linear in either; SLoRA replaces both.
        trains_base (`bool`, *optional*, defaults to `False`):
            Whether a stage of it trains base weights.
        check (`Callable[[AdapterState], None]`, *optional*):
            Raises a `ValueError` for an adapter with which the method is not what its name says.
        fresh_optimizer (`str`, *optional*):
            Why the local optimiser has to start afresh in every round, if it has to.
    """

    rule: type[Aggregator]
    roles: Callable[[int], TensorRoles] = _all_shared
    uses_pairs: bool = False
    linear: bool = False
    adds_to_base: bool = False
    restarts: bool = False
    takes_server_optimizer: bool = True
    takes_ranks: bool = False
    takes_layers: bool = False
    keeps_updates: bool = False
    needs_factors: bool = False
    needs_pairs: bool = False
    trains_base: bool = False
    check: Callable[[AdapterState], None] | None = None
    fresh_optimizer: str | None = None

    @property
    def is_mean(self) -> bool:
        """Whether the rule is the plain weighted mean."""
        return self.rule is FedAvg

    @property
    def moves_base(self) -> bool:
        """Whether base weights are other ones in the course of a run: by what is added to them, or trained in them."""
        return self.adds_to_base or self.trains_base

    def build(self, pairs: Sequence[FactorPair] = (), **options: Any) -> Aggregator:
        """The aggregator, for the factor pairs of the adapter and the options of its class."""
        rule: Callable[..., Aggregator] = self.rule
        return rule(pairs, **options) if self.uses_pairs else rule(**options)


METHODS: dict[str, Method] = {
    "fedavg": Method(FedAvg, linear=True, takes_layers=True),
    "fednova": Method(
        FedNova,
        linear=True,
        takes_layers=True,
        fresh_optimizer="its normalisation counts the steps of an optimiser that has started afresh",
    ),
    "ffa_lora": Method(
        FedAvg, _ffa_lora, linear=True, takes_layers=True, needs_factors=True, check=_check_frozen_factors
    ),
    "fedsa_lora": Method(FedAvg, _fedsa_lora, linear=True, takes_layers=True, needs_factors=True),
    "rolora": Method(FedAvg, _rolora, linear=True, takes_layers=True, needs_factors=True, needs_pairs=True),
    "flora": Method(
        FLoRA,
        uses_pairs=True,
        adds_to_base=True,
        restarts=True,
        takes_server_optimizer=False,
        takes_ranks=True,
        takes_layers=True,
        keeps_updates=True,
        fresh_optimizer="clients start from newly drawn factors in every round, which the moments are not of",
    ),
    "fedex_lora": Method(
        FedExLoRA,
        uses_pairs=True,
        adds_to_base=True,
        takes_server_optimizer=False,
        takes_layers=True,
        keeps_updates=True,
    ),
    "flexlora": Method(
        FlexLoRA,
        uses_pairs=True,
        takes_server_optimizer=False,
        takes_ranks=True,
        takes_layers=True,
        keeps_updates=True,
        fresh_optimizer="clients start from newly decomposed factors in every round, which the moments are not of",
    ),
    "hetlora": Method(HetLoRA, uses_pairs=True, takes_server_optimizer=False, takes_ranks=True),
    "lora_fair": Method(
        LoRAFair, uses_pairs=True, takes_server_optimizer=False, takes_layers=True, keeps_updates=True
    ),
    "slora": Method(
        SLoRA,
        linear=True,
        needs_factors=True,
        needs_pairs=True,
        trains_base=True,
        fresh_optimizer="its second stage trains other parameters",
    ),
    "median": Method(CoordinateMedian, keeps_updates=True),
    "trimmed_mean": Method(TrimmedMean, keeps_updates=True),
    "geometric_median": Method(GeometricMedian, keeps_updates=True),
    "krum": Method(Krum, keeps_updates=True),
    "multi_krum": Method(MultiKrum, keeps_updates=True),
    "norm_bounding": Method(NormBounding),
}
"""By the name in the config."""
