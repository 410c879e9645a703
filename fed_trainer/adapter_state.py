# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The small dictionary of tensors that travels: read from a live model, written to it, and checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_scl import FederaConfig, FederaLayer, federa_state_dict
from peft_scl.federa.state import stacked_shapes, unstack_start
from peft_scl.foreign_files import check_shapes
from peft_scl.linalg import evenly_spaced

from .engine_deepspeed import gather, is_split, write_master, write_split
from .engine_fsdp import FSDPModule, discard_whole_copies, named_tensors, sharded_modules, whole, write_whole


__all__ = [
    "AdapterState",
    "LiveAdapter",
    "LiveState",
    "base_digest",
    "check_same_layout",
    "first_lacking",
    "foreign_kind",
    "state_bytes",
    "subtract",
]


AdapterState = dict[str, torch.Tensor]  # on CPU, contiguous, keyed as PEFT saves it


_REFUSED = {
    "ADALORA": "it moves ranks between layers by statistics that it keeps outside the adapter and that would go on from client "
    "to client. Use LORA.",
}

_STATEFUL_FIELDS = ("velora_config", "monteclora_config")  # of a `LoraConfig`

_ALTERNATIVES = {"VBLORA": "Set `save_only_topk_weights=False`."}


class LiveState:
    """
    Tensors of a model as an [`AdapterState`], read and written in place.

    The parameters and buffers behind the keys are looked up once, by the subclass; the model, the wrapper around it (DDP, a
    DeepSpeed engine) and the optimiser go on holding the same objects. Only FSDP2 puts others in their place, see `following`. Under
    DeepSpeed and FSDP2 all processes have to read and write together.
    """

    saved_file_is_state: bool = True
    """Whether `save_pretrained` writes all that is needed to train on; if not, a checkpoint holds the state beside it."""

    _tensors: dict[str, torch.Tensor]  # all that is saved
    _frozen: set[str]  # keys of what no client trains, which does not travel
    _sharded_modules: Collection[FSDPModule] = ()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Within, FSDP2 may replace the parameters of `model`, whose tensors these are; then they are looked up by their names."""
        names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        name_of = {key: names[id(tensor)] for key, tensor in self._tensors.items()}
        yield
        tensors = named_tensors(model)
        self._tensors = {key: tensors[name] for key, name in name_of.items()}
        self._sharded_modules = sharded_modules(model)

    @property
    def tensor_ids(self) -> set[int]:
        """`id` of every parameter and buffer that is saved."""
        return {id(tensor) for tensor in self._tensors.values()}

    @property
    def buffers(self) -> set[str]:
        """Keys of what training changes without gradients, such as running statistics."""
        return {
            key
            for key, tensor in self._tensors.items()
            if key not in self._frozen and not isinstance(tensor, nn.Parameter)
        }

    def freeze(self, keys: Collection[str]) -> None:
        """Train these parameters no more: they no longer travel."""
        for key in keys:
            self._tensors[key].requires_grad_(False)
        self._frozen |= set(keys)

    def train_only(self, keys: Collection[str] | None) -> None:
        """Let these of the travelling parameters require gradients, or all of them."""
        for key, tensor in self._tensors.items():
            if key not in self._frozen and isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(keys is None or key in keys)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train now, themselves."""
        return {
            key: tensor
            for key, tensor in self._tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }

    @torch.no_grad()
    def read(self, include_frozen: bool = False) -> AdapterState:
        """A copy on CPU: what is trained, or all that is saved."""
        tensors = {key: tensor for key, tensor in self._tensors.items() if include_frozen or key not in self._frozen}
        gathered = gather(tensors.values())
        return {
            key: gathered.get(id(tensor), whole(tensor.detach())).to(
                "cpu", copy=True, memory_format=torch.contiguous_format
            )
            for key, tensor in tensors.items()
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        """By key the dtype in which the model holds the tensor."""
        return {key: tensor.dtype for key, tensor in self._tensors.items()}

    def model_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with what is saved whole, for `save_pretrained` of a model whose weights are split."""
        state = self.read(include_frozen=True)
        saved = {id(tensor): state[key] for key, tensor in self._tensors.items()}
        return {name: saved.get(id(tensor), tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    @contextmanager
    def publishable(self) -> Iterator[None]:
        """Within, `save_pretrained` of the model writes what it computes."""
        yield

    def lacking(self, saved: Mapping[str, tuple[int, ...]]) -> str | None:
        """
        What a file that is to hold this state lacks, if it does.

        Args:
            saved (`Mapping[str, tuple[int, ...]]`):
                Names and shapes of the tensors in the file.
        """
        return first_lacking(self._saved_layout(), saved)

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `save_pretrained` writes of the state."""
        return {key: _whole_shape(tensor) for key, tensor in self._tensors.items()}

    def saved_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """
        Shapes of what `save_pretrained` writes of it, by name in the file; `None` if that is not known beforehand.
        """
        return None

    def saved(self) -> AdapterState:
        """All that is saved, in the form that `load` takes."""
        return self.read(include_frozen=True)

    @torch.no_grad()
    def write(self, state: AdapterState) -> None:
        """Copy `state` into the model; it must have the layout of what `read` gives (see [`check_same_layout`])."""
        discard_whole_copies(self._sharded_modules)
        for key, value in state.items():
            tensor = self._tensors[key]
            if is_split(tensor):
                write_split(tensor, value)
            else:
                write_whole(tensor, value)
            write_master(tensor, value)

    def load(self, saved: AdapterState, source: str) -> None:
        """
        Write a whole state, as `saved` gives it, into the model.

        Args:
            saved (`dict[str, torch.Tensor]`):
                The tensors of a checkpoint.
            source (`str`):
                Where they came from, for the error message.

        Raises:
            ValueError: If they do not fit.
        """
        check_same_layout(saved, self.read(include_frozen=True), source)
        self.write(saved)

    def from_saved(self, saved: AdapterState, source: str) -> AdapterState:
        """
        The state in a file of `save_pretrained`.

        Args:
            saved (`dict[str, torch.Tensor]`):
                The tensors of the file.
            source (`str`):
                Where they came from, for the error message.

        Raises:
            ValueError: If the file does not hold the state.
        """
        return saved


class LiveAdapter(LiveState):
    """
    The active adapter of a model as an [`AdapterState`], read and written in place.

    Args:
        model ([`~peft.PeftModel`]):
            A model with exactly one active adapter.

    Raises:
        ValueError: If several adapters are active, a saved tensor is not a parameter or buffer of the model, or the type keeps
            what it learns elsewhere.
    """

    def __init__(self, model: PeftModel) -> None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"The adapters {active} are active, but a federation trains one adapter. Call `set_adapter` with one name."
            )
        kind = PeftType(model.peft_config[active[0]].peft_type).value
        if kind in _REFUSED:
            raise ValueError(f"An adapter of type {kind} cannot be federated: {_REFUSED[kind]}")
        for field in _STATEFUL_FIELDS:
            if getattr(model.peft_config[active[0]], field, None) is not None:
                raise ValueError(
                    f"`{field}` keeps what it has seen or drawn in buffers that it replaces while it trains, so they would go on "
                    "from client to client. Leave it out."
                )
        owners = {tensor.data_ptr(): tensor for tensor in [*model.buffers(), *model.parameters()]}
        self._model, self._name = model, active[0]
        self._is_federa = isinstance(model.peft_config[active[0]], FederaConfig)
        # PEFT saves FeDeRA as a plain LoRA of twice the rank, which is not what is trained
        state_dict = federa_state_dict if self._is_federa else get_peft_model_state_dict
        saved = state_dict(model, adapter_name=active[0])
        self._tensors = {}
        for key, tensor in sorted(saved.items()):
            if tensor.numel() == 0 or tensor.is_meta:
                raise ValueError(
                    f"The adapter tensor {key} is empty or not held by this process, as in a partitioned (ZeRO-3, FSDP) or "
                    "meta-device model, so it cannot be federated. Load the model unpartitioned."
                )
            if tensor.data_ptr() not in owners:
                raise ValueError(
                    f"The adapter tensor {key} is no parameter or buffer of the model: {kind} makes it when it is saved, so what "
                    f"a client sends could not be written back. {_ALTERNATIVES.get(kind, 'Use another type, such as LORA.')}"
                )
            owner = owners[tensor.data_ptr()]
            if owner.shape != tensor.shape:
                raise ValueError(
                    f"The adapter tensor {key} is the memory of a parameter of the shape {tuple(owner.shape)}, seen as "
                    f"{tuple(tensor.shape)}: two layers share it (`ensure_weight_tying=True`), and it would be averaged twice. "
                    "Set `ensure_weight_tying=False`, or target one of the layers."
                )
            self._tensors[key] = owner
        # What no client trains is the same everywhere and does not travel: frozen parameters, and buffers, which hold what a
        # method starts from or projects with. Only those of `modules_to_save`, such as running statistics, change.
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        trained |= {
            id(b) for module in model.modules() if isinstance(module, ModulesToSaveWrapper) for b in module.buffers()
        }
        self._frozen = set()
        for key, owner in self._tensors.items():
            if id(owner) in trained:
                trained.remove(id(owner))  # one that layers share is saved under several names and travels once
            else:
                self._frozen.add(key)

    def _saved_layout(self) -> dict[str, tuple[int, ...]]:
        layout = super()._saved_layout()
        return stacked_shapes(layout) if self._is_federa else layout

    def saved_shapes(self) -> dict[str, tuple[int, ...]] | None:
        return self._saved_layout()

    def saved(self) -> AdapterState:
        """The adapter as PEFT saves it."""
        if not self._is_federa:
            return super().saved()
        stacked = get_peft_model_state_dict(self._model, adapter_name=self._name)
        return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stacked.items()}

    def load(self, saved: AdapterState, source: str) -> None:
        """Write an adapter as PEFT saves it, whole, into the model."""
        if not self._is_federa:
            super().load(saved, source)
            return
        check_plain(saved, source)
        check_shapes({key: tuple(tensor.shape) for key, tensor in saved.items()}, self._saved_layout(), source)
        state, here = unstack_start(saved), self.read(include_frozen=True)
        check_same_layout(state, here, source)
        if not all(torch.equal(state[key].to(here[key].dtype), here[key]) for key in self._frozen):
            self._load_start(state)
        self.write(state)

    def _load_start(self, state: AdapterState) -> None:
        """Of FeDeRA: another start moves the base model with it."""
        for name, layer in self._model.named_modules():
            if isinstance(layer, FederaLayer) and self._name in layer.keep_base:
                start_A, start_B = (state[f"{name}.lora_start_{letter}"] for letter in "AB")
                layer.load_start(self._name, start_A, start_B)


