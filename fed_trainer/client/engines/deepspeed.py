# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What DeepSpeed (ZeRO-1, 2, 3) holds of the trained parameters beside the model.

The parameters of the model are copies for the forward pass. The optimiser trains float32 masters, which are split over
the processes, and overwrites the copies at the end of a step. So a state is written into both: with the copies alone
the first step of a client would start from the masters of the client before it, with the masters alone its first loss
would be that client's.

ZeRO-3 splits the copies too. What is split is gathered in few messages, and written without any, as every process has
the whole state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn

from ...state.adapter_state import AdapterState
from ...state.refusals import Refusal
from .base import Engine
from .facts import DDP, Launch, LiveTensors, Setup, alone_of_several


__all__ = ["DeepSpeed"]

ELEMENTS_PER_MESSAGE = 2**26  # 256 MiB of float32, whole on every GPU
ZERO2 = "Use ZeRO-2 (`recipes/accelerate/zero2.yaml`) or DDP"


def _on_cpu(launch: Launch) -> bool:
    return launch.args.use_cpu or launch.is_set("ACCELERATE_USE_CPU")


def _dropped_on_cpu(launch: Launch) -> str:
    given = "`use_cpu=True`" if launch.args.use_cpu else "`ACCELERATE_USE_CPU`"
    return (
        f"The launcher asked for DeepSpeed, but {given} makes Accelerate drop it and run DDP instead. Leave it out; "
        "without a GPU, launch with `DS_ACCELERATOR=cpu accelerate launch --config_file "
        "recipes/accelerate/zero2.yaml <script> --ddp_backend gloo`."
    )


_LAUNCHES: tuple[Refusal[Launch], ...] = (
    Refusal(_on_cpu, _dropped_on_cpu, ValueError),
    alone_of_several("--ddp_backend gloo"),
    Refusal(
        lambda launch: launch.distributed_type != DistributedType.DEEPSPEED,
        lambda launch: (
            f"The launcher asked for DeepSpeed, but Accelerate runs {launch.distributed_type.value}. Launch with "
            "`accelerate launch --config_file recipes/accelerate/zero2.yaml <script>`."
        ),
        ValueError,
    ),
)


def _zero(setup: Setup) -> Mapping[str, Any]:
    return setup.plugin.deepspeed_config["zero_optimization"]


