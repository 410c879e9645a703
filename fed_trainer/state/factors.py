# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Two tensors of an adapter that are the factors of a product, and what their product does to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .adapter_state import AdapterState
from .checks import check_integer
from .low_rank import LowRank


__all__ = ["FactorPair", "check_foldable", "refuse_start", "truncate_ranks"]


@dataclass(frozen=True, eq=False)
class FactorPair:
    """
    Two tensors of an adapter whose product changes a linear map of the base model.

    With the whole factors `A (r, in)` and `B (out, r)`, the map `W (out, in)` becomes `W + scaling (B A - B0 A0)`.
    For LoRA the whole factors are the tensors themselves and `B0 A0` is zero. FeDeRA keeps the start as constants
    and trains the whole factors. SCL `compress` with a kept residual trains the changes `A - A0`, `B - B0`. Two
    pairs of SCL stand elsewhere: the product of a bottleneck is in front of `W`, `W (I + scaling B A)`, and without
    a residual it is in the place of `W`.

    The start is constant, so it cancels in every difference of clients: the mean of the clients' changes is the
    change by the mean of their products, and the residual of FedEx-LoRA is the same for `A` as for `A - A0`.

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
        """
        `B A - B0 A0` from the whole factors, as `(B - B0) A + B0 (A - A0)`, in which large products do not cancel.
        """
        if self.start is None:
            return LowRank(B, A)
        start_A, start_B = (tensor.to("cpu", torch.float32) for tensor in self.start)
        return LowRank(torch.cat([B - start_B, start_B], dim=1), torch.cat([A, A - start_A]))

    def stored(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors of the adapter from the whole factors."""
        if self.start is None or not self.trains_change:
            return A, B
        return A - self.start[0].to("cpu", torch.float32), B - self.start[1].to("cpu", torch.float32)


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
            Keep the shapes, with zeros for what is left out. With both factors zero there, those directions have no
            gradient, so that one live model of the full rank can train clients of any.

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
        A, B = A[:rank], rescaled(B[:, :rank], ratio)
        if pad:
            missing = len(state[pair.key_A]) - len(A)
            A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
        sent[pair.key_A], sent[pair.key_B] = (factor.clone(memory_format=torch.contiguous_format) for factor in (A, B))
    return sent


def rescaled(B: torch.Tensor, ratio: float) -> torch.Tensor:
    """In the dtype of `B`, so that the server knows what a client in bfloat16 started from."""
    return B if ratio == 1 else B * ratio


def refuse_start(pair: FactorPair, what: str) -> None:
    """Refuse a pair that is relative to the principal part of the base weight."""
    if pair.start is not None:
        raise ValueError(
            f"The factors of {pair.module} start from the principal part of the base weight, which the model "
            f"subtracts again, so they cannot be {what}: the part that is subtracted would have to be cut too. "
            "Give all clients one rank, or use LoRA."
        )
