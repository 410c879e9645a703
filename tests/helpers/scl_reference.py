# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The formulas of SCL in float64, written without the code of the tuner, and the small model they are checked on."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_scl import SclConfig, SclLayer


M, D = 12, 7  # width of the FFN and of the model: different, so that a transposed weight cannot pass
BASES = ["linear", "linear_no_bias", "conv1d"]

# one of each kind, for tests of what PEFT, transformers and TRL do to any adapter; and two rows of tokens
CONFIGS = [
    {"r": 4, "variant": "bottleneck"},
    {"r": 4, "variant": "bottleneck", "activation": "gelu", "scl_bias": True, "scaling": 0.5},
    {"r": 4, "variant": "bottleneck", "train_down_proj": "full"},
    {"r": 4, "variant": "compress", "keep_residual": False},
    {"r": 4, "variant": "compress"},
]

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}


def config_id(value: Any) -> str:
    """Readable test ids for adapter configs and tuples of them."""
    if isinstance(value, tuple):
        return "+".join(config_id(part) for part in value)
    return "-".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)


def randomise(parameter: nn.Parameter) -> None:
    """Random values with all the bits of float64, so that a detour through another dtype does not go unnoticed."""
    parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64) / parameter.shape[-1] ** 0.5)


class Block(nn.Module):
    """A feed-forward block: `down(gelu(up(x)))`."""

    def __init__(self, base: str = "linear", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up = nn.Linear(D, M)
        self.down = Conv1D(D, M) if base == "conv1d" else nn.Linear(M, D, bias=base == "linear")
        self.to(dtype)
        for parameter in self.parameters():
            randomise(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def wrapped_block(*configs: dict[str, Any], base: str = "linear", dtype: torch.dtype = torch.float64) -> PeftModel:
    """
    A `Block` with one adapter "x", "y", "z" per config, all of them active and every one of their weights random.
    """
    torch.manual_seed(0)
    names = "xyz"[: len(configs)]
    model: Any = None
    for name, config in zip(names, configs, strict=True):
        config_ = SclConfig(target_modules=["down"], **config)
        if model is None:
            model = get_peft_model(Block(base, dtype), config_, adapter_name=name)
        else:
            model.add_adapter(name, config_)
    model.base_model.set_adapter(list(names))
    for key, parameter in model.named_parameters():
        if ".scl_" in key:
            randomise(parameter)
    return model.eval()


def scl_layers(model: nn.Module) -> list[SclLayer]:
    return [module for module in model.modules() if isinstance(module, SclLayer)]


def dense_base(layer: SclLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(d, m)` and bias `(d,)` of the base layer in float64, zeros if it has no bias."""
    base = layer.get_base_layer()
    weight = base.weight.detach().double()
    weight = weight.T if isinstance(base, Conv1D) else weight
    bias = torch.zeros(weight.shape[0]) if base.bias is None else base.bias.detach()
    return weight.clone(), bias.double().clone()


def dense_maps(layer: SclLayer, name: str) -> dict[str, torch.Tensor]:
    """
    The maps of one adapter in float64: `A`, `a` (bias), `B`, `b` (bias), and `A0`, `B0`, `delta` if there are any.
    """
    maps = {}
    for key, linear in (("A", layer.scl_A[name]), ("B", layer.scl_B[name])):
        maps[key] = linear.weight.detach().double()
        bias = torch.zeros(maps[key].shape[0]) if linear.bias is None else linear.bias.detach()
        maps[key.lower()] = bias.double()
    if name in layer.scl_start_A:
        maps["A0"] = layer.scl_start_A[name].double()
        maps["B0"] = layer.scl_start_B[name].double()
        maps["A"], maps["B"] = maps["A0"] + maps["A"], maps["B0"] + maps["B"]  # trained are the changes
    if name in layer.scl_delta:
        maps["delta"] = layer.scl_delta[name].weight.detach().double()
    if name in layer.scl_delta_A:
        maps["delta"] = (layer.scl_delta_B[name].weight @ layer.scl_delta_A[name].weight).detach().double()
    return maps


def reference_forward(layer: SclLayer, configs: dict[str, dict[str, Any]], h: torch.Tensor) -> torch.Tensor:
    """
    Output of the wrapped down projection for `h (..., m)`, from the definition.

    `y = W h' + b + sum_k change_k(h')` with `h' = h + sum over the bottlenecks of s B act(A h + a) + s b`, where the
    change is `delta h'` for a bottleneck, and for a compression `s B act(A h' + a) + s b` less `s B0 act(A0 h')` if
    the residual is kept, less `W h'` if not.
    """
    weight, bias = dense_base(layer)
    h = h.double()
    series = h
    for name, config in configs.items():
        if config.get("variant", "compress") == "bottleneck":
            series = series + _branch(layer, name, config, h)
    y = series @ weight.T + bias
    for name, config in configs.items():
        maps = dense_maps(layer, name)
        if config.get("variant", "compress") == "compress":
            act = ACTIVATIONS[config.get("activation", "linear")]
            scaling = config.get("scaling", 1.0)
            replaced = series @ weight.T
            if config.get("keep_residual", True):
                replaced = scaling * act(series @ maps["A0"].T) @ maps["B0"].T
            y = y + _branch(layer, name, config, series) - replaced
        elif "delta" in maps:
            y = y + series @ maps["delta"].T
    return y


def _branch(layer: SclLayer, name: str, config: dict[str, Any], h: torch.Tensor) -> torch.Tensor:
    maps, act = dense_maps(layer, name), ACTIVATIONS[config.get("activation", "linear")]
    return config.get("scaling", 1.0) * (act(h @ maps["A"].T + maps["a"]) @ maps["B"].T + maps["b"])