def _offloads_to_nvme(setup: Setup) -> bool:
    offload = [_zero(setup).get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    return any(part.get("device") == "nvme" for part in offload)


def _part_of_its_own(setup: Setup) -> str:
    part = "scheduler" if "scheduler" in setup.plugin.deepspeed_config else "optimizer"
    return (
        f"The DeepSpeed config has {'a' if part == 'scheduler' else 'an'} `{part}` of its own, which would go on from "
        "client to client. Leave it out: `optim`, `learning_rate` and `lr_scheduler_type` of the configuration are "
        "used."
    )


def _accumulates_in_float32(setup: Setup) -> bool:
    return setup.plugin.deepspeed_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"


_REFUSALS: tuple[Refusal[Setup], ...] = (
    Refusal(
        lambda setup: setup.plugin.zero_stage not in (1, 2, 3),
        lambda setup: f"ZeRO stage {setup.plugin.zero_stage} splits nothing and keeps its optimiser elsewhere. {DDP}.",
    ),
    Refusal(
        _offloads_to_nvme,
        "Offloading to NVMe keeps the trained parameters in files, which clients cannot be swapped in. Offload to "
        "'cpu'.",
    ),
    Refusal(lambda setup: {"scheduler", "optimizer"} & setup.plugin.deepspeed_config.keys(), _part_of_its_own),
    Refusal(
        lambda setup: setup.plugin.zero_stage == 1 and setup.args.bf16 and _accumulates_in_float32(setup),
        "ZeRO-1 with `bf16` and `grad_accum_dtype: fp32` takes another optimiser of DeepSpeed, which clients cannot "
        "be swapped in. Use ZeRO-2.",
    ),
    Refusal(
        lambda setup: _zero(setup).get("zero_quantized_nontrainable_weights"),
        "`zero_quantized_nontrainable_weights` stores what is frozen as integers, in an adapter too (`ffa_lora`), "
        "where it is read and written as it is. Leave it out.",
    ),
    Refusal(
        lambda setup: setup.args.fp16,
        "The loss scale of `fp16` would go on from client to client. Set `bf16=True`, or neither.",
    ),
    Refusal(
        lambda setup: setup.has_optimizer,
        "`optimizers` cannot be given: DeepSpeed splits what it holds. Set `optim` and `optim_args`.",
    ),
    Refusal(
        lambda setup: setup.live.buffers,
        lambda setup: (
            f"{min(setup.live.buffers)} is a running statistic, of which DeepSpeed leaves each process its own, so "
            f"they would go apart. {DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.args.keep_optimizer_state,
        "`keep_optimizer_state=True` keeps what the optimiser remembers of every tensor, but DeepSpeed has it in "
        f"one flat piece per process. {DDP}.",
    ),
    Refusal(
        lambda setup: setup.args.local_objective is not None,
        lambda setup: (
            f"`local_objective={setup.args.local_objective!r}` adds to the gradients before the step, but DeepSpeed "
            f"steps within the backward pass. {DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.has_stages,
        lambda setup: (
            f"`aggregation={setup.args.aggregation!r}` trains other parameters in its second stage, which needs a "
            f"second engine. {DDP}."
        ),
    ),
    Refusal(
        lambda setup: setup.plugin.zero_stage == 3 and not isinstance(setup.model, PeftModel),
        f"ZeRO-3 splits the whole model, and its parts would have to be gathered for every client. {ZERO2}.",
    ),
    Refusal(
        lambda setup: setup.plugin.zero_stage == 3 and setup.trains_a_prompt,
        f"PEFT computes a prompt when it saves it, which it cannot under ZeRO-3. {ZERO2}.",
    ),
    Refusal(
        lambda setup: setup.plugin.zero_stage == 3 and setup.adds_to_base,
        lambda setup: (
            f"`aggregation={setup.args.aggregation!r}` adds to base weights, which ZeRO-3 has split. {ZERO2}, or "
            "'fedavg'."
        ),
    ),
)


class DeepSpeed(Engine):
    """ZeRO-1, 2 and 3. The optimiser of the engine is kept from client to client."""

    holds_weights = True
    has_fixed_parameters = True
    makes_masters = True
    launch_refusals: ClassVar[tuple[Refusal[Launch], ...]] = _LAUNCHES
    refusals: ClassVar[tuple[Refusal[Setup], ...]] = _REFUSALS

    @classmethod
    def is_asked_for(cls, launch: Launch) -> bool:
        return launch.is_set("ACCELERATE_USE_DEEPSPEED")

    @property
    def plugin(self) -> Any:
        return self._state.deepspeed_plugin

    @contextmanager
    def building(self, live: LiveTensors, model: nn.Module) -> Iterator[None]:
        state = live.read()
        yield
        live.write(state)  # with `bf16` the masters are made of copies that were rounded

    def built(self, wrapped: nn.Module, optimizer: Any) -> None:
        engine: Any = wrapped
        self._zero = engine.optimizer
        # ZeRO-3 gathers weights in a forward pass, and offloading keeps gradients elsewhere
        self.can_break_off_forward = engine.zero_optimization_stage() < 3 and not self._zero.cpu_offload

    def reset_optimizer(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], start: AdapterState | None
    ) -> None:
        # the next step makes the moments anew, as the first one did; they are not saved anywhere
        self._zero.optimizer.state.clear()

    def discard_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        super().discard_gradients(parameters)
        if not self.can_break_off_forward:
            return  # it is only left between steps
        # as DeepSpeed does for a step that has overflowed
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        self._zero.all_grad_tensors.clear()

    def read(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """
        Of the masters those that have more in them than the parameters, and of the parameters those that ZeRO-3 has
        split, are gathered.
        """
        tensors = list(tensors)
        # in few messages: `deepspeed.utils` and `deepspeed.zero.GatheredParameters` send one or two per parameter
        gathered = _gather_split([tensor for tensor in tensors if _is_split(tensor)])
        gathered |= _gather_masters(
            [tensor for tensor in tensors if not _is_split(tensor) and _has_finer_master(tensor)]
        )
        for tensor in tensors:
            yield gathered.get(id(tensor), tensor.detach())

    def write(self, values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensor, value in values:
            if _is_split(tensor):
                _write_split(tensor, value)
            else:
                tensor.copy_(value)
            if _has_master(tensor):
                _write_master(tensor, value)

    def shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.ds_shape if _is_split(tensor) else tensor.shape)


def _gather_split(tensors: list[Any]) -> dict[int, torch.Tensor]:
    """Of ZeRO-3: whole copies, on the CPU and by `id`, of masters that have more in them, or else of parameters."""
    gathered = {}
    parts_of = {id(tensor): _part(tensor) for tensor in tensors}
    for batch in _messages(tensors, lambda tensor: (tensor.ds_process_group, parts_of[id(tensor)].dtype)):
        parts = torch.cat([parts_of[id(tensor)].to(tensor.device) for tensor in batch])
        group = batch[0].ds_process_group
        flat = parts.new_empty(torch.distributed.get_world_size(group) * len(parts))
        torch.distributed.all_gather_single(flat, parts, group=group)
        sizes = [tensor.ds_tensor.numel() for tensor in batch]
        for tensor, columns in zip(batch, flat.view(-1, len(parts)).split(sizes, dim=1), strict=True):
            gathered[id(tensor)] = columns.flatten()[: tensor.ds_numel].view(tensor.ds_shape).cpu()
    return gathered


def _gather_masters(tensors: list[Any]) -> dict[int, torch.Tensor]:
    """
    Of ZeRO-1 and 2, which split the joined masters anywhere: each process adds what it has of every one to zeros.
    """
    gathered: dict[int, torch.Tensor] = {}
    for batch in _messages(tensors, lambda tensor: tensor._dp_group):
        sizes = [tensor.numel() for tensor in batch]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=batch[0].device)
        for tensor, master in zip(batch, flat.split(sizes), strict=True):
            if tensor._hp_mapping is not None:  # of which this process has a part
                place = tensor._hp_mapping.lp_fragment_address
                master[place.start : place.start + place.numel] = tensor._hp_mapping.get_hp_fragment()
        torch.distributed.all_reduce(flat, group=batch[0]._dp_group)
        flat = flat.cpu()
        gathered |= {
            id(tensor): master.view_as(tensor) for tensor, master in zip(batch, flat.split(sizes), strict=True)
        }
    return gathered


def _messages(tensors: Iterable[Any], kind: Callable[[Any], Any]) -> list[list[Any]]:
    """`tensors` in groups of the same kind, of `ELEMENTS_PER_MESSAGE` or a little more."""
    messages: dict[Any, list[Any]] = {}
    totals: Counter[Any] = Counter()
    for tensor in tensors:
        of_kind = kind(tensor)
        messages.setdefault((of_kind, totals[of_kind] // ELEMENTS_PER_MESSAGE), []).append(tensor)
        totals[of_kind] += math.prod(tensor.ds_shape if _is_split(tensor) else tensor.shape)
    return list(messages.values())


def _write_split(tensor: Any, value: torch.Tensor) -> None:
    """
    Copy `value`, which every process has whole, into the part of a parameter that ZeRO-3 lets this process hold.
    """
    tensor.ds_tensor.copy_(_own_part(tensor, value))
    tensor.ds_secondary_tensor = None  # of hpZ, which would gather it instead; made anew, as after a step
    if tensor.numel() == tensor.ds_numel:  # it keeps whole copies of small ones
        tensor.copy_(value)


def _is_split(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter that ZeRO-3 has split."""
    return hasattr(tensor, "ds_tensor")


def _write_master(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, whole, into the master of a parameter."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if _is_split(tensor):
        safe_set_local_fp32_param(tensor, _own_part(tensor, value))
    else:
        safe_set_full_fp32_param(tensor, value)


def _part(tensor: Any) -> torch.Tensor:
    """What this process holds of a parameter that ZeRO-3 has split, or of its master."""
    if not _has_finer_master(tensor):
        return tensor.ds_tensor
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(tensor)


def _own_part(tensor: Any, value: torch.Tensor) -> torch.Tensor:
    """
    What ZeRO-3 has this process hold of `value`: parts of the same size, the last ones filled up with zeros.

    `safe_set_full_fp32_param` does not fill up, and fails if the number of elements is no multiple of that of the
    processes.
    """
    size = tensor.ds_tensor.numel()
    start = size * torch.distributed.get_rank(tensor.ds_process_group)
    part = value.flatten()[start : start + size]
    return nn.functional.pad(part, (0, size - len(part)))


def _has_master(tensor: torch.Tensor) -> bool:
    # set by ZeRO-1 and 2, and by ZeRO-3, once the engine has been built; ZeRO-3 also marks what is not trained
    return tensor.requires_grad and (hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer"))


def _has_finer_master(tensor: torch.Tensor) -> bool:
    # a float32 copy equals its master after every step and every write, and the masters take a message
    return _has_master(tensor) and tensor.dtype != torch.float32
