# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import layer as lora
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor

from ..access import offload_hook
from ..linalg import WeightChange, add_products, evenly_spaced, principal_factors
from ..merging import MergeableLayer
from .config import FederaConfig


__all__ = ["FederaLayer"]


class FederaLayer(MergeableLayer, lora.LoraLayer):
    """
    State of the FeDeRA adapters on one layer; see [`FederaConfig`] for what it computes.

    The base layer holds the residual `W - s B0 A0` for an adapter with `keep_base=False`, and `W` otherwise. So an
    adapter `k` contributes `t B A x + u B0 A0 x` to the output of the base layer, where `t` is its scaling if it is
    active and 0 if not, and `u` is what is missing of the start: `s - t` for a residual base, `-t` for an untouched
    one.
    """

    method = "FeDeRA"
    empty_message = (
        "The weight of a target module is empty, as that of a partitioned model before it is gathered, so its "
        "singular vectors cannot be read. Add the adapter before the model is partitioned."
    )

    other_param_names: tuple[str, ...] = (
        *lora.LoraLayer.other_param_names,
        "keep_base",
        "start_scaling",
        "lora_start_A",
        "lora_start_B",
    )

    in_features: int
    out_features: int

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FederaConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        lora.LoraLayer.__init__(self, base_layer, **kwargs)
        self.keep_base: dict[str, bool] = {}
        self.start_scaling: dict[str, float] = {}  # `set_scale` changes `scaling`, but not the start
        # adapter name -> A0 and B0; saved, never trained
        self.lora_start_A: Any = BufferDict({}, persistent=True)
        self.lora_start_B: Any = BufferDict({}, persistent=True)
        self._original_sample: torch.Tensor | None = None  # there if, and only if, the base holds a residual
        self._examine_base_layer(kwargs.get("get_apply_tensor_subclass"))
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name, r, lora_alpha=lora_alpha, config=config, target_name=kwargs.get("target_name", "")
        )

    # The start

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Create the factors of `adapter_name` and start them as `config` says."""
        if not isinstance(config, FederaConfig):
            raise TypeError(
                f"The layer has FeDeRA adapters, to which {adapter_name!r}, a {type(config).__name__}, cannot be "
                "added. Merge them first (`merge_and_unload`), or save them and load them as what they are saved as, "
                "plain LoRA adapters."
            )
        self._put_back(adapter_name)  # if it is made anew under the same name
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        trained_A, trained_B = self.trained_factors(adapter_name)
        self.lora_start_A[adapter_name] = torch.zeros_like(trained_A.detach())
        self.lora_start_B[adapter_name] = torch.zeros_like(trained_B.detach())
        self.start_scaling[adapter_name] = self.scaling[adapter_name]
        self.keep_base[adapter_name] = config.keep_base
        base_weight = self.get_base_layer().weight
        # an empty shell, to be filled from a checkpoint
        is_shell = trained_A.is_meta or (base_weight.is_meta and offload_hook(self.get_base_layer()) is None)
        if config.init_lora_weights and not is_shell:
            with gather_params_ctx(base_weight), torch.no_grad():  # ZeRO-3: every rank gets what rank 0 writes
                self._start(adapter_name)

    def _start(self, name: str) -> None:
        """`s B0 A0` = best rank-`r` approximation of the base weight, its singular values shared evenly."""
        start_A, start_B = self.lora_start_A[name], self.lora_start_B[name]
        twin = self._twin(name)
        if twin is not None:
            start_A.copy_(self.lora_start_A[twin])
            start_B.copy_(self.lora_start_B[twin])
        else:
            weight = self._dense_base_weight()
            # Representable in the dtype of the base: the adapter may be cast to it and back (`autocast_adapter_dtype`,
            # TRL on quantised models), which must not move the factors away from their start.
            dtype = torch.bfloat16 if self.quantization_backend is not None else weight.dtype
            for start, factor in zip(
                (start_A, start_B), principal_factors(weight, len(start_A), self.start_scaling[name]), strict=True
            ):
                start.copy_(factor.to(dtype))
        for trained, start in zip(self.trained_factors(name), (start_A, start_B), strict=True):
            trained.copy_(start)
        if not self.keep_base[name]:
            self._move_start(name, None, (start_A, start_B))

    def _twin(self, name: str) -> str | None:
        """
        Another adapter that has computed the same start. Twice the same is half the work, and equal on every machine.
        """
        for other in self.keep_base:
            same = self.r[other] == self.r[name] and self.start_scaling[other] == self.start_scaling[name]
            if other != name and same and not self.lora_start_B[other].is_meta and self.lora_start_B[other].any():
                return other
        return None

    def _move_start(
        self, name: str, old: tuple[torch.Tensor, torch.Tensor] | None, new: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Residual base: put `s B0 A0` of the old start back and take the new one out, rounding once."""
        weight = self.get_base_layer().weight
        sample = evenly_spaced(weight.data) if self._original_sample is None else self._original_sample
        scaling = self.start_scaling[name]
        terms = [(sign * scaling, *pair) for sign, pair in ((1, old), (-1, new)) if pair is not None]
        add_products(self._oriented(weight.data), terms, out=self._oriented(weight.data))
        self._original_sample = None if new is None else sample

    def load_start(self, name: str, start_A: torch.Tensor, start_B: torch.Tensor) -> None:
        """
        Make `start_A (r, in)` and `start_B (out, r)` the start of an adapter, and move a residual base with it.

        An equal start changes nothing, and one in place of none (`init_lora_weights=False`) gives, bit for bit, the
        base of the model that had computed it. Another one moves the base, which is rounded again.

        Raises:
            ValueError: If adapters are merged, or the residual base is not there to be moved.
        """
        if self.merged:
            raise ValueError(
                f"The adapters {self.merged_adapters} are merged, so no other start can be loaded. Call "
                "`unmerge_adapter` first."
            )
        buffers = self.lora_start_A[name], self.lora_start_B[name]
        is_empty = buffers[0].is_meta
        device = self.get_base_layer().weight.device if is_empty else buffers[0].device
        new = tuple(
            tensor.to(device, buffer.dtype).contiguous()
            for tensor, buffer in zip((start_A, start_B), buffers, strict=True)
        )
        if not is_empty and all(torch.equal(tensor, buffer) for tensor, buffer in zip(new, buffers, strict=True)):
            return
        if not self.keep_base[name]:
            base_weight = self.get_base_layer().weight
            if base_weight.is_meta:
                raise ValueError(
                    "The base weights are on the meta device, so the residual of the loaded adapter cannot be "
                    "written. Load the base model first, or use `keep_base=True`."
                )
            old = None if is_empty or not buffers[1].any() else buffers
            with gather_params_ctx(base_weight), torch.no_grad():
                if base_weight.numel() != self.in_features * self.out_features or isinstance(base_weight, DTensor):
                    raise ValueError(
                        "The base weights are sharded over devices, so the residual of another start cannot be "
                        "written. Load the adapter (`load_federa`) before the model is sharded."
                    )
                self._move_start(name, old, new)  # type: ignore[arg-type]
        if not is_empty:
            for tensor, buffer in zip(new, buffers, strict=True):
                buffer.copy_(tensor)

    @property
    def original_sample(self) -> torch.Tensor | None:
        """
        64 evenly spaced entries of the original base weight if the base is a residual, to recognise the model by.
        """
        return self._original_sample

    # The weights

    def trained_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters `A (r, in)` and `B (out, r)`."""
        raise NotImplementedError

    def start_coefficient(self, name: str, is_active: bool) -> float:
        """The factor on `B0 A0` beside the base layer."""
        start = 0.0 if self.keep_base[name] else self.start_scaling[name]
        return start - self.scaling[name] if is_active else start

    def weight_change(self, name: str) -> WeightChange:
        """
        `s (B A - B0 A0)` as thin factors in float64, exactly zero at the start.

        This is relative to the pretrained weight in both modes, so it is not what `merge` adds to a residual base
        (`s B A`).
        """
        trained_A, trained_B = (tensor.detach().double() for tensor in self.trained_factors(name))
        start_A, start_B = self.lora_start_A[name].double(), self.lora_start_B[name].double()
        left = self.scaling[name] * torch.cat([trained_B - start_B, start_B], dim=1)
        return WeightChange(left, torch.cat([trained_A, trained_A - start_A]), None, None)

    def exact_rank(self, name: str) -> int:
        return 2 * self.r[name]

    def _adapter_dtype(self, name: str) -> torch.dtype:
        return self.lora_start_A[name].dtype

    # Forward

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        self._check_forward_args(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is None:
            return self._adapted(result, x, [] if self.disable_adapters else self.active_adapters)
        adapted = torch.empty_like(result)
        for name in dict.fromkeys(adapter_names):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            adapted[rows] = self._adapted(result[rows], x[rows], [] if self.disable_adapters else [name])
        return adapted

    def _adapted(self, result: torch.Tensor, x: torch.Tensor, active: Sequence[str]) -> torch.Tensor:
        """The output of the base layer with what every adapter contributes, active or not."""
        dtype = result.dtype
        for name in self.keep_base:
            is_active = name in active
            if is_active or self.start_coefficient(name, is_active) != 0:
                result = result + self._contribution(name, x, is_active)
        return result.to(dtype)

    def _contribution(self, name: str, x: torch.Tensor, is_active: bool) -> torch.Tensor:
        """`t B A dropout(x) + u B0 A0 x`."""
        dtype = self.trained_factors(name)[0].dtype  # DeepSpeed casts parameters, but not buffers
        start_A, start_B = self.lora_start_A[name].to(dtype), self.lora_start_B[name].to(dtype)
        x = self._cast_input_dtype(x, dtype)
        if not is_active:
            return self.start_coefficient(name, False) * self._expand(self._reduce(x, start_A), start_B)
        if self.keep_base[name] and self._is_plain(name):
            # `B A - B0 A0 = (B - B0) A + B0 (A - A0)`: one pass over `x`, exactly zero at the start, and small changes
            # are not lost in the rounding of large numbers
            trained_A, trained_B = self.trained_factors(name)
            code = self._reduce(x, torch.cat([trained_A, trained_A - start_A]))
            return self._expand(code, self.scaling[name] * torch.cat([trained_B - start_B, start_B], dim=1))
        output = self.scaling[name] * self._trained(name, x)
        coefficient = self.start_coefficient(name, True)
        if coefficient != 0:
            output = output + coefficient * self._expand(self._reduce(x, start_A), start_B)
        return output

    def _is_plain(self, name: str) -> bool:
        """Whether the trained factors can be read outside of their forward, and no dropout stands before them."""
        raise NotImplementedError

    def _trained(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`B A dropout(x)`."""
        raise NotImplementedError

    def _reduce(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        raise NotImplementedError

    def _expand(self, code: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`B z`."""
        raise NotImplementedError

    # Merging and leaving

    def _merged_parameters(
        self, original: tuple[torch.Tensor, torch.Tensor | None], names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._full_weight(original[0], names), None

    @torch.no_grad()
    def _full_weight(self, stored: torch.Tensor, names: list[str]) -> torch.Tensor:
        """
        `stored`, a base weight, with all that is missing of it and `names` folded in, as the base layer stores it.
        """
        weight = self._values(stored).to(self.get_base_layer().weight.device)
        terms = []
        for name in self.keep_base:
            is_active = name in names
            if is_active:
                terms.append((self.scaling[name], *self.trained_factors(name)))
            coefficient = self.start_coefficient(name, is_active)
            if coefficient != 0:
                terms.append((coefficient, self.lora_start_A[name], self.lora_start_B[name]))
        # the model may have been cast since the first merge
        dtype = self.get_base_layer().weight.dtype if self.quantization_backend is None else weight.dtype
        merged = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        add_products(self._oriented(weight), terms, out=self._oriented(merged))
        return merged

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if the base is its residual, put the start back, which rounds once more."""
        self._put_back(adapter_name)
        super().delete_adapter(adapter_name)

    def _put_back(self, name: str) -> None:
        """Make a base that is the residual of the adapter `name` the pretrained weight again, rounding once more."""
        if name in self.merged_adapters:
            raise ValueError(
                f"The adapter {name!r} is merged and can be neither deleted nor made anew. Call `unmerge_adapter` "
                "first."
            )
        if not self.keep_base.get(name, True) and self._original_sample is not None:
            with gather_params_ctx(self.get_base_layer().weight), torch.no_grad():
                self._move_start(name, (self.lora_start_A[name], self.lora_start_B[name]), None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged or with the pretrained weight. Called by PEFT."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base_layer = self.get_base_layer()
        if not self.merged and not all(self.keep_base.values()):
            base_layer.weight.data = self._full_weight(base_layer.weight.data, [])
        return base_layer

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "federa.", 1)
