# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
The one door for files that somebody else may have written: JSON, safetensors and PEFT configs.

What is wrong is said in a sentence with the file's name, before anything of the size that the file claims is allocated
and before a pattern in it is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .patterns import PLACES, check_pattern


__all__ = [
    "ADAPTER_DTYPES",
    "FEDERA_CONFIG_NAME",
    "check_adapter_files",
    "check_config_file",
    "check_shapes",
    "read_json",
    "read_json_lines",
    "read_peft_config",
    "read_shapes",
    "read_tensors",
    "short_repr",
]

Config = TypeVar("Config", bound=PeftConfig)
Shapes = dict[str, tuple[int, ...]]

# bytes per element, by their names in a file
_ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
ADAPTER_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U8"})
"""What an adapter can consist of: numbers that are trained, beside counts and indices."""

FEDERA_CONFIG_NAME = "federa_config.json"  # beside the adapter_config.json of the plain LoRA

MOST_JSON = 2**30  # bytes; the record of a run with very many clients and rounds is large
MOST_CONFIG = 2**24
MOST_HEADER = 100_000_000  # as safetensors

# of a PEFT config: what decides about sizes, and what is used as patterns, with the ways that PEFT puts around them
_SIZES = (
    "r",
    "num_virtual_tokens",
    "encoder_hidden_size",
    "token_dim",
    "init_r",
    "target_r",
    "num_layers",
    "encoder_num_layers",
)
_LARGEST_SIZE = 2**16
_SIZES_IN_FILE = ("r", "num_virtual_tokens")  # and `rank_pattern`: sizes of tensors in the file, for these types
_TYPES_WITH_SIZES = ("LORA", "SCL", "FEDERA", "LOHA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
_PATTERNS = {
    "target_modules": 1,
    "exclude_modules": 1,
    "layers_pattern": PLACES,
    "rank_pattern": PLACES,
    "alpha_pattern": PLACES,
    "modules_to_save": PLACES**2,
}


def read_json(path: str | os.PathLike, most_bytes: int = MOST_JSON) -> dict[str, Any]:
    """
    The dictionary in a JSON file.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        most_bytes (`int`, *optional*, defaults to `2**30`):
            The size up to which it is read.

    Raises:
        ValueError: If it cannot be read, is larger, or does not hold a dictionary in which every name occurs once.
    """
    path = Path(path)
    return _parsed(path, _content(path, most_bytes))


def read_json_lines(path: str | os.PathLike, most_bytes: int = MOST_JSON) -> list[dict[str, Any]]:
    """
    The dictionaries in a JSON-lines file. A last line without a line break is left out: its writer died before it was
    written.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        most_bytes (`int`, *optional*, defaults to `2**30`):
            The size up to which it is read.

    Raises:
        ValueError: If it cannot be read, is larger, or another line does not hold a dictionary in which every name
            occurs once.
    """
    path = Path(path)
    lines = _content(path, most_bytes).split(b"\n")[:-1]
    return [_parsed(path, line, f"line {number}") for number, line in enumerate(lines, start=1)]


def read_shapes(path: str | os.PathLike, dtypes: Collection[str] | None = None) -> Shapes:
    """
    The shapes of the tensors in a safetensors file, from its header alone.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        dtypes (`Collection[str]`, *optional*):
            The dtypes that are taken, such as `ADAPTER_DTYPES`; any if not given.

    Raises:
        ValueError: If the header is none, does not agree with the size of the file, or has another dtype.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MOST_HEADER, size - 8):
                raise _damaged(path, "it is no safetensors file, or was cut off")
            header = _parsed(path, file.read(length))
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"the metadata in its header are {short_repr(metadata)}")
    shapes: Shapes = {}
    places: list[tuple[int, int]] = []
    for name, entry in header.items():
        shapes[name] = _shape(path, name, entry, dtypes)
        places.append(tuple(entry["data_offsets"]))
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise _damaged(path, "its tensors overlap, or leave gaps")
        end = last
    if end != size - 8 - length:
        raise _damaged(path, f"its tensors take {end} bytes, but the file has {size - 8 - length} for them")
    return shapes


def read_tensors(
    path: str | os.PathLike,
    dtypes: Collection[str] | None = ADAPTER_DTYPES,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, on the CPU.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        dtypes (`Collection[str]`, *optional*):
            The dtypes that are taken.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*):
            The shapes that the model has room for, by name; compared before anything is read.
        kwargs:
            As in [`~safetensors.torch.load_file`].

    Raises:
        ValueError: As `read_shapes`, or if the shapes are not those that are expected.
    """
    shapes = read_shapes(path, dtypes)
    if expected is not None:
        check_shapes(shapes, expected, f"The file {os.fspath(path)!r}")
    try:
        return load_file(path, **kwargs)
    except (SafetensorError, OSError) as error:
        raise _damaged(Path(path), f"safetensors cannot read it ({error})") from error


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """
    Refuse tensors that are not those of the model.

    Args:
        found, expected (`Mapping[str, tuple[int, ...]]`):
            Shapes by name.
        source (`str`):
            Where they were found, the subject of the error message.

    Raises:
        ValueError: Naming `source` and the first tensor that is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit: {len(missing)} tensors are missing (the first: {missing[:1]}) and "
            f"{len(unexpected)} are unexpected (the first: {unexpected[:1]}). It belongs to another base model or "
            "another PEFT config."
        )
    for key, shape in expected.items():
        if tuple(found[key]) != tuple(shape):
            raise ValueError(
                f"{source} does not fit: {key} has the shape {tuple(found[key])} instead of {tuple(shape)}. It "
                "belongs to another base model or another PEFT config."
            )


def check_adapter_files(folder: str | os.PathLike, base: nn.Module | None = None) -> None:
    """
    Check what there is of the configs and weights of an adapter in a folder, before PEFT reads them.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        base (`nn.Module`, *optional*):
            The base model. If given, no tensor may be larger than the model and the rank have room for, and all have
            to be finite.

    Raises:
        ValueError: If a config is no dictionary, has a size that is none, that is too large or that no tensor of the
            file has, or a pattern that could match for hours; if the weights are no tensors of an adapter.
    """
    weights = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    shapes = read_shapes(weights, ADAPTER_DTYPES) if weights.exists() else None
    paths = [path for name in (CONFIG_NAME, FEDERA_CONFIG_NAME) if (path := Path(folder, name)).exists()]
    largest_size = max([1, *(check_config_file(path, shapes) for path in paths)])
    if base is None or shapes is None:
        return
    sizes = [tuple(parameter.shape) for parameter in base.parameters()]
    room = max(*map(math.prod, sizes), 2 * largest_size * max(size for shape in sizes for size in shape))
    for key, shape in shapes.items():
        if math.prod(shape) > room:
            raise _damaged(weights, f"{key} has the shape {shape}, for which the model has no room")
    for key, tensor in read_tensors(weights).items():
        if not tensor.is_floating_point() and any(prefix in key for prefix in (".lora_", ".scl_")):
            raise _damaged(weights, f"{key} is {tensor.dtype}, but a factor consists of floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise _damaged(weights, f"{key} has values that are not finite in float32")


def check_config_file(path: Path, shapes: Shapes | None = None) -> int:
    """
    As [`check_adapter_files`], for one config and the shapes of the weights beside it; the largest size that it names.
    """
    config = read_json(path, MOST_CONFIG)
    sizes = {name: config[name] for name in _SIZES if config.get(name) is not None}
    for field in ("rank_pattern", "alpha_pattern"):
        values = config.get(field)
        if values is not None and not isinstance(values, dict):
            raise _damaged(
                path, f"`{field}` is of type {type(values).__name__}, but it should be a dictionary by pattern"
            )
        sizes |= {f"{field}[{key!r}]": value for key, value in (values or {}).items() if field == "rank_pattern"}
    largest = max((size for shape in (shapes or {}).values() for size in shape), default=_LARGEST_SIZE)
    is_in_file = config.get("peft_type") in _TYPES_WITH_SIZES
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= max(_LARGEST_SIZE, largest):
            raise _damaged(path, f"`{name}` is {short_repr(value)}, but it should be the size of a tensor")
        if is_in_file and name.startswith(_SIZES_IN_FILE) and value > largest:
            raise _damaged(
                path, f"`{name}` is {value}, but no tensor in {SAFETENSORS_WEIGHTS_NAME} is larger than {largest}"
            )
    for field, factor in _PATTERNS.items():
        _check_patterns(path, field, config.get(field), factor)
    return max(sizes.values(), default=0)


def read_peft_config(cls: type[Config], source: str | os.PathLike, **kwargs: Any) -> Config:
    """
    A PEFT config, or why there is none in a sentence.

    Args:
        cls (`type[PeftConfig]`):
            The class; `PeftConfig` itself gives that of the type that the file names.
        source (`str` or `os.PathLike`):
            Folder, checked before, or Hub id.
        kwargs:
            As in [`~peft.PeftConfig.from_pretrained`].

    Raises:
        ValueError: If the file is none.
    """
    source = os.fspath(source)
    try:
        return cls.from_pretrained(source, **kwargs)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"The PEFT config in {source!r} cannot be used ({type(error).__name__}: {error}). Was it written by PEFT, "
            "by a version that this one reads?"
        ) from error


def short_repr(value: Any) -> str:
    """`repr(value)`, cut off where it would fill a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_patterns(path: Path, field: str, value: Any, factor: float) -> None:
    if value is None:
        return
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, dict)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _damaged(path, f"`{field}` should be names or patterns, but is {short_repr(value)}")
    if field in ("target_modules", "exclude_modules") and not isinstance(value, str):
        return  # of a list PEFT takes the names literally
    for pattern in patterns:
        check_pattern(pattern, f"In the file {str(path)!r}, `{field}`:", factor * max(1, len(patterns) // PLACES))


def _shape(path: Path, name: str, entry: Any, dtypes: Collection[str] | None) -> tuple[int, ...]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} in its header is {short_repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in _ITEM_SIZES if dtypes is None else dtype not in dtypes):
        raise _damaged(path, f"{name} is of the dtype {short_repr(dtype)}, which no adapter consists of")
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**60 for value in values):
            raise _damaged(path, f"the entry of {name!r} in its header is {short_repr(entry)}")
    if len(shape) > 16 or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise _damaged(path, f"{name} claims the shape {short_repr(shape)}, but has other bytes than that takes")
    return tuple(shape)


def _content(path: Path, most_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise _damaged(path, f"it has {size} bytes, more than the {most_bytes} that such a file can have")
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error


def _parsed(path: Path, text: bytes, part: str = "it") -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise _damaged(path, f"{part} {reason}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"{part} holds {short_repr(content)}, not a dictionary")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:60]!r} occurs more than once")
    return entries


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"The file {str(path)!r} cannot be used: {reason}. Restore it from where it came from, or leave it out."
    )
