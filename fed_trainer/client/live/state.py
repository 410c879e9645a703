# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors of a live model as a dictionary that travels, read and written in place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ...state.adapter_state import AdapterState, check_same_layout, first_lacking
from ..engines import Engine


__all__ = ["LiveState"]


class LiveState:
    """
    Tensors of a model as an [`AdapterState`], read and written in place.

    The parameters and buffers behind the keys are looked up once, by the subclass; the model, the wrapper around it
    (DDP, a DeepSpeed engine) and the optimiser go on holding the same objects, unless the engine replaces them. If the
    engine holds the weights, all processes have to read and write together.
    """

    engine: Engine = Engine()
    """What runs the model; one process that holds it whole, if nothing else is said (see [`live_state`])."""

    saved_file_is_state: bool = True
    """
    Whether `save_pretrained` writes all that is needed to train on; if not, a checkpoint holds the state beside it.
    """

    _tensors: dict[str, torch.Tensor]  # all that is saved
    _frozen: set[str]  # keys of what no client trains, which does not travel

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By key the parameters and buffers themselves, all that is saved."""
        return self._tensors

    def take_over(self, tensors: dict[str, torch.Tensor]) -> None:
        """The engine has put other parameters and buffers in the place of those behind the keys."""
        self._tensors = tensors

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
        return {
            key: whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, whole in zip(tensors, self.engine.read(tensors.values()), strict=True)
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
        return {key: self.engine.shape(tensor) for key, tensor in self._tensors.items()}

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
        self.engine.write((self._tensors[key], value) for key, value in state.items())

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
