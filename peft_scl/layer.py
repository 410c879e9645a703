# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .config import SclConfig
from .linalg import truncated_svd
from .quantization import MERGEABLE_BACKENDS, check_readable, dense, frozen_copy, put_back


__all__ = ["Linear", "SclLayer"]


class SclLayer(BaseTunerLayer):
    """State of the SCL adapters on one down projection; see [`SclConfig`] for what each map computes."""

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("scl_A", "scl_B", "scl_delta", "scl_delta_A", "scl_delta_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ("r", "variant", "activation", "activation_fn", "scaling", "scl_dropout")

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
        self.scl_delta: Any = nn.ModuleDict({})
        self.scl_delta_A: Any = nn.ModuleDict({})
        self.scl_delta_B: Any = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Base weight and bias as they were before the first merge: (I + B A) is a factor, not a summand, so taking it
        # out again by arithmetic would not restore them exactly. Plain attribute, so that it is never saved.
        self._unmerged_parameters: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.kwargs = kwargs

        layer = self.get_base_layer()
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(layer)  # type: ignore[assignment]
        self.fan_in_fan_out = isinstance(layer, Conv1D)  # Conv1D stores its weight as (in, out)
        self.quantization_backend = resolve_quantization_backend(
            layer, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )

    def update_layer(self, adapter_name: str, config: SclConfig) -> None:
        """Create the maps of `adapter_name` and initialise them as `config` says."""
        compress = config.variant == "compress"
        if compress and config.r > min(self.in_features, self.out_features):
            raise ValueError(
                f"`r` is {config.r}, but `variant='compress'` replaces a down projection of shape "
                f"({self.out_features}, {self.in_features}), which has no more than "
                f"{min(self.in_features, self.out_features)} singular directions. Choose `r` up to that, or use "
                "`variant='bottleneck'`."
            )
        activation_fn = ACT2FN[config.activation]
        if any(True for _ in activation_fn.parameters()):
            raise ValueError(
                f"`activation={config.activation!r}` has parameters of its own, which would be neither trained nor saved. "
                "Use an activation without parameters."
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
        # The delta is a module with a `.weight` and no copy of the base weight: it works on quantised and partitioned
        # bases, adds up over adapters, and FSDP can wrap it.
        if not compress and config.train_down_proj == "full":
            self.scl_delta[adapter_name] = nn.Linear(m, d, bias=False)
        elif not compress and config.train_down_proj == "low_rank":
            delta_r = config.down_proj_r or r
            self.scl_delta_A[adapter_name] = nn.Linear(m, delta_r, bias=False)
            self.scl_delta_B[adapter_name] = nn.Linear(delta_r, d, bias=False)

        self.reset_scl_parameters(adapter_name, init_weights=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        # an offloaded weight is on the meta device between forwards, where an adapter would compute nothing
        hook = self._offload_hook()
        return (device if hook is None else torch.device(hook.execution_device)), dtype

    def _offload_hook(self) -> AlignDevicesHook | None:
        hook = getattr(self.get_base_layer(), "_hf_hook", None)
        return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None

    def reset_scl_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Start from the base model (`"bottleneck"`) or its best rank-`r` approximation (`"compress"`), or at random."""
        maps = [getattr(self, name) for name in self.adapter_layer_names]
        for module in (entries[adapter_name] for entries in maps if adapter_name in entries):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if not init_weights:
            return
        for entries in (self.scl_delta, self.scl_delta_B):
            if adapter_name in entries:
                nn.init.zeros_(entries[adapter_name].weight)
        if self.variant[adapter_name] == "bottleneck":
            nn.init.zeros_(self.scl_B[adapter_name].weight)
        else:
            self._start_from_svd(adapter_name)

    def _start_from_svd(self, adapter_name: str) -> None:
        """`scaling B A` = best rank-`r` approximation of the down projection, its singular values shared evenly."""
        down, up = self.scl_A[adapter_name].weight, self.scl_B[adapter_name].weight
        base_weight: Any = getattr(self.get_base_layer(), "weight", None)
        offloaded = self._offload_hook() is not None
        if down.is_meta or (base_weight is not None and base_weight.is_meta and not offloaded):
            return  # an empty shell, to be filled from a checkpoint
        with gather_params_ctx(base_weight, modifier_rank=None), torch.no_grad():
            left, values, right = truncated_svd(self._dense_base_weight(), down.shape[0])
            root = (values / self.scaling[adapter_name]).sqrt()
            down.copy_(root[:, None] * right)
            up.copy_(left * root)

    def _dense_base_weight(self) -> torch.Tensor:
        """The base weight as a dense floating tensor `(out_features, in_features)`."""
        hook = self._offload_hook()
        if hook is not None and self.quantization_backend is not None:
            raise NotImplementedError(
                "The down projection is quantised and offloaded, so its singular vectors cannot be read. Add the adapter "
                "before offloading, or use `variant='bottleneck'`, which does not read the weight."
            )
        if self.quantization_backend is not None:
            check_readable(self.get_base_layer())
        weight = self.get_base_weight() if hook is None else hook.weights_map["weight"]
        if weight.numel() == 0:
            raise ValueError(
                "The weight of the down projection is empty, as under DeepSpeed ZeRO-3 before it is gathered, so its "
                "singular vectors cannot be read. Use `variant='bottleneck'`, which does not read the weight."
            )
        return weight.T if self.fan_in_fan_out else weight

    def check_mergeable(self, names: list[str]) -> None:
        """Raise if one of the adapters `names` cannot be folded into this layer."""
        names = [name for name in names if name in self.scl_A]
        for name in names:
            if self.activation[name] != "linear":
                raise ValueError(
                    f"The SCL adapter {name!r} has the activation {self.activation[name]!r}: a non-linear map cannot be "
                    "folded into a weight matrix. Keep the adapter separate (`PeftModel.from_pretrained`), or train with "
                    "`activation='linear'`."
                )
            if self.scl_A[name].bias is not None and self.bias is None:
                raise ValueError(
                    f"The SCL adapter {name!r} has biases (`scl_bias=True`), but the down projection it would be merged "
                    "into has none. Keep the adapter separate, or train with `scl_bias=False`."
                )
        backend = self.quantization_backend
        if names and backend is not None and backend.backend_name not in MERGEABLE_BACKENDS:
            raise NotImplementedError(
                f"Merging SCL into a layer quantised by {backend.backend_name} is not supported (only by "
                f"{', '.join(MERGEABLE_BACKENDS)}). Load the base model without quantisation to merge, or keep the adapter "
                "separate."
            )
        if names and backend is not None:
            check_readable(self.get_base_layer())


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

        hidden = x
        for name in active:
            if self.variant[name] == "bottleneck":
                hidden = hidden + self._branch(name, x)

        compress = [name for name in active if self.variant[name] == "compress"]
        if len(compress) == 1:
            # The replaced down projection is not computed at all, which is the point of this variant. Its bias comes
            # from its own forward, so that hooks (offloading, ZeRO-3) and quantised layers see the call they expect.
            result = self._branch(compress[0], hidden)
            if self.bias is not None:
                result = result + self.base_layer(hidden.new_zeros(1, self.in_features))
        else:
            result = self.base_layer(hidden, *args, **kwargs)
            if compress:  # several replacements add up as the deltas `B A - W`, as merging them does
                bias = 0 if self.bias is None else self.base_layer(hidden.new_zeros(1, self.in_features))
                result = (1 - len(compress)) * result + len(compress) * bias
                for name in compress:
                    result = result + self._branch(name, hidden)

        for name in active:
            if name in self.scl_delta:
                delta = self.scl_delta[name]
                result = result + delta(self._cast_input_dtype(hidden, delta.weight.dtype)).to(result.dtype)
            elif name in self.scl_delta_A:
                down, up = self.scl_delta_A[name], self.scl_delta_B[name]
                result = result + up(down(self._cast_input_dtype(hidden, down.weight.dtype))).to(result.dtype)
        return result

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B act(A x)`, in the dtype of `x`."""
        down, up = self.scl_A[name], self.scl_B[name]
        hidden = self.scl_dropout[name](self._cast_input_dtype(x, down.weight.dtype))
        output = up(self.activation_fn[name](down(hidden)))
        if self.scaling[name] != 1:
            output = output * self.scaling[name]
        return output.to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Fold linear adapters into the base weight, exactly up to the rounding of its dtype. A quantised weight is
        quantised again after the merge, which rounds more coarsely and gives a warning; unmerging restores it exactly.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the merged weight for non-finite values before it replaces the base weight.
            adapter_names (`list[str]`, *optional*):
                Adapters to merge; all active ones if not given.

        Raises:
            ValueError: If an adapter is not linear, has a bias that the base layer has no place for, or gives non-finite
                weights under `safe_merge`.
            NotImplementedError: If the base layer is quantised by a library other than bitsandbytes and torchao.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scl_A]
        if not names:
            return
        base_layer: Any = self.get_base_layer()
        self.check_mergeable(names)

        original = self._unmerged_parameters
        if original is None:
            weight = base_layer.weight.data if self.quantization_backend is None else frozen_copy(base_layer)
            original = (weight, None if base_layer.bias is None else base_layer.bias.data)
        with torch.no_grad():
            weight, bias = self._merged_parameters(original, self.merged_adapters + names)
        if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self._unmerged_parameters = original
        if self.quantization_backend is None:
            base_layer.weight.data = weight
        else:
            warnings.warn(
                f"Merging SCL into weights quantised by {self.quantization_backend.backend_name} rounds the result to the "
                "quantisation grid again, so the outputs differ from those of the separate adapter. Merge into the base "
                "model without quantisation for an exact result.",
                UserWarning,
                stacklevel=2,
            )
            self.set_base_weight(weight)
        if bias is not None:
            base_layer.bias.data = bias
        self.merged_adapters.extend(names)

    def _merged_parameters(
        self, original: tuple[torch.Tensor, torch.Tensor | None], names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The `original` weight and bias with `names` folded in: `W' = (W + sum_k change_k) (I + sum_k s_k B_k A_k)`, where
        the change is the delta of a bottleneck and `s_k B_k A_k - W` of a compression.
        """
        base_weight, base_bias = original
        if self.quantization_backend is not None:
            base_weight = dense(base_weight)
        device = self.scl_A[names[0]].weight.device
        dtype = torch.promote_types(base_weight.dtype, torch.float32)
        weight = base_weight.to(device, dtype)
        weight = weight.T if self.fan_in_fan_out else weight
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
            offset = None
            if down.bias is not None:
                offset = up_weight @ down.bias.to(dtype) + self.scaling[name] * up.bias.to(dtype)
            if self.variant[name] == "bottleneck":
                bottlenecks.append((up_weight, down_weight))
                shift = shift if offset is None else shift + offset
            else:
                merged += up_weight @ down_weight - weight
                bias = bias if offset is None or bias is None else bias + offset
        if bias is not None:
            bias = bias + merged @ shift
        # never form the (m, m) product `B A`: m is the FFN width
        merged = merged + sum((merged @ up_weight) @ down_weight for up_weight, down_weight in bottlenecks)
        merged = merged.T.contiguous() if self.fan_in_fan_out else merged
        # as the base layer is now: the model may have been cast or moved since the first merge
        base_layer: Any = self.get_base_layer()
        like = base_layer.weight if self.quantization_backend is None else base_weight
        return merged.to(like), None if bias is None else bias.to(base_layer.bias)

    def unmerge(self) -> None:
        """Put the base weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._unmerged_parameters is not None
        base_layer: Any = self.get_base_layer()
        weight, bias = self._unmerged_parameters
        if self.quantization_backend is None:
            base_layer.weight.data = weight.to(base_layer.weight)
        else:
            put_back(base_layer, weight)
        if bias is not None:
            base_layer.bias.data = bias.to(base_layer.bias)
        self._unmerged_parameters = None
        self.merged_adapters.clear()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "scl." + super().__repr__()