def first_lacking(layout: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> str | None:
    """In words, the first tensor of `layout` that is not in `saved` with its shape."""
    for key, shape in layout.items():
        if key not in saved:
            return f"{sum(name not in saved for name in layout)} tensors are missing (the first: {key})"
        if saved[key] != shape:
            return f"{key} has the shape {saved[key]} instead of {shape}"
    return None


def _whole_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.ds_shape if is_split(tensor) else tensor.shape)


def subtract(local: AdapterState, start: AdapterState) -> AdapterState:
    """`local - start` per tensor, in the dtype of `start`."""
    return {key: local[key] - tensor for key, tensor in start.items()}


def state_bytes(state: AdapterState) -> int:
    """Bytes of the tensors, without any framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def check_same_layout(state: AdapterState, reference: AdapterState, source: str) -> None:
    """
    Raise unless `state` has the keys and shapes of `reference`, and plain tensors of values that are finite in its
    dtypes.

    Args:
        state (`dict[str, torch.Tensor]`):
            What came in.
        reference (`dict[str, torch.Tensor]`):
            What is expected.
        source (`str`):
            Where `state` came from, the subject of the error message (`"The update of client 'a'"`).

    Raises:
        ValueError: Naming `source`, the first offending tensor and what is wrong with it.
    """
    check_plain(state, source)
    found, expected = ({key: tuple(tensor.shape) for key, tensor in part.items()} for part in (state, reference))
    check_shapes(found, expected, source)
    for key, tensor in state.items():
        dtype = reference[key].dtype
        if not (is_trainable_kind(tensor.dtype) and dtype.is_floating_point) and tensor.dtype != dtype:
            raise ValueError(
                f"{source} does not fit: {key} is {tensor.dtype}, which cannot stand for the {dtype} of the model. It was not written by "
                "a training run."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source} has values that are not finite in {key}. Lower `learning_rate`, or set `max_grad_norm`."
            )
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(
                f"{source} has values in {key} that {dtype}, in which the model holds it, cannot represent. Load the model in a wider "
                "dtype."
            )


def check_plain(state: AdapterState, source: str) -> None:
    """
    Raises:
        ValueError: If something in `state` is no plain tensor in memory.
    """
    for key, value in state.items():
        if (kind := foreign_kind(value)) is not None:
            raise ValueError(f"{source} does not fit: {key} is {kind}, but it should be a plain tensor in memory.")


def is_trainable_kind(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can be what training gave: not float8, whose values are nothing without a scale."""
    return dtype.is_floating_point and dtype.itemsize > 1


