# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Broken tuners, to see that the suite fails for them: `--sabotage start`."""

from __future__ import annotations

from typing import Any

import torch

from peft_scl import SclLayer, SclModel
from peft_scl.scl.linear import Linear


def _start_off_the_base_model() -> None:
    original = SclLayer.reset_scl_parameters

    def reset(self: Any, adapter_name: str, init_weights: bool = True) -> None:
        original(self, adapter_name, init_weights)
        with torch.no_grad():
            weight = self.scl_B[adapter_name].weight
            weight += 0.01 * torch.randn_like(weight)

    SclLayer.reset_scl_parameters = reset  # type: ignore[method-assign]


def _merge_nine_tenths() -> None:
    original = Linear._merged_parameters

    def merged(self: Any, *args: Any) -> Any:
        weight, bias = original(self, *args)
        return 0.9 * weight, bias

    Linear._merged_parameters = merged  # type: ignore[method-assign, assignment]


def _forget_attributes_on_delete() -> None:
    SclLayer.other_param_names = ("r",)


def _save_one_factor() -> None:
    original = SclModel._get_adapter_state_dict.__func__  # type: ignore[attr-defined]

    def state_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return {key: value for key, value in original(cls, *args, **kwargs).items() if ".scl_B." not in key}

    SclModel._get_adapter_state_dict = classmethod(state_dict)  # type: ignore[method-assign, assignment]


SABOTAGES = {
    "start": _start_off_the_base_model,
    "merge": _merge_nine_tenths,
    "delete": _forget_attributes_on_delete,
    "save": _save_one_factor,
}
