# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a setting or an argument is, as JSON keeps it: by value, class or code, never by address, so that two sessions can
be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch


__all__ = ["agree", "described", "difference", "is_secret", "qualified_name", "storable"]


# what says where or by which version a config was written
_VOLATILE = frozenset({"_name_or_path", "name_or_path", "cache_dir", "transformers_version", "peft_version"})
_SECRET = re.compile(r"api_?key|secret|passw|credential|^(auth_|access_|use_auth_|hub_|hf_)?token$", re.IGNORECASE)
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_OF_DATA = ("datasets", "pandas", "polars", "pyarrow")  # their `to_dict` reads all rows
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def is_secret(name: str) -> bool:
    """Whether a setting of this name is to be kept out of files, such as `hub_token` or `api_key`."""
    return _SECRET.search(name) is not None


def storable(value: Any) -> Any:
    """
    A value as strict JSON takes it: numbers that are not finite become `"nan"`, `"inf"` and `"-inf"`, arrays lists,
    and what JSON has no form for the name of its class.
    """
    if isinstance(value, Enum):
        return value.value if isinstance(value, str) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return storable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): storable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(entry) for entry in value]
    return qualified_name(type(value))


def described(value: Any) -> Any:
    """
    What a setting or an argument is, in strict JSON.

    Functions are described by their name and, unless they are of an installed library, a digest of their code (with
    what they enclose, the functions of their module that they call and its constants that they read); objects by their
    class, and their fields if they are dataclasses or configs.
    """
    return _described(value, frozenset())


def agree(there: Any, here: Any) -> bool:
    """
    Whether two descriptions are of the same. The code of a function is compared within one version of Python only.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        ignored = set()
        if "function" in there and there.get("python") != here.get("python"):
            ignored = {"python", "digest", "uses"}
        keys = (there.keys() | here.keys()) - ignored
        return all(key in there and key in here and agree(there[key], here[key]) for key in keys)
    if isinstance(there, list) and isinstance(here, list):
        return len(there) == len(here) and all(agree(*pair) for pair in zip(there, here, strict=True))
    return bool(storable(there) == storable(here))


def difference(there: Any, here: Any) -> str | None:
    """
    Which code, or which value that code uses, is another in two descriptions that do not agree; `None` if it is not in
    a function.
    """
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        name = here.get("function")
        if isinstance(name, str) and there["function"] == name:
            uses = [value for value in here["uses"] if there["uses"].get(value) != here["uses"][value]]
            return f"{uses[0]!r}, which {name} uses, is another" if uses else f"the code of {name} is another"
        pairs = [(there[key], here[key]) for key in here]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = list(zip(there, here, strict=True))
    else:
        return None
    return next((difference(*pair) for pair in pairs if not agree(*pair)), None)


def qualified_name(kind: Any) -> str:
    """Of a class or function: the module and the name in it."""
    name = getattr(kind, "__qualname__", None) or type(kind).__qualname__
    return f"{getattr(kind, '__module__', None) or '?'}.{name}"


def _described(value: Any, seen: frozenset[int]) -> Any:
    if value is None or isinstance(value, (bool, int, str, float, Enum, np.generic)):
        return storable(value)
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    if isinstance(value, type):
        return qualified_name(value)
    if id(value) in seen:
        return "itself"
    seen |= {id(value)}
    if isinstance(value, Mapping):
        known = {str(key): entry for key, entry in value.items() if str(key) not in _VOLATILE}
        return {key: _described(entry, seen) for key, entry in known.items() if not is_secret(key)}
    if isinstance(value, AbstractSet):
        return sorted((_described(entry, seen) for entry in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_described(entry, seen) for entry in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _array(value, seen)
    return _described_object(value, seen)


def _array(value: torch.Tensor | np.ndarray, seen: frozenset[int]) -> Any:
    about: dict[str, Any] = {"class": qualified_name(type(value)), "dtype": str(value.dtype)}
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biufc":
            content = np.ascontiguousarray(value).tobytes()
        else:  # texts, times, objects
            entries = value.tolist() if value.dtype.kind in "OUS" else value.astype(str).tolist()
            content = _json(_described(entries, seen))
        return about | {"shape": list(value.shape), "digest": _digest(content)}
    if value.is_nested or value.is_meta or value.is_quantized or value.layout != torch.strided:
        return about  # of these there are no bytes to be looked at in one way
    array = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return about | {"shape": list(array.shape), "digest": _digest(array.view(-1).view(torch.uint8).numpy().tobytes())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _described_object(value: Any, seen: frozenset[int]) -> Any:
    if isinstance(value, functools.partial):
        parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
        return {"partial": {name: _described(part, seen) for name, part in parts.items()}}
    if isinstance(value, MethodType):
        inner: Any = value.__func__
        return _described(inner, seen)
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if inspect.isbuiltin(value) or inspect.ismethoddescriptor(value):
        return qualified_name(value)
    about = {"class": qualified_name(type(value))}
    if isinstance(value, torch.optim.Optimizer):
        groups = [{k: entry for k, entry in group.items() if k != "params"} for group in value.param_groups]
        return about | {"groups": _described(groups, seen)}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return about | {"fields": _described(fields, seen)}
    if type(value).__module__.partition(".")[0] not in _OF_DATA and not isinstance(value, torch.nn.Module):
        with suppress(Exception):  # a class of the user's, which may mean something else by it
            return about | {"fields": _described(value.to_dict(), seen)}
    if callable(value) and not isinstance(value, torch.nn.Module):
        call: Any = type(value).__call__
        return about | ({"call": _function(call, seen)} if isinstance(call, FunctionType) else {})
    return about


def _function(function: FunctionType, seen: frozenset[int]) -> Any:
    if _INSTALLED.search(function.__code__.co_filename):  # it may change with the version of a library
        return qualified_name(function)
    return {
        "function": qualified_name(function),
        "python": _PYTHON,
        "digest": _digest(_json(_instructions(function.__code__, function.__doc__))),
        "uses": {
            name: _digest(_json(_described(value, seen)))
            for name, value in _used(function).items()
            if not is_secret(name)
        },
    }


def _used(function: FunctionType) -> dict[str, Any]:
    """
    What a function does is also decided by its defaults, what it encloses, and the functions and constants of its
    module.
    """
    code, entries = function.__code__, function.__globals__
    used = {}
    for name in sorted(_names(code) & entries.keys()):
        entry = entries[name]
        is_helper = isinstance(entry, FunctionType) and entry.__module__ == function.__module__
        is_constant = name.isupper() and isinstance(entry, (bool, int, float, str, tuple, list, dict, frozenset))
        if is_helper or is_constant:
            used[name] = entry
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            used[name] = cell.cell_contents
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    used |= zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    return used | (function.__kwdefaults__ or {})


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _instructions(code: CodeType, doc: str | None = None) -> list[Any]:
    constants = [
        _instructions(constant)
        if isinstance(constant, CodeType)
        else sorted(map(repr, constant))
        if isinstance(constant, frozenset)
        else repr(constant)
        for constant in code.co_consts
        if doc is None or constant != doc
    ]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), list(code.co_freevars), constants]
