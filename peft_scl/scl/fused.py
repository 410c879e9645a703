# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..access import has_hooks


__all__ = ["changed_linear", "is_fusable"]


def changed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    start_down: torch.Tensor,
    start_up: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    """
    `W x + b + (B0 + B)(A0 + A) x - B0 A0 x`: a frozen linear layer and the change of its principal part, in one
    operation.

    What autograd would do with the two apart, minus three things that cost time and memory at the width of the FFN:
    the sum of the outputs, the sum of the gradients of `x`, and the gradients of the frozen `A0` and `B0`.

    Args:
        x (`torch.Tensor`): Input `(..., m)`.
        weight (`torch.Tensor`): Frozen weight `W (d, m)`.
        bias (`torch.Tensor` or `None`): Frozen bias `b (d,)`.
        start_down (`torch.Tensor`): Frozen `A0 (r, m)`.
        start_up (`torch.Tensor`): Frozen `B0 (d, r)`, scaled.
        down (`torch.Tensor`): Trained `A (r, m)`.
        up (`torch.Tensor`): Trained `B (d, r)`, scaled.

    Returns:
        `torch.Tensor`: `(..., d)`. All tensors have the same floating dtype and device.
    """
    return _ChangedLinear.apply(x, weight, bias, start_down, start_up, down, up)


def is_fusable(layer: nn.Module, x: torch.Tensor) -> bool:
    """
    Whether `changed_linear` can stand in for a call of `layer` on `x`: the layer is a frozen `nn.Linear` whose call
    nobody watches, in the dtype of `x`, and no other transformation needs to look into the operation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # the compiler fuses for itself
    if type(layer) is not nn.Linear or type(x) is not torch.Tensor or x.dim() < 2:
        return False
    tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    is_watched = (
        has_hooks(layer) or _has_any_global_hook() or "forward" in vars(layer)
    )  # accelerate's offloading replaces it
    return (
        not is_watched
        and all(t.dtype == x.dtype and t.device == x.device and not t.requires_grad for t in tensors)
        and (not torch.is_autocast_enabled(x.device.type) or torch.get_autocast_dtype(x.device.type) == x.dtype)
        # torch.func and forward-mode differentiation
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _ChangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        start_down: torch.Tensor,
        start_up: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        readers = torch.cat([start_down + down, down])  # (2 r, m)
        codes = nn.functional.linear(rows, readers)  # `(A0 + A) x` and `A x`
        result = nn.functional.linear(rows, weight, bias)
        # `B (A0 + A) x + B0 A x`: exactly zero at the start
        result.addmm_(codes, torch.cat([up, start_up], dim=1).T)
        ctx.save_for_backward(x, weight, start_down, start_up, down, up, codes)
        return result.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, start_down, start_up, down, up, codes = ctx.saved_tensors
        r = down.shape[0]
        rows, grad = x.flatten(0, -2), grad_outputs[0].flatten(0, -2)
        spread = grad @ torch.cat([up, start_up], dim=1)  # (n, 2 r)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(spread, torch.cat([start_down + down, down]))
            grad_x = grad_x.unflatten(0, x.shape[:-1])
        if ctx.needs_input_grad[5]:
            grad_down = (spread[:, :r] + spread[:, r:]).T @ rows
        if ctx.needs_input_grad[6]:
            # in a second differentiation the kept codes would count as constants
            code = rows @ (start_down + down).T if torch.is_grad_enabled() else codes[:, :r]
            grad_up = grad.T @ code
        return grad_x, None, None, None, None, grad_down, grad_up
