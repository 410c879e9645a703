# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The two forms of a FeDeRA adapter: the plain LoRA of rank `2 r` in a file, with `lora_A = [A; A0]` and
`lora_B = [B, -B0]`, and the factors `A`, `B`, `A0` and `B0` of the live model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..foreign_files import check_adapter_files, read_peft_config
from .config import FederaConfig
from .embedding import Embedding
from .layer import FederaLayer


__all__ = ["check_saved_shapes", "federa_state_dict", "load_federa", "stack_start", "stacked_shapes", "unstack_start"]


_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?")


def stack_start(state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """
    Put the start of an adapter below and beside its factors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The adapter's part of the state dict of a model.
        adapter_name (`str`):
            Its name, which the keys contain.

    Returns:
        `dict[str, torch.Tensor]`: The same with factors of rank `2 r`, and without the start.

    Raises:
        ValueError: If tensors are empty.
    """
    empty = sorted(key for key, tensor in state_dict.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(
            f"{len(empty)} tensors of the FeDeRA adapter {adapter_name!r} are empty (the first: {empty[0]}), as under "
            "DeepSpeed ZeRO-3 before they are gathered, so saving would write a broken adapter. Save through "
            "`Trainer.save_model`, or pass the gathered `state_dict`."
        )
    stacked = dict(state_dict)
    for key in state_dict:
        if not key.endswith((f".lora_start_A.{adapter_name}", f".lora_start_B.{adapter_name}")):
            continue
        start = stacked.pop(key)
        place = key.removesuffix(f".{adapter_name}")
        module, letter = place[: -len(".lora_start_A")], place[-1]
        trained = f"{module}.lora_{letter}.{adapter_name}.weight"
        if trained not in stacked:
            trained = f"{module}.lora_embedding_{letter}.{adapter_name}"
        factor = stacked[trained].detach()
        start = start.to(factor)
        stacked[trained] = torch.cat([factor, start]) if letter == "A" else torch.cat([factor, -start], dim=1)
    return stacked


def unstack_start(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Undo [`stack_start`], on the keys of an adapter file.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            What `save_pretrained` has written.

    Returns:
        `dict[str, torch.Tensor]`: The factors of rank `r` and, as `lora_start_A` and `lora_start_B`, their start.

    Raises:
        ValueError: If a factor has an odd rank, so that it cannot be one of FeDeRA.
    """
    state: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            state[key] = tensor
            continue
        dim = 0 if match[3] == "A" else 1
        if tensor.dim() != 2:
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)}, but a factor is a matrix. It is not one of FeDeRA."
            )
        if tensor.shape[dim] % 2:
            raise ValueError(
                f"{key} has the rank {tensor.shape[dim]}, but a FeDeRA adapter is saved with twice its rank, the "
                "trained factors and their start. This is another LoRA adapter: load it without FeDeRA."
            )
        trained, start = tensor.chunk(2, dim=dim)
        state[key] = trained.contiguous()
        state[f"{match[1]}.lora_start_{match[3]}"] = (start if dim == 0 else -start).contiguous()
    return state


def stacked_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes in an adapter file, from those of what [`federa_state_dict`] gives."""
    stacked = {}
    for key, shape in shapes.items():
        match = _FACTOR.fullmatch(key)
        if match is not None and f"{match[1]}.lora_start_{match[3]}" in shapes:
            shape = (2 * shape[0], *shape[1:]) if match[3] == "A" else (*shape[:-1], 2 * shape[-1])
        if ".lora_start_" not in key:
            stacked[key] = shape
    return stacked


def check_saved_shapes(model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """
    Compare the factors of a checkpoint with those that `model` has room for.

    Args:
        model (`nn.Module`):
            A model with the adapter in place.
        state_dict (`Mapping[str, torch.Tensor]`):
            The checkpoint, unstacked, with the names of `model` without `base_model.model.`.
        adapter_name (`str`):
            The adapter to load it into.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    ending = re.compile(rf".*\.lora_(embedding_|start_)?[AB]\.{re.escape(adapter_name)}(\.weight)?")
    # not the parameters themselves, which FSDP shards
    needed = {key: tensor for key, tensor in model.state_dict().items() if ending.fullmatch(key)}
    for key, tensor in needed.items():
        key = key.removeprefix("base_model.model.")
        found = tuple(state_dict[key].shape) if key in state_dict else None
        if found is None:
            raise ValueError(
                f"The checkpoint has no {key}, which the FeDeRA adapter {adapter_name!r} needs. It belongs to another "
                "base model or other `target_modules`."
            )
        if found != tuple(tensor.shape):
            raise ValueError(
                f"The checkpoint does not fit the FeDeRA adapter {adapter_name!r}: {key} has the shape {found}, but "
                f"{tuple(tensor.shape)} is needed here. It belongs to another base model or another rank."
            )


def federa_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """
    The live tensors of a FeDeRA adapter, as they are trained: what a federation reads, averages and writes.

    Args:
        model (`nn.Module`):
            A [`~peft.PeftModel`], or a transformers model with an adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter.

    Returns:
        `dict[str, torch.Tensor]`: As [`~peft.get_peft_model_state_dict`], with the factors of rank `r` and, as
        `lora_start_A` and `lora_start_B`, their start. The tensors share their memory with the model.
    """
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for name, layer in model.named_modules():
        if isinstance(layer, FederaLayer) and adapter_name in layer.keep_base:
            infix, suffix = ("embedding_", "") if isinstance(layer, Embedding) else ("", ".weight")
            for letter, trained in zip("AB", layer.trained_factors(adapter_name), strict=True):
                state[f"{name}.lora_{infix}{letter}{suffix}"] = trained.detach()
                state[f"{name}.lora_start_{letter}"] = getattr(layer, f"lora_start_{letter}")[adapter_name]
    return state


def load_federa(
    model: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """
    Load a saved adapter as what it was trained as, to continue its training.

    Factors, start and residual base are, bit for bit, those of the model that was saved, if the base model is the
    same. (`PeftModel.from_pretrained` loads the same files as a plain LoRA of twice the rank.)

    Args:
        model (`nn.Module`):
            The base model, or a [`~peft.PeftModel`] with other FeDeRA adapters (`keep_base=True`).
        model_id (`str` or `os.PathLike`):
            Folder or Hub id of the adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Its name in the model.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to train it on.
        kwargs:
            As in [`~peft.PeftModel.from_pretrained`].

    Returns:
        [`~peft.PeftModel`]: The model with the adapter.

    Raises:
        ValueError: If the folder holds no adapter that FeDeRA has saved, or one that does not fit the model.

    Example:

        ```py
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = load_federa(model, "federa-adapter", is_trainable=True)
        ```
    """
    path = os.fspath(model_id)
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "cache_dir", "token") if key in kwargs}
    if os.path.isdir(path):
        check_adapter_files(os.path.join(path, hub.get("subfolder") or ""), base=model)
    config = read_peft_config(FederaConfig, path, **hub)
    config.inference_mode = not is_trainable
    config.init_lora_weights = False  # no singular vectors, and no change of the base model, before the file is read
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.load_adapter(path, adapter_name, is_trainable=is_trainable, **kwargs)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name, is_trainable, config=config, **kwargs)
    except ValueError as error:
        raise ValueError(f"The adapter {path!r} cannot be loaded: {error}") from error
    config.init_lora_weights = True
    return model
