# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a run gets its adapter: from a config, from a folder or the Hub, and the same in all processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel, set_seed

from peft_scl.foreign_files import check_adapter_files, read_peft_config

from ..client.live.state import LiveState
from ..config import FederationArguments
from ..output.checkpoint import load_adapter
from ..output.hub import fetch_adapter
from ..output.record import read_header
from ..state.adapter_state import AdapterState, check_same_layout


__all__ = ["InitialAdapter", "wrapped"]


class InitialAdapter:
    """
    The adapter that a run starts from (`initial_adapter`). Its files have been looked at.

    Args:
        args ([`FederationArguments`]):
            The settings.
        model (`Any`), peft_config ([`~peft.PeftConfig`], *optional*):
            What the trainer was given beside it.

    Raises:
        ValueError: If it is no adapter, or another config was given too.
    """

    def __init__(self, args: FederationArguments, model: Any, peft_config: PeftConfig | None) -> None:
        source = args.initial_adapter
        assert source is not None
        if peft_config is not None or isinstance(model, PeftModel):
            raise ValueError(
                f"`initial_adapter` is {source!r}, which brings its own PEFT config, but a "
                f"{'`peft_config`' if peft_config is not None else '`PeftModel`'} was given too. Give one of them."
            )
        self.folder: Path = fetch_adapter(source, args.initial_adapter_revision, args.hub_token)
        if not (self.folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"`initial_adapter` takes adapters only, but {source!r} has no {CONFIG_NAME}. To start from a "
                f"whole model, load it with `from_pretrained({source!r})` and pass it as `model`."
            )
        check_adapter_files(self.folder)
        self.config = read_peft_config(PeftConfig, self.folder)
        self.config.inference_mode = False
        self._name = f"The adapter {source!r}"

    def write_into(self, live: LiveState, base_digest: str | None, base_model: str) -> AdapterState:
        """
        Write it into the live model.

        Args:
            live ([`LiveState`]):
                The tensors of the live model.
            base_digest (`str`, *optional*):
                Digest of its base model, compared with that of the run that the adapter is from.
            base_model (`str`):
                Name of the base model, for the message.

        Returns:
            `dict[str, torch.Tensor]`: the adapter.

        Raises:
            ValueError: If it does not fit, or is of another base model.
        """
        state = live.from_saved(load_adapter(self.folder, live.saved_shapes()), self._name)
        check_same_layout(state, live.read(include_frozen=True), self._name)
        record = read_header(self.folder)
        theirs = record.get("base_digest")
        if theirs is not None and base_digest is not None and theirs != base_digest:
            raise ValueError(
                f"{self._name} was trained on another base model ({record['base_model']!r}) than {base_model!r}: "
                "the shapes agree, the weights do not. Load that base model, or start without `initial_adapter`."
            )
        live.write(state)
        return state


def wrapped(model: str | nn.Module | None, peft_config: PeftConfig | None, seed: int) -> nn.Module:
    """
    The model with its adapter. TRL's trainers load and wrap, [`~transformers.Trainer`] does neither.

    Raises:
        TypeError: If it is no model.
        ValueError: If it has an adapter already.
    """
    if not isinstance(model, nn.Module if peft_config is not None else (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"`model` should be a `PreTrainedModel` or a `PeftModel` but is a {type(model).__name__}. Load it "
            "first, for instance with `AutoModelForSequenceClassification.from_pretrained(...)`."
        )
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError("`model` is a `PeftModel` already, but a `peft_config` was given too. Give one of them.")
    set_seed(seed)  # adapters start at random
    # a copy: for a classifier PEFT adds the head to `modules_to_save` of the config, each time it gets it
    wrapped_model: nn.Module = get_peft_model(model, copy.deepcopy(peft_config))
    return wrapped_model
