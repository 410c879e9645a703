# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tensors of an adapter are the two factors of a product, and what their product does to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from peft_scl import FederaLayer, SclLayer
from peft_scl.linalg import full_precision

from ..adapter_state import AdapterState
from ..options import check_integer
from .base import Aggregator, ClientUpdate, numbers_of, weight_of
from .fedavg import FedAvg
from .limits import LARGEST_FACTOR, ROOM
from .low_rank import LowRank


__all__ = ["FactorAggregator", "FactorPair", "add_to_base", "check_foldable", "factor_pairs", "truncate_ranks"]

BLOCK = 2**22  # entries of a base weight that are in float32 at once
LORA_LAYERS = ("Embedding", "Linear", "Linear4bit", "Linear8bitLt")


@dataclass(frozen=True, eq=False)
class FactorPair:
    """
    Two tensors of an adapter whose product changes a linear map of the base model.

    With the whole factors `A (r, in)` and `B (out, r)`, the map `W (out, in)` becomes `W + scaling (B A - B0 A0)`. For LoRA
    the whole factors are the tensors themselves and `B0 A0` is zero. FeDeRA keeps the start as constants and trains the whole
    factors. SCL `compress` with a kept residual trains the changes `A - A0`, `B - B0`. Two pairs of SCL stand elsewhere: the
    product of a bottleneck is in front of `W`, `W (I + scaling B A)`, and without a residual it is in the place of `W`.

    The start is constant, so it cancels in every difference of clients: the mean of the clients' changes is the change by
    the mean of their products, and the residual of FedEx-LoRA is the same for `A` as for `A - A0`.

    Args:
        module (`str`):
            Name of the module in the base model.
        key_A, key_B (`str`):
            Names of the tensors in the adapter, as PEFT saves them.
        scaling (`float`):
            `lora_alpha / r`, `lora_alpha / sqrt(r)` with rsLoRA, or the `scaling` of SCL.
        start (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            The constants `A0` and `B0`.
        trains_change (`bool`, *optional*, defaults to `False`):
            Whether the tensors are the changes relative to the start.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the base weight is stored as `(in, out)`, as `Conv1D` and `nn.Embedding` do. The factors never are.
        unfoldable (`str`, *optional*):
            Why the product cannot be added to the base weight, if it cannot.
    """

    module: str
    key_A: str
    key_B: str
    scaling: float
    start: tuple[torch.Tensor, torch.Tensor] | None = None
    trains_change: bool = False
    transposed: bool = False
    unfoldable: str | None = None

    def whole(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole factors, in float32, from the tensors of the adapter."""
        if self.start is None or not self.trains_change:
            return A.float(), B.float()
        return A + self.start[0].to("cpu", torch.float32), B + self.start[1].to("cpu", torch.float32)

    def change(self, A: torch.Tensor, B: torch.Tensor) -> LowRank:
        """`B A - B0 A0` from the whole factors, as `(B - B0) A + B0 (A - A0)`, in which large products do not cancel."""
        if self.start is None:
            return LowRank(B, A)
        start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in self.start)
        return LowRank(torch.cat([B - start_B, start_B], dim=1), torch.cat([A, A - start_A]))

    def stored(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of the adapter from the whole factors."""
        if self.start is None or not self.trains_change:
            return A, B
        return A - self.start[0].to("cpu", torch.float32), B - self.start[1].to("cpu", torch.float32)


def factor_pairs(model: PeftModel, adapter_name: str | None = None) -> list[FactorPair]:
    """
    The factor pairs of an adapter: LoRA and FeDeRA on `nn.Linear`, `Conv1D` and `nn.Embedding`, linear SCL.

    Args:
        model ([`~peft.PeftModel`]):
            The live model.
        adapter_name (`str`, *optional*):
            The adapter; the active one if not given.

    Raises:
        ValueError: If the adapter changes some layer in a way that is not the product of two of its tensors. The message
            names the layer and says why.
    """
    name = adapter_name or model.active_adapter
    _refuse_tied_factors(model)
    base: Any = model.get_base_model()
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    pairs = []
    for path, module in base.named_modules():
        if isinstance(module, SclLayer) and name in module.scl_A:
            pair = _scl_pair(path, module, name)
        elif isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            pair = _lora_pair(path, module, name)
        elif isinstance(module, BaseTunerLayer) and not isinstance(
            module, (SclLayer, LoraLayer, TrainableTokensLayer)
        ):
            raise ValueError(
                f"{path} has an adapter of type {type(module).__name__}, which is not described by factor pairs. Aggregate it "
                "with 'fedavg'."
            )
        else:
            continue
        pairs.append(_with_base_facts(pair, module, model, owners))
    if not pairs:
        raise ValueError(
            f"The adapter {name!r} has no pair of low-rank factors, which this aggregation combines. Use a LoRA or an SCL "
            "adapter, or 'fedavg', which takes any."
        )
    return pairs


def _refuse_tied_factors(model: PeftModel) -> None:
    """Refuse LoRA with `ensure_weight_tying` on tied weights: a factor of one module is that of another, transposed."""
    owners: dict[int, str] = {}
    for path, parameter in model.named_parameters():
        if ".lora_" in path and parameter.numel() > 0:
            owner = owners.setdefault(parameter.data_ptr(), path)
            if owner != path:
                raise ValueError(
                    f"{path} is the same memory as {owner} (`ensure_weight_tying`), so the two pairs of factors cannot be set one by "
                    "one. Leave one of the modules out of `target_modules`, or use 'fedavg'."
                )


def _lora_pair(path: str, layer: LoraLayer, name: str) -> FactorPair:
    kind, module = type(layer).__name__, type(layer).__module__
    if not isinstance(layer, FederaLayer) and (kind not in LORA_LAYERS or not module.startswith("peft.tuners.lora.")):
        raise ValueError(
            f"{path} is adapted by {module}.{kind}, whose factors are not known to be two matrices with `change = scaling B A`. "
            "Target linear or embedding layers with plain LoRA, or use 'fedavg'."
        )
    if layer.lora_variant.get(name) is not None or name in layer.lora_magnitude_vector:
        raise ValueError(
            f"{path} has a LoRA variant ({type(layer.lora_variant.get(name)).__name__}), such as DoRA, which rescales the sum of "
            "base weight and product: what it does is not linear in the product, so a mean of products means nothing. Use "
            "plain LoRA, or 'fedavg'."
        )
    if layer.lora_bias[name]:
        raise ValueError(
            f"{path} has `lora_bias=True`: its change of the output is not a product of factors alone. Set `lora_bias=False`, or "
            "use 'fedavg'."
        )
    prefix = f"base_model.model.{path}"
    start = (layer.lora_start_A[name], layer.lora_start_B[name]) if isinstance(layer, FederaLayer) else None
    if isinstance(layer, LoraEmbedding):
        keys = f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
        return FactorPair(path, *keys, layer.scaling[name], start=start, transposed=True)
    transposed = isinstance(layer, LoraLinear) and layer.fan_in_fan_out
    keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    return FactorPair(path, *keys, layer.scaling[name], start=start, transposed=transposed)


def _scl_pair(path: str, layer: SclLayer, name: str) -> FactorPair:
    if layer.activation[name] != "linear":
        raise ValueError(
            f"{path} has the activation {layer.activation[name]!r} between its factors, so it does not compute their product, and "
            "a mean of products means nothing. Train with `activation='linear'`, or use 'fedavg' or 'ffa_lora'."
        )
    if layer.scl_A[name].bias is not None:
        raise ValueError(
            f"{path} has `scl_bias=True`: the bias of `A` is multiplied by `B` too, which a mean of products leaves out. Set "
            "`scl_bias=False`, or use 'fedavg' or 'ffa_lora'."
        )
    if name in layer.scl_delta or name in layer.scl_delta_A:
        raise ValueError(
            f"{path} trains the down projection behind the bottleneck too, and its change is a product of the two. Set "
            "`train_down_proj='none'`, use `variant='compress'`, or 'fedavg'."
        )
    unfoldable = None
    if layer.variant[name] == "bottleneck":
        unfoldable = (
            "its product acts on the input of the down projection, so adding to the base weight is another change"
        )
    elif layer.replaces(name):
        unfoldable = "`keep_residual=False` replaces the base weight, so nothing that is added to it has an effect"
    start = (layer.scl_start_A[name], layer.scl_start_B[name]) if name in layer.scl_start_A else None
    return FactorPair(
        path,
        f"base_model.model.{path}.scl_A.weight",
        f"base_model.model.{path}.scl_B.weight",
        layer.scaling[name],
        start=start,
        trains_change=start is not None,
        transposed=layer.fan_in_fan_out,
        unfoldable=unfoldable,
    )


def _with_base_facts(pair: FactorPair, layer: Any, model: PeftModel, owners: Counter[int]) -> FactorPair:
    base_layer = layer.get_base_layer()
    unfoldable = pair.unfoldable
    if unfoldable is None:
        if resolve_quantization_backend(base_layer, **get_quantization_kwargs(model.get_base_model())) is not None:
            unfoldable = "its base weight is quantised, so a small addition would be rounded away"
        elif base_layer.weight.is_meta:
            unfoldable = "its base weight is offloaded, so there is nothing in memory to add to"
        elif owners[id(base_layer.weight)] > 1:
            unfoldable = "its base weight is tied to another module, which the addition would change too"
    return FactorPair(**{**vars(pair), "unfoldable": unfoldable})


def check_foldable(pairs: Sequence[FactorPair], aggregation: str) -> None:
    """
    Refuse pairs whose products cannot be added to the base weights.

    Raises:
        ValueError: Naming the first such module and the reason.
    """
    for pair in pairs:
        if pair.unfoldable is not None:
            raise ValueError(
                f"{aggregation!r} adds to the base weights, but for {pair.module} {pair.unfoldable}. Use "
                "'fedavg' or 'flexlora', which change the adapter only."
            )


@torch.no_grad()
def add_to_base(
    model: PeftModel,
    base_change: dict[str, LowRank],
    pairs: Sequence[FactorPair],
    originals: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Add what an aggregation has for the base to the base weights, in place, a block of rows at a time.

    The sum is taken in float32, or float64 for a base in float64. A base in bfloat16 or float16 rounds it: changes below half a
    unit in the last place are lost. [`BaseChanges`] adds up several rounds without that loss.

    Args:
        model ([`~peft.PeftModel`]):
            The live model, with its adapters unmerged.
        base_change (`dict[str, LowRank]`):
            `Aggregator.base_change`.
        pairs (`Sequence[FactorPair]`):
            [`factor_pairs`] of the model.
        originals (`dict[str, torch.Tensor]`, *optional*):
            By module the weight to add to; the present base weight if not given.

    Raises:
        ValueError: If a module cannot take an addition.
    """
    by_module = {pair.module: pair for pair in pairs}
    check_foldable([by_module[module] for module in base_change], "base_change")
    base: Any = model.get_base_model()
    for module, (left, right) in base_change.items():
        weight = base.get_submodule(module).get_base_layer().weight
        source = weight if originals is None else originals[module]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left, right = (factor.to(weight.device, dtype) for factor in (left, right))
        if by_module[module].transposed:
            left, right = right.T, left.T
        size = max(1, BLOCK // weight.shape[1])
        with full_precision(weight.device):
            for first in range(0, len(weight), size):
                rows = slice(first, first + size)
                start = source[rows].to(weight.device, dtype)
                weight[rows] = torch.addmm(start, left[rows], right).to(weight.dtype)


def truncate_ranks(
    state: AdapterState,
    pairs: Sequence[FactorPair],
    rank: int,
    scalings: dict[str, float] | None = None,
    pad: bool = False,
) -> AdapterState:
    """
    What a client of a smaller rank is sent: the first `rank` rows of every `A` and columns of every `B`.

    Args:
        state (`dict[str, torch.Tensor]`):
            The global adapter.
        pairs (`Sequence[FactorPair]`):
            Its factor pairs.
        rank (`int`):
            The client's rank. A pair of a smaller rank stays whole.
        scalings (`dict[str, float]`, *optional*):
            The client's scaling by module, if not the server's; `B` is rescaled so that the product does not change.
        pad (`bool`, *optional*, defaults to `False`):
            Keep the shapes, with zeros for what is left out. With both factors zero there, those directions have no gradient,
            so that one live model of the full rank can train clients of any.

    Returns:
        `dict[str, torch.Tensor]`: a new adapter; tensors other than factors are those of `state`.

    Raises:
        ValueError: For a rank below 1, or factors that start from a principal part.
    """
    check_integer("rank", rank, least=1)
    sent = dict(state)
    for pair in pairs:
        A, B = state[pair.key_A], state[pair.key_B]
        ratio = 1.0 if scalings is None else pair.scaling / scalings[pair.module]
        if rank < len(A) or ratio != 1:
            refuse_start(pair, "of another rank or scaling at a client")
        A, B = A[:rank], _rescaled(B[:, :rank], ratio)
        if pad:
            missing = len(state[pair.key_A]) - len(A)
            A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
        sent[pair.key_A], sent[pair.key_B] = (factor.clone(memory_format=torch.contiguous_format) for factor in (A, B))
    return sent


def _rescaled(B: torch.Tensor, ratio: float) -> torch.Tensor:
    """In the dtype of `B`, so that the server knows what a client in bfloat16 started from."""
    return B if ratio == 1 else B * ratio


def refuse_start(pair: FactorPair, what: str) -> None:
    """Refuse a pair that is relative to the principal part of the base weight."""
    if pair.start is not None:
        raise ValueError(
            f"The factors of {pair.module} start from the principal part of the base weight, which the model subtracts again, so "
            f"they cannot be {what}: the part that is subtracted would have to be cut too. Give all clients one rank, or use "
            "LoRA."
        )


class FactorAggregator(Aggregator):
    """
    What the rules for products of factors have in common: the weighted mean of every other tensor, and the client's factors.

    Args:
        pairs (`Sequence[FactorPair]`):
            The factor pairs of the adapter.
        partial (`bool`, *optional*, defaults to `False`):
            Whether a client may lack modules; the rule then is over the clients that have the module.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`].
    """

    def __init__(self, pairs: Sequence[FactorPair], partial: bool = False, weights: str = "examples") -> None:
        self.pairs = list(pairs)
        self.partial = partial
        self.weights = weights
        self._others = FedAvg(partial, weights)
        self._base_change: dict[str, LowRank] = {}

    def begin(self, state: AdapterState, round: int = 1) -> None:
        factors = {key for pair in self.pairs for key in (pair.key_A, pair.key_B)}
        missing = sorted(factors - state.keys())
        if missing:
            raise ValueError(
                f"The rule combines both factors of every pair, but {missing[0]} is not among the shared tensors. Share both."
            )
        self._state = state
        self._round = round
        self._weights = dict.fromkeys((pair.module for pair in self.pairs), 0.0)
        self._base_change = {}
        self._others.begin({key: tensor for key, tensor in state.items() if key not in factors}, round)

    @property
    def numbers(self) -> tuple[str, ...]:
        return numbers_of(self.weights)

    def check(self, update: ClientUpdate) -> None:
        self._checked(update)
        self._weight(update)  # refuses one that does not say it

    def largest_value(self, state: AdapterState) -> float:
        """Also small enough for products of factors, and for sums of them in float32."""
        return min(LARGEST_FACTOR, super().largest_value(state))

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> None:
        pairs = self._checked(update)
        self._others.add(update)
        for pair in pairs:
            self._add_pair(pair, update)
            self._weights[pair.module] += self._weight(update)

    def _weight(self, update: ClientUpdate) -> int:
        return weight_of(update, self.weights)

    def _checked(self, update: ClientUpdate) -> list[FactorPair]:
        """The pairs that the update has, after all of it has been checked."""
        self._others._check(update)
        sent = [
            pair for pair in self.pairs if not self.partial or pair.key_A in update.delta or pair.key_B in update.delta
        ]
        for pair in sent:
            self._check_pair(pair, update)
        return sent

    def _check_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        """Refuse factors that are not there, do not fit the global ones, or have no scaling."""
        for key in (pair.key_A, pair.key_B):
            if key not in update.delta:
                raise ValueError(
                    f"The update of client {update.client!r} lacks the tensor {key}, and the rule combines both factors of a "
                    "pair. Leave the client out of the round, or, if clients train different layers, send both factors of "
                    "those and aggregate with `partial=True`."
                )
        if update.scalings is not None and pair.module not in update.scalings:
            raise ValueError(
                f"The `scalings` of client {update.client!r} lack {pair.module}. Give the scaling of every module, or none if they "
                "are the server's."
            )
        if update.scalings is not None and not 1 / ROOM <= update.scalings[pair.module] / pair.scaling <= ROOM:
            raise ValueError(
                f"The scaling of {pair.module} at client {update.client!r} is {update.scalings[pair.module]!r}, but the server's is "
                f"{pair.scaling!r}: the factors would differ more in size than float32 can bear. Send `lora_alpha / r`."
            )
        delta_A, delta_B = update.delta[pair.key_A], update.delta[pair.key_B]
        A, B = self._state[pair.key_A], self._state[pair.key_B]
        rank = len(delta_A)
        if rank > len(A) or delta_A.shape[1:] != A.shape[1:] or delta_B.shape != (len(B), rank):
            raise ValueError(
                f"The factors of {pair.module} from client {update.client!r} have the shapes {tuple(delta_A.shape)} and "
                f"{tuple(delta_B.shape)}, which do not fit the global {tuple(A.shape)} and {tuple(B.shape)}. The global rank "
                "must be the largest of the clients' ranks."
            )
        if rank != len(A) or self._scaling(pair, update) != pair.scaling:
            refuse_start(pair, "of another rank or scaling at a client")

    def _add_pair(self, pair: FactorPair, update: ClientUpdate) -> None:
        raise NotImplementedError

    def _finish_others(self) -> AdapterState:
        others = self._others._mean()
        if not any(self._weights.values()) and not any(self._others._weights.values()):
            raise ValueError("No client update with examples arrived in this round, so there is nothing to aggregate.")
        return others

    @property
    def base_change(self) -> dict[str, LowRank]:
        return self._base_change

    def _local(self, pair: FactorPair, update: ClientUpdate) -> tuple[torch.Tensor, torch.Tensor, float]:
        """
        The whole factors `A (r_k, in)`, `B (out, r_k)` a client ended with, in float32, and its scaling. It started from
        [`truncate_ranks`] of the global adapter.
        """
        delta_A, delta_B = update.delta[pair.key_A], update.delta[pair.key_B]
        rank, scaling = len(delta_A), self._scaling(pair, update)
        start_A = self._state[pair.key_A][:rank]
        start_B = _rescaled(self._state[pair.key_B][:, :rank], pair.scaling / scaling)
        return *pair.whole(start_A.float() + delta_A, start_B.float() + delta_B), scaling

    @staticmethod
    def _scaling(pair: FactorPair, update: ClientUpdate) -> float:
        return pair.scaling if update.scalings is None else update.scalings[pair.module]


def refuse_other_ranks(pair: FactorPair, update: ClientUpdate, state: AdapterState, aggregation: str) -> None:
    """Refuse a client whose factors are not of the global shape or scaling."""
    same = all(update.delta[key].shape == state[key].shape for key in (pair.key_A, pair.key_B))
    if not same or (update.scalings is not None and update.scalings[pair.module] != pair.scaling):
        raise ValueError(
            f"{aggregation!r} averages the factors themselves, so all clients must have one rank and scaling, but client "
            f"{update.client!r} differs in {pair.module}. Use 'flora', 'flexlora' or 'hetlora', or leave the client out."
        )
