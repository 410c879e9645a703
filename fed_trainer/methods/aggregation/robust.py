# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rules that bear a number of arbitrary, finite updates. All but [`NormBounding`] compare clients, so they keep every
update of the round: memory is the number of clients times the adapter, in the dtype it was sent in, plus blocks of
a fixed size.

Updates are compared as they travel, integer buffers (counts of batches) aside. For LoRA that means factor by factor,
of which the caution about means of factors holds too. Only [`NormBounding`] and [`GeometricMedian`] look at numbers of
examples or tokens, which a client could lie about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...state.adapter_state import AdapterState
from ...state.checks import check_integer, check_number
from ...state.low_rank import LowRank
from .base import Aggregator, ClientUpdate, check_tensors, check_weights, numbers_of, weight_of
from .fedavg import FedAvg
from .limits import LARGEST_VALUE


__all__ = ["CoordinateMedian", "GeometricMedian", "Krum", "MultiKrum", "NormBounding", "TrimmedMean"]

BLOCK = 2**22  # values of all clients together that are compared at once
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


class _KeepingAggregator(Aggregator):
    """
    Keeps the updates of the round, to be compared in `finish`.

    A client that was refused for what it sent is one of those that a rule is meant to bear, and already left out.
    """

    _num_faulty = 0  # of the round

    @property
    def numbers(self) -> tuple[str, ...]:
        return ()

    def begin(self, state: AdapterState, round: int = 1) -> None:
        self._state = state
        self._updates: list[ClientUpdate] = []
        self._num_faulty = 0

    def check(self, update: ClientUpdate) -> None:
        check_tensors(update, self._state)

    def add(self, update: ClientUpdate) -> None:
        self.check(update)
        self._updates.append(update)

    def bear(self, num_faulty: int) -> None:
        self._num_faulty = num_faulty

    @torch.no_grad()
    def finish(self) -> AdapterState:
        if not self._updates:
            raise ValueError("No client update arrived in this round, so there is nothing to aggregate.")
        updates = sorted(self._updates, key=lambda update: update.client)  # ties do not depend on the order of arrival
        self._updates = []
        return self._combine(updates)

    def _combine(self, updates: list[ClientUpdate]) -> AdapterState:
        raise NotImplementedError

    def _by_coordinate(self, updates: list[ClientUpdate]) -> AdapterState:
        result = {key: torch.empty_like(tensor, dtype=torch.float32) for key, tensor in self._state.items()}
        for key, block, values in _blocks(updates, self._state):
            result[key].view(-1)[block] = self._combine_sorted(values.sort(dim=0).values).float()
        return result

    def _combine_sorted(self, values: torch.Tensor) -> torch.Tensor:
        """From `(clients, coordinates)`, each coordinate in ascending order, to `(coordinates,)`."""
        raise NotImplementedError


def _measured(state: AdapterState) -> AdapterState:
    """What norms and distances are over: not integer buffers, whose counts of batches would outweigh all else."""
    return {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}


