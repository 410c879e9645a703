# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from peft.utils import quantization_extra_repr
from torch import nn

from ..access import is_at_hand
from .config import SclConfig
from .fused import changed_linear, is_fusable
from .layer import SclLayer


__all__ = ["Linear"]


class Linear(nn.Module, SclLayer):
    """SCL around a down projection: `nn.Linear`, transformers' `Conv1D`, or a quantised linear layer PEFT knows."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SclConfig, **kwargs: Any) -> None:
        super().__init__()
        SclLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.scl_A]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and not args and not kwargs and self._is_fusable(active[0], x):
            return self._forward_fused(active[0], x)
        if self._is_narrow(active, x):
            return self._forward_narrow(active, x, *args, **kwargs)

        hidden = x
        for name in active:
            if self.variant[name] == "bottleneck":
                hidden = hidden + self._branch(name, x)

        replacing = [name for name in active if self.replaces(name)]
        if len(replacing) == 1:
            # The replaced down projection is not computed at all, which is the point of this variant. Its bias comes
            # from its own forward, so that hooks (offloading, ZeRO-3) and quantised layers see the call they expect.
            result = self._branch(replacing[0], hidden)
            if self.bias is not None:
                result = result + self.base_layer(hidden.new_zeros(1, self.in_features))
        else:
            result = self.base_layer(hidden, *args, **kwargs)
            if replacing:  # several replacements add up as the changes `B A - W`, as merging them does
                bias = 0 if self.bias is None else self.base_layer(hidden.new_zeros(1, self.in_features))
                result = (1 - len(replacing)) * result + len(replacing) * bias
                for name in replacing:
                    result = result + self._branch(name, hidden)

        for name in active:
            if name in self.scl_start_A:
                result = result + self._change(name, hidden)
            elif name in self.scl_delta:
                result = result + _linear(self.scl_delta[name], hidden)
            elif name in self.scl_delta_A:
                result = result + _linear(self.scl_delta_B[name], _linear(self.scl_delta_A[name], hidden))
        return result

    def _change(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """
        `scaling ((B0 + B) act((A0 + A) x) - B0 act(A0 x))`: what a compression has become, less what it was at the
        start.

        Computed as `scaling (B act((A0 + A) x) + B0 (act((A0 + A) x) - act(A0 x)))`: exactly zero at the start, and
        small changes are not lost in the rounding of large numbers.
        """
        down, up, scaling = self.scl_A[name], self.scl_B[name], self.scaling[name]
        start_down, start_up = self.scl_start_A[name].to(x.dtype), self.scl_start_B[name].to(x.dtype)
        x = self.scl_dropout[name](x)
        at_hand = is_at_hand(down) and is_at_hand(up)
        if at_hand:  # one pass over the wide `x` for both
            weight = torch.cat([start_down, down.weight.to(x.dtype)])
            start_code, moved = nn.functional.linear(x, weight).chunk(2, dim=-1)
            moved = moved if down.bias is None else moved + down.bias.to(moved.dtype)
        else:
            start_code, moved = nn.functional.linear(x, start_down), _linear(down, x)
        code, dtype = start_code + moved, moved.dtype
        if self.activation[name] != "linear":
            precise = torch.promote_types(dtype, torch.float32)  # two numbers that are close; the codes are thin
            # laid out alike, because the rounding of an activation depends on it
            start_code = start_code.to(precise, memory_format=torch.contiguous_format, copy=True)
            code = self.activation_fn[name](start_code + moved.to(precise))
            moved = (code - self.activation_fn[name](start_code)).to(dtype)
            code = code.to(dtype)
        if not at_hand:
            return scaling * (_linear(up, code) + nn.functional.linear(moved, start_up))
        spread = scaling * torch.cat([up.weight.to(x.dtype), start_up], dim=1)
        bias = None if up.bias is None else (scaling * up.bias).to(x.dtype)
        return nn.functional.linear(torch.cat([code, moved], dim=-1), spread, bias)

    def _is_fusable(self, name: str, x: torch.Tensor) -> bool:
        """Whether `_forward_fused` applies: a linear `_change` of a base layer that is nothing but a matrix."""
        down, up, dropout = self.scl_A[name], self.scl_B[name], self.scl_dropout[name]
        return (
            name in self.scl_start_A
            and self.activation[name] == "linear"
            and down.bias is None
            and not (isinstance(dropout, nn.Dropout) and dropout.training)
            and is_at_hand(down)
            and is_at_hand(up)
            and is_at_hand(self.base_layer)
            and is_fusable(self.base_layer, x)
        )

    def _forward_fused(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The base layer and the linear `_change` at once."""
        base_layer: Any = self.base_layer
        scaling, dtype = self.scaling[name], x.dtype
        return changed_linear(
            x,
            base_layer.weight,
            base_layer.bias,
            self.scl_start_A[name].to(dtype),
            (scaling * self.scl_start_B[name]).to(dtype),
            self.scl_A[name].weight.to(dtype),
            (scaling * self.scl_B[name].weight).to(dtype),
        )

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B act(A x)`, in the dtype of `x`."""
        code = self.activation_fn[name](_linear(self.scl_A[name], self.scl_dropout[name](x)))
        output = _linear(self.scl_B[name], code)
        return output if self.scaling[name] == 1 else output * self.scaling[name]

    def _is_narrow(self, names: list[str], x: torch.Tensor) -> bool:
        """Whether `_forward_narrow` applies to these adapters and pays for this input."""
        if any(self.variant[name] != "bottleneck" for name in names):
            return False
        rank = sum(self.r[name] for name in names)
        # the base layer takes `rank` rows more: too many for the one token of a step of generation
        return (
            x.numel() > rank * x.shape[-1]
            and all(is_at_hand(module) for name in names for module in self._maps(name))
            and (self.bias is None or is_at_hand(self.get_base_layer()))
        )

    def _forward_narrow(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        The forward of bottlenecks without a tensor of the FFN width.

        With the codes `z (..., R)` of all bottlenecks and their scaled `B` side by side as `P (m, R)`, the input of
        the down projection is `h' = h + P z`. All that reads `h'` is linear, so it can read `h` and `z` instead:
        `M h' = M h + (M P) z`. That costs a LoRA of rank `R`, and a pass of the `R` columns of `P` through the base
        layer.
        """
        deltas = [name for name in names if name in self.scl_delta_A]
        readers = [*(self.scl_A[name] for name in names), *(self.scl_delta_A[name] for name in deltas)]
        if any(isinstance(self.scl_dropout[name], nn.Dropout) for name in names):
            inputs = [*(self.scl_dropout[name](x) for name in names), *(x for _ in deltas)]
            reads = [_linear(reader, input_) for reader, input_ in zip(readers, inputs, strict=True)]
        else:  # one pass over the wide `x` for all of them
            weight = torch.cat([reader.weight for reader in readers]).to(x.dtype)
            reads = list(nn.functional.linear(x, weight).split([reader.out_features for reader in readers], dim=-1))
            reads = [
                read if reader.bias is None else read + reader.bias.to(read.dtype)
                for reader, read in zip(readers, reads, strict=True)
            ]

        codes, rows = [], []  # `z` and the rows of `P^T`
        for name, read in zip(names, reads, strict=False):
            up, scaling = self.scl_B[name], self.scaling[name]
            codes.append(self.activation_fn[name](read))
            rows.append(up.weight.T if scaling == 1 else scaling * up.weight.T)
            if up.bias is not None:
                codes.append(torch.ones_like(read[..., :1]))
                rows.append(scaling * up.bias[None])
        spread = torch.cat(rows).to(x.dtype)

        result = self.base_layer(x, *args, **kwargs)
        image = self._through_base(spread)  # `(M P)^T`
        for name in names:
            if name in self.scl_delta:
                result = result + _linear(self.scl_delta[name], x)
                image = image + _linear(self.scl_delta[name], spread)
        images = [image]
        for name, read in zip(deltas, reads[len(names) :], strict=True):
            image = image + _linear(self.scl_delta_B[name], _linear(self.scl_delta_A[name], spread))
            codes.append(read)
            images.append(self.scl_delta_B[name].weight.T.to(image.dtype))
        images[0] = image
        return result + torch.cat(codes, dim=-1) @ torch.cat(images)

    def _through_base(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows (n, m)` times the transposed base weight, without the bias: `(n, d)`."""
        if self.bias is None:
            return self.base_layer(rows)
        weight = self.get_base_layer().weight.to(rows.dtype)
        return rows @ weight if self.transposed else nn.functional.linear(rows, weight)

    def _merged_parameters(
        self, original: tuple[torch.Tensor, torch.Tensor | None], names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The `original` weight and bias with `names` folded in: `W' = (W + sum_k change_k) (I + sum_k s_k B_k A_k)`,
        where the change is the delta of a bottleneck, what a compression has become less its start, or
        `s_k B_k A_k - W`.
        """
        base_weight, base_bias = self._values(original[0]), original[1]
        device = self.scl_A[names[0]].weight.device
        dtype = torch.promote_types(base_weight.dtype, torch.float32)
        weight = base_weight.to(device, dtype)
        weight = self._oriented(weight)
        bias = None if base_bias is None else base_bias.to(device, dtype)

        merged = weight.clone()
        shift = torch.zeros(self.in_features, device=device, dtype=dtype)  # of the bottlenecks, in front of the weight
        bottlenecks: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in names:
            down, up = self.scl_A[name], self.scl_B[name]
            down_weight, up_weight = down.weight.to(dtype), self.scaling[name] * up.weight.to(dtype)
            if name in self.scl_delta:
                merged += self.scl_delta[name].weight.to(dtype)
            elif name in self.scl_delta_A:
                merged += self.scl_delta_B[name].weight.to(dtype) @ self.scl_delta_A[name].weight.to(dtype)
            if name in self.scl_start_A:
                start_down = self.scl_start_A[name].to(dtype)
                start_up = self.scaling[name] * self.scl_start_B[name].to(dtype)
                merged += up_weight @ (start_down + down_weight) + start_up @ down_weight
                up_weight = start_up + up_weight
            offset = None
            if down.bias is not None:
                offset = up_weight @ down.bias.to(dtype) + self.scaling[name] * up.bias.to(dtype)
            if self.variant[name] == "bottleneck":
                bottlenecks.append((up_weight, down_weight))
                shift = shift if offset is None else shift + offset
            else:
                if self.replaces(name):
                    merged += up_weight @ down_weight - weight
                bias = bias if offset is None or bias is None else bias + offset
        if bias is not None:
            bias = bias + merged @ shift
        # never form the (m, m) product `B A`: m is the FFN width
        merged = merged + sum((merged @ up_weight) @ down_weight for up_weight, down_weight in bottlenecks)
        merged = merged.T.contiguous() if self.transposed else merged
        # as the base layer is now: the model may have been cast or moved since the first merge
        base_layer = self.get_base_layer()
        like = base_layer.weight if self.quantization_backend is None else base_weight
        return merged.to(like), None if bias is None else bias.to(base_layer.bias)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "scl." + super().__repr__()


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """
    `module(x)` in the dtype of `x`, or of autocast.

    The weights of the adapter are often float32 beside a bfloat16 model. They are small, `x` is as wide as the FFN:
    they are cast, as autocast does, and not `x`.
    """
    if module.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return module(x)
    if not is_at_hand(module):
        return module(x.to(module.weight.dtype)).to(x.dtype)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, module.weight.to(x.dtype), bias)
