# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers.activations import ACT2FN

from ..access import offload_hook
from ..linalg import WeightChange, principal_factors
from ..merging import MergeableLayer
from ..quantization import MERGEABLE_BACKENDS, check_readable
from ..started import StartedLinear
from .config import SclConfig


__all__ = ["SclLayer"]


class SclLayer(MergeableLayer):
    """State of the SCL adapters on one down projection; see [`SclConfig`] for what each map computes."""

    method = "SCL"
    offloaded_message = (
        "The down projection is quantised and offloaded, so its singular vectors cannot be read. Add the adapter "
        "before offloading, or use `variant='bottleneck'` with `down_proj_start='zero'`, which does not read the "
        "weight."
    )
    empty_message = (
        "The weight of the down projection is empty, as under DeepSpeed ZeRO-3 before it is gathered, so it cannot be "
        "read. Use `variant='bottleneck'` with `down_proj_start='zero'`, which trains without reading it, and export "
        "or merge outside of ZeRO-3."
    )

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("scl_A", "scl_B", "scl_delta", "scl_delta_A", "scl_delta_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "r",
        "variant",
        "activation",
        "activation_fn",
        "scaling",
        "scl_dropout",
        "scl_start_A",
        "scl_start_B",
    )

    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.variant: dict[str, str] = {}
        self.activation: dict[str, str] = {}
        self.activation_fn: dict[str, nn.Module] = {}
        self.scaling: dict[str, float] = {}
        self.scl_dropout = nn.ModuleDict({})
        # adapter name -> nn.Linear; `Any` because the values of a ModuleDict have no closer type than nn.Module
        self.scl_A: Any = nn.ModuleDict({})
        self.scl_B: Any = nn.ModuleDict({})
        # adapter name -> A0 and B0, of which A and B are the changes if the residual is kept; saved, never trained
        self.scl_start_A: Any = BufferDict({}, persistent=True)
        self.scl_start_B: Any = BufferDict({}, persistent=True)
        self.scl_delta: Any = nn.ModuleDict({})
        self.scl_delta_A: Any = nn.ModuleDict({})
        self.scl_delta_B: Any = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs

        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())  # type: ignore[assignment]
        self._examine_base_layer(kwargs.get("get_apply_tensor_subclass"))

    def update_layer(self, adapter_name: str, config: SclConfig) -> None:
        """Create the maps of `adapter_name` and initialise them as `config` says."""
        compress = config.variant == "compress"
        full_rank = min(self.in_features, self.out_features)
        if compress and not config.keep_residual and config.r > full_rank:
            raise ValueError(
                f"`r` is {config.r}, but `keep_residual=False` replaces a down projection of shape "
                f"({self.out_features}, {self.in_features}), which has no more than {full_rank} singular directions. "
                "Choose `r` up to that, or keep the residual."
            )
        activation_fn = ACT2FN[config.activation]
        if any(True for _ in activation_fn.parameters()):
            raise ValueError(
                f"`activation={config.activation!r}` has parameters of its own, which would be neither trained nor "
                "saved. Use an activation without parameters."
            )

        r, m, d = config.r, self.in_features, self.out_features
        self.r[adapter_name] = r
        self.variant[adapter_name] = config.variant
        self.activation[adapter_name] = config.activation
        self.activation_fn[adapter_name] = activation_fn
        self.scaling[adapter_name] = config.scaling
        self.scl_dropout[adapter_name] = nn.Dropout(config.scl_dropout) if config.scl_dropout > 0 else nn.Identity()
        self.scl_A[adapter_name] = nn.Linear(m, r, bias=config.scl_bias)
        self.scl_B[adapter_name] = nn.Linear(r, d if compress else m, bias=config.scl_bias)
        if compress and config.keep_residual:
            self.scl_start_A[adapter_name] = torch.zeros(r, m)
            self.scl_start_B[adapter_name] = torch.zeros(d, r)
        # The delta is a module with a `.weight` and no copy of the base weight: it works on quantised and partitioned
        # bases, adds up over adapters, and FSDP can wrap it.
        if not compress and config.train_down_proj == "full":
            self.scl_delta[adapter_name] = nn.Linear(m, d, bias=False)
        elif not compress and config.train_down_proj == "low_rank":
            delta_r = config.down_proj_r or r
            if config.down_proj_start == "principal":
                self.scl_delta_A[adapter_name] = StartedLinear(m, delta_r, reads=True)
                self.scl_delta_B[adapter_name] = StartedLinear(delta_r, d, reads=False)
            else:
                self.scl_delta_A[adapter_name] = nn.Linear(m, delta_r, bias=False)
                self.scl_delta_B[adapter_name] = nn.Linear(delta_r, d, bias=False)

        self.reset_scl_parameters(adapter_name, init_weights=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _maps(self, adapter_name: str) -> list[Any]:
        """All trained maps of an adapter."""
        by_kind = (getattr(self, kind) for kind in self.adapter_layer_names)
        return [entries[adapter_name] for entries in by_kind if adapter_name in entries]

    def replaces(self, name: str) -> bool:
        """Whether an adapter stands in for the down projection instead of changing it."""
        return self.variant[name] == "compress" and name not in self.scl_start_A

    def reset_scl_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Start as `SclConfig` describes, or with every trained map at random."""
        for module in self._maps(adapter_name):
            started = isinstance(module, StartedLinear)
            nn.init.kaiming_uniform_(module.change if started else module.weight, a=math.sqrt(5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        down, up = self.scl_A[adapter_name].weight, self.scl_B[adapter_name].weight
        keeps_residual = adapter_name in self.scl_start_A
        if keeps_residual:
            start_down = self.scl_start_A[adapter_name]
            nn.init.kaiming_uniform_(start_down, a=math.sqrt(5))
            if not down.is_meta:
                self._write_principal_part(start_down, self.scl_start_B[adapter_name], self.scaling[adapter_name])
        delta = [entries[adapter_name] for entries in (self.scl_delta_A, self.scl_delta_B) if adapter_name in entries]
        starts_at_principal = any(isinstance(module, StartedLinear) for module in delta)
        if starts_at_principal:
            nn.init.kaiming_uniform_(delta[0].start, a=math.sqrt(5))
            if not down.is_meta:
                self._write_principal_part(delta[0].start, delta[1].start, 1.0)
        if not init_weights:
            return
        if starts_at_principal:
            for module in delta:
                nn.init.zeros_(module.change)
        else:
            for entries in (self.scl_delta, self.scl_delta_B):
                if adapter_name in entries:
                    nn.init.zeros_(entries[adapter_name].weight)
        if keeps_residual:
            nn.init.zeros_(down)
        if keeps_residual or self.variant[adapter_name] == "bottleneck":
            nn.init.zeros_(up)
        elif not down.is_meta:
            self._write_principal_part(down, up, self.scaling[adapter_name])

    def _write_principal_part(self, down: torch.Tensor, up: torch.Tensor, scaling: float) -> None:
        """`scaling up down` = best rank-`r` approximation of the down projection, see [`principal_factors`]."""
        base_weight: Any = getattr(self.get_base_layer(), "weight", None)
        if base_weight is not None and base_weight.is_meta and offload_hook(self.get_base_layer()) is None:
            return  # an empty shell, to be filled from a checkpoint
        with gather_params_ctx(base_weight, modifier_rank=None), torch.no_grad():
            for factor, start in zip(
                (down, up), principal_factors(self._dense_base_weight(), len(down), scaling), strict=True
            ):
                factor.copy_(start)

    def weight_change(self, name: str) -> WeightChange:
        """
        The change of weight and bias that the linear adapter `name`, alone, amounts to.

        Raises:
            ValueError: If the adapter is not linear, or if the base weight is not there in its original form.
        """
        if self.activation[name] != "linear":
            raise ValueError(
                f"The SCL adapter {name!r} has the activation {self.activation[name]!r}, so what it does to the down "
                "projection is not a change of its weight, and no LoRA equals it. Keep the adapter as it is, or train "
                "with `activation='linear'`."
            )
        if self.merged:
            raise ValueError(
                f"The SCL adapters {self.merged_adapters} are merged, but the change is relative to the original "
                "weight. Call `unmerge_adapter` first."
            )
        base_weight = self._dense_base_weight()
        if base_weight.is_meta:
            raise ValueError(
                "The weight of a down projection is on the meta device, as it is when offloaded, so it cannot be "
                "read. Load the model without offloading, for instance with `device_map='cpu'`."
            )
        device, dtype = self.scl_A[name].weight.device, torch.float64
        weight = base_weight.to(device, dtype)
        down, up = self.scl_A[name], self.scl_B[name]
        right, left = down.weight.to(dtype), self.scaling[name] * up.weight.to(dtype)
        shift = None
        if down.bias is not None:
            shift = left @ down.bias.to(dtype) + self.scaling[name] * up.bias.to(dtype)
        if name in self.scl_start_A:
            # `(B0 + B) (A0 + A) - B0 A0 = B (A0 + A) + B0 A`: without cancellation, and exactly zero at the start
            start_right = self.scl_start_A[name].to(dtype)
            start_left = self.scaling[name] * self.scl_start_B[name].to(dtype)
            thin = torch.cat([left, start_left], dim=1), torch.cat([start_right + right, right])
            if down.bias is not None:
                shift = shift + start_left @ down.bias.to(dtype)
            return WeightChange(*thin, None, shift)
        if self.variant[name] == "compress":
            return WeightChange(left, right, -weight, shift)

        rest = None
        if name in self.scl_delta:
            rest = self.scl_delta[name].weight.to(dtype)
            weight = weight + rest
        elif name in self.scl_delta_A:
            delta_right, delta_left = self.scl_delta_A[name].weight.to(dtype), self.scl_delta_B[name].weight.to(dtype)
            weight = weight + delta_left @ delta_right
        left, shift = weight @ left, None if shift is None else weight @ shift
        if name in self.scl_delta_A:
            left, right = torch.cat([left, delta_left], dim=1), torch.cat([right, delta_right])
        return WeightChange(left, right, rest, shift)

    def exact_rank(self, name: str) -> int:
        if self.full_rank_option(name) is not None:
            return min(self.in_features, self.out_features)
        if name in self.scl_start_A:
            return 2 * self.r[name]
        delta_r = self.scl_delta_A[name].weight.shape[0] if name in self.scl_delta_A else 0
        return self.r[name] + delta_r

    def full_rank_option(self, name: str) -> str | None:
        if self.replaces(name):
            return "`keep_residual=False`"
        return "`train_down_proj='full'`" if name in self.scl_delta else None

    def _adapter_dtype(self, name: str) -> torch.dtype:
        return self.scl_A[name].weight.dtype

    def _bias_to_merge(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.data

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """
        Whether [`~peft.convert_to_lora`] can do justice to this layer: a linear adapter without biases, which it would
        drop, whose change has a low rank. [`to_lora`] keeps biases, is exact, and takes changes of full rank if a rank
        is named, with the error.
        """
        return (
            adapter_name in self.scl_A
            and self.activation[adapter_name] == "linear"
            and self.scl_A[adapter_name].bias is None
            and self.full_rank_option(adapter_name) is None
        )

    def check_mergeable(self, names: list[str]) -> None:
        """Raise if one of the adapters `names` cannot be folded into this layer."""
        names = [name for name in names if name in self.scl_A]
        for name in names:
            if self.activation[name] != "linear":
                raise ValueError(
                    f"The SCL adapter {name!r} has the activation {self.activation[name]!r}: a non-linear map cannot "
                    "be folded into a weight matrix. Keep the adapter separate (`PeftModel.from_pretrained`), or "
                    "train with `activation='linear'`."
                )
            if self.scl_A[name].bias is not None and self.bias is None:
                raise ValueError(
                    f"The SCL adapter {name!r} has biases (`scl_bias=True`), but the down projection it would be "
                    "merged into has none. Keep the adapter separate, or train with `scl_bias=False`."
                )
        backend = self.quantization_backend
        if names and backend is not None and backend.backend_name not in MERGEABLE_BACKENDS:
            raise NotImplementedError(
                f"Merging SCL into a layer quantised by {backend.backend_name} is not supported (only by "
                f"{', '.join(MERGEABLE_BACKENDS)}). Load the base model without quantisation to merge, or keep the "
                "adapter separate."
            )
        if names and backend is not None:
            check_readable(self.get_base_layer())