def _blocks(updates: list[ClientUpdate], state: AdapterState) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """The updates as float64 matrices `(clients, coordinates)`, a block of coordinates at a time."""
    for key, tensor in state.items():
        flat = [update.delta[key].reshape(-1) for update in updates]
        size = max(1, BLOCK // len(updates))
        for first in range(0, tensor.numel(), size):
            block = slice(first, first + size)
            yield key, block, torch.stack([values[block].double() for values in flat])


class CoordinateMedian(_KeepingAggregator):
    """
    Median of every coordinate over clients (Yin et al., 2018, https://huggingface.co/papers/1803.01498); the mean
    of the middle two for an even number. Numbers of examples do not count.
    """

    def _combine(self, updates: list[ClientUpdate]) -> AdapterState:
        return self._by_coordinate(updates)

    def _combine_sorted(self, values: torch.Tensor) -> torch.Tensor:
        return _median(values)


def _median(values: torch.Tensor) -> torch.Tensor:
    """Of sorted values; `torch.median` would give the lower of the middle two."""
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


class TrimmedMean(_KeepingAggregator):
    """
    Mean of every coordinate over clients without its `floor(trim K)` smallest and as many largest values (Yin et
    al., 2018, https://huggingface.co/papers/1803.01498). Numbers of examples do not count.

    Args:
        trim (`float`, *optional*, defaults to `0.1`):
            Share dropped at either end, below 0.5.
    """

    def __init__(self, trim: float = 0.1) -> None:
        check_number("trim", trim, lambda value: 0 <= value < 0.5, "in [0, 0.5)")
        self.trim = trim

    @property
    def min_updates(self) -> int:
        """`ceil(1 / trim)`, so that one update is dropped at either end; clients that were refused count."""
        return max(1, math.ceil(1 / self.trim - ROUNDING) - self._num_faulty) if self.trim > 0 else 1

    def _combine(self, updates: list[ClientUpdate]) -> AdapterState:
        if len(updates) < self.min_updates:
            raise ValueError(
                f"`trim={self.trim}` of {len(updates)} clients is less than one, so the mean would not be trimmed "
                f"at all. Sample at least {self.min_updates} clients, or raise `trim`."
            )
        return self._by_coordinate(updates)

    def _combine_sorted(self, values: torch.Tensor) -> torch.Tensor:
        faulty = self._num_faulty
        dropped = min((len(values) - 1) // 2, math.floor(self.trim * (len(values) + faulty) + ROUNDING))
        return values[dropped : len(values) - dropped].mean(dim=0)


class GeometricMedian(_KeepingAggregator):
    """
    The point with the least sum of weighted distances to the updates, `argmin_v sum_k p_k ||v - Delta_k||`, by the
    smoothed Weiszfeld iteration of RFA (Pillutla et al., 2019, https://huggingface.co/papers/1912.13445), over all
    tensors together, in float64. It starts from the median of the coordinates, which an outlier of any size does
    not move far.

    Args:
        smoothing (`float`, *optional*, defaults to `1e-6`):
            Distances below it count as this.
        tolerance (`float`, *optional*, defaults to `1e-6`):
            Stop when the weights change by less than this.
        max_iterations (`int`, *optional*, defaults to `100`):
            Stop then at the latest; each passes over all updates once.
        weights (`str`, *optional*, defaults to `"examples"`):
            As in [`FedAvg`]: `p_k` is the client's share of them.
    """

    def __init__(
        self,
        smoothing: float = 1e-6,
        tolerance: float = 1e-6,
        max_iterations: int = 100,
        weights: str = "examples",
    ) -> None:
        check_weights(weights)
        check_number("smoothing", smoothing, lambda value: value > 0, "positive and finite")
        check_number("tolerance", tolerance, lambda value: value >= 0, "0 or more")
        check_integer("max_iterations", max_iterations, least=1)
        self.smoothing = smoothing
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.weights = weights

    def check(self, update: ClientUpdate) -> None:
        super().check(update)
        weight_of(update, self.weights)  # refuses one that does not say it

    @property
    def numbers(self) -> tuple[str, ...]:
        return numbers_of(self.weights)

    def _combine(self, updates: list[ClientUpdate]) -> AdapterState:
        shares = torch.tensor([weight_of(update, self.weights) for update in updates], dtype=torch.float64)
        if shares.sum() == 0:
            raise ValueError("No client update with examples arrived in this round, so there is nothing to weight by.")
        shares = shares / shares.sum()
        squared = torch.zeros_like(shares)
        for _, _, values in _blocks(updates, _measured(self._state)):
            squared += (values - _median(values.sort(dim=0).values)).square().sum(dim=1)
        weights = self._weights(shares, squared)
        for _ in range(self.max_iterations):
            squared = torch.zeros_like(shares)
            for _, _, values in _blocks(updates, _measured(self._state)):
                squared += (values - weights @ values).square().sum(dim=1)
            previous, weights = weights, self._weights(shares, squared)
            if (weights - previous).abs().max() <= self.tolerance:
                break
        result = {key: torch.empty_like(tensor, dtype=torch.float32) for key, tensor in self._state.items()}
        for key, block, values in _blocks(updates, self._state):
            result[key].view(-1)[block] = (weights @ values).float()
        return result

    def _weights(self, shares: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        weights = shares / squared.sqrt().clamp(min=self.smoothing)
        return weights / weights.sum()


class MultiKrum(_KeepingAggregator):
    """
    Mean of the `num_selected` updates that are closest to their neighbours (Blanchard et al., 2017,
    https://huggingface.co/papers/1703.02757). The score of an update is the sum of its squared distances to its
    `K - f - 2` nearest others, over all tensors together, from differences in float64. Numbers of examples do not
    count.

    Args:
        num_byzantine (`int`):
            `f`, the number of arbitrary clients to bear; a round needs `2 f + 3` updates.
        num_selected (`int`, *optional*):
            Updates to average, `K - f` of the round if not given.
    """

    def __init__(self, num_byzantine: int = 1, num_selected: int | None = None) -> None:
        check_integer("num_byzantine", num_byzantine, least=0)
        check_integer("num_selected", num_selected, least=1, optional=True)
        self.num_byzantine = num_byzantine
        self.num_selected = num_selected

    @property
    def min_updates(self) -> int:
        """`2 f + 3`, and enough to select from without the arbitrary ones; `f` without those that were refused."""
        return max(2 * self._num_bad + 3, (self.num_selected or 1) + self._num_bad)

    @property
    def _num_bad(self) -> int:
        """`f` among the updates of the round."""
        return max(0, self.num_byzantine - self._num_faulty)

    def _combine(self, updates: list[ClientUpdate]) -> AdapterState:
        count, bad = len(updates), self._num_bad
        if count < 2 * bad + 3:
            raise ValueError(
                f"Krum needs at least 2 f + 3 = {2 * bad + 3} updates to bear f = {bad} arbitrary clients, but "
                f"{count} arrived. Sample more clients, or lower `num_byzantine`."
            )
        num_selected = count - bad if self.num_selected is None else self.num_selected
        if num_selected > count - bad:
            raise ValueError(
                f"`num_selected={num_selected}` of {count} updates would have to include some of the {bad} "
                f"arbitrary ones. Select at most {count - bad}."
            )
        squared = torch.zeros(count, count, dtype=torch.float64)
        for _, _, values in _blocks(updates, _measured(self._state)):
            # not by Grams, in whose rounding the distances of close updates drown when these are far from zero
            squared += torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
        squared.fill_diagonal_(math.inf)
        scores = squared.sort(dim=1).values[:, : count - bad - 2].sum(dim=1)
        selected = scores.argsort(stable=True)[:num_selected].tolist()
        mean = FedAvg()
        mean.begin(self._state)
        for index in selected:
            mean._add(updates[index], 1)
        return mean.finish()


class Krum(MultiKrum):
    """
    The one update that is closest to its neighbours; see [`MultiKrum`].

    Args:
        num_byzantine (`int`):
            `f`, the number of arbitrary clients to bear; a round needs `2 f + 3` updates.
    """

    def __init__(self, num_byzantine: int = 1) -> None:
        super().__init__(num_byzantine, num_selected=1)


class NormBounding(Aggregator):
    """
    Scales an update down to the norm `max_norm` over all its tensors together, if it is longer, and passes it on
    (Sun et al., 2019, https://huggingface.co/papers/1911.07963). Streaming.

    Args:
        max_norm (`float`):
            Bound on the Euclidean norm of an update.
        aggregator ([`Aggregator`], *optional*):
            The rule that gets the bounded updates, FedAvg if not given.
        weights (`str`, *optional*, defaults to `"examples"`):
            Those of that FedAvg.
    """

    def __init__(self, max_norm: float, aggregator: Aggregator | None = None, weights: str = "examples") -> None:
        check_number("max_norm", max_norm, lambda value: value > 0, "positive and finite")
        if aggregator is not None and not isinstance(aggregator, Aggregator):
            raise ValueError(
                f"`aggregator` should be an Aggregator, such as `FedAvg()`, but the value passed is {aggregator!r}"
            )
        self.max_norm = max_norm
        self.weights = weights
        self.aggregator = aggregator or FedAvg(weights=weights)

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.aggregator.numbers

    def check(self, update: ClientUpdate) -> None:
        self.aggregator.check(update)

    def largest_value(self, state: AdapterState) -> float:
        """Any that has a norm in float64: the rule scales it down."""
        return LARGEST_VALUE

    def bear(self, num_faulty: int) -> None:
        self.aggregator.bear(num_faulty)

    @property
    def min_updates(self) -> int:
        """That of the rule that gets the bounded updates."""
        return self.aggregator.min_updates

    def begin(self, state: AdapterState, round: int = 1) -> None:
        self._keys = _measured(state).keys()
        self.aggregator.begin(state, round)

    @torch.no_grad()
    def add(self, update: ClientUpdate) -> None:
        bounded = {key: tensor for key, tensor in update.delta.items() if key in self._keys}
        norm = math.hypot(*(float(tensor.double().norm()) for tensor in bounded.values()))
        if norm > self.max_norm:
            delta = {key: tensor.float() * (self.max_norm / norm) for key, tensor in bounded.items()}
            update = replace(update, delta=update.delta | delta)
        self.aggregator.add(update)

    def finish(self) -> AdapterState:
        return self.aggregator.finish()

    @property
    def base_change(self) -> dict[str, LowRank]:
        return self.aggregator.base_change

    def state_dict(self) -> AdapterState:
        return self.aggregator.state_dict()

    def load_state_dict(self, state: AdapterState) -> None:
        self.aggregator.load_state_dict(state)