def foreign_kind(tensor: object) -> str | None:
    """What something is, if it is no tensor whose values can be read as they are."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):  # a subclass may answer what it likes
        return f"of type {type(tensor).__name__}"
    assert isinstance(tensor, torch.Tensor)
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"of the layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type!r}"
    if tensor.is_quantized or tensor.is_complex():
        return f"of the dtype {tensor.dtype}"
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + reach) * tensor.itemsize:
        return "without the memory that it claims"
    return None


def base_digest(model: PeftModel) -> str | None:
    """
    SHA-256 over names, shapes and a sample of the base weights, to tell whether two runs hold the same base model.

    64 evenly spaced values of every tensor are rounded to bfloat16 first, so that loading the same checkpoint in float32
    or bfloat16 gives the same digest. It detects another checkpoint, not a manipulated one. A base that holds the residual
    of a FeDeRA adapter counts as what it was before. A module in `modules_to_save` does not count: its copy is part of the
    adapter, and the original, such as the random head of a classifier, is not used.

    Returns:
        `str` or `None`: The digest, or `None` for a quantised base, whose stored values are not the checkpoint's.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        return None
    digest = hashlib.sha256()
    residuals = {
        id(module.get_base_layer().weight): module.original_sample
        for module in base.modules()
        if isinstance(module, FederaLayer) and module.original_sample is not None
    }
    for name, parameter in sorted(_base_parameters(base).items()):
        with gather_params_ctx(parameter, modifier_rank=None):
            sample = residuals[id(parameter)] if id(parameter) in residuals else evenly_spaced(parameter)
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the pretrained model under the names they have without adapters, each once."""
    modules: list[tuple[str, nn.Module]] = list(base.named_modules(remove_duplicate=False))
    added = tuple(
        f"{name}.{child}."
        for name, module in modules
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for child, _ in module.named_children()
        if child not in ("base_layer", "token_adapter")  # of these the children are judged
    )
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.startswith(added):
            parameters.setdefault(id(parameter), (name, parameter))
    return {
        re.sub(r"\.(base_layer|token_adapter)(?=\.)", "", name): parameter for name, parameter in parameters.values()
    }
