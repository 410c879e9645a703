# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is run: the files of PEFT's suite, and the settings of `SclConfig` that take the place of PEFT's methods in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Suite:
    """One test file of PEFT, and the least number of its tests that every setting has to pass in a whole run."""

    file: str
    passed_at_least: int


# The other files test one method, the Hub, quantised models or a GPU; docs/conformance.md lists what that leaves out.
SUITES = {
    "custom": Suite("test_custom_models.py", 250),
    "config": Suite("test_config.py", 25),
    "decoder": Suite("test_decoder_models.py", 150),
    "encdec": Suite("test_encoder_decoder_models.py", 45),
    "feature": Suite("test_feature_extraction_models.py", 55),
    "seqcls": Suite("test_seq_classifier.py", 35),
    "tokencls": Suite("test_token_classification_qa.py", 8),
}


@dataclass(frozen=True)
class Setting:
    """
    One way to use SCL. `fields` names every field of `SclConfig` that a default could change, except `r`: `rank` gives
    it, from the full rank of the layers that a test wraps.
    """

    fields: dict[str, Any]
    rank: Callable[[int], int]

    @property
    def mergeable(self) -> bool:
        return self.fields["activation"] == "linear"

    @property
    def starts_at_base_model(self) -> bool:
        full_rank = self.rank(32) == 32
        keeps = self.fields["variant"] == "bottleneck" or self.fields["keep_residual"]
        return keeps or (full_rank and self.fields["activation"] == "linear")

    @property
    def needs_full_rank(self) -> bool:
        return self.starts_at_base_model and self.fields["variant"] == "compress" and not self.fields["keep_residual"]

    def config_kwargs(self, full_rank: int) -> dict[str, Any]:
        return {"r": self.rank(full_rank), **self.fields}


_FIELDS = {
    "variant": "compress",
    "keep_residual": True,
    "activation": "linear",
    "scaling": 1.0,
    "scl_dropout": 0.0,
    "scl_bias": False,
    "train_down_proj": "none",
    "down_proj_r": None,
    "down_proj_start": "zero",
}


def _compress(rank: Callable[[int], int], **fields: Any) -> Setting:
    return Setting({**_FIELDS, **fields}, rank)


def _bottleneck(**fields: Any) -> Setting:
    return Setting({**_FIELDS, "variant": "bottleneck", **fields}, lambda full_rank: 4)


def _low(full_rank: int) -> int:
    return min(4, full_rank)


SETTINGS = {
    "compress": _compress(_low),
    "compress_gelu_bias": _compress(_low, activation="gelu", scl_bias=True),
    "replace": _compress(lambda full_rank: full_rank, keep_residual=False),
    "replace_low_rank": _compress(lambda full_rank: full_rank // 2, keep_residual=False),
    "replace_gelu": _compress(lambda full_rank: full_rank, keep_residual=False, activation="gelu"),
    "bottleneck": _bottleneck(),
    "bottleneck_gelu_bias": _bottleneck(activation="gelu", scl_bias=True),
    "bottleneck_low_rank_delta": _bottleneck(train_down_proj="low_rank", down_proj_r=2),
    "bottleneck_full_delta": _bottleneck(train_down_proj="full"),
}
# Some tests take a config class and no arguments: they run once, with the defaults of `SclConfig`.
DEFAULTS = "defaults"
DEFAULTS_PASSED_AT_LEAST = 12

# min(hidden size, FFN width) of every model in tiny_models.py
TRANSFORMER_FULL_RANK = 32


@dataclass(frozen=True)
class CustomModel:
    """
    A row of PEFT's `TEST_CASES` (test_custom_models.py), with the targets of its linear-only methods (BEFT, MiSS,
    PEANuT).

    Args:
        model_id (`str`): The name of the model in PEFT's `MockTransformerWrapper`.
        kwargs (`dict`): The arguments of the config that choose the layers.
        full_ranks (`tuple[int, ...]`): `min(in_features, out_features)` of each wrapped layer.
    """

    model_id: str
    kwargs: dict[str, Any]
    full_ranks: tuple[int, ...]

    def config_kwargs(self, setting: Setting) -> dict[str, Any]:
        return {**self.kwargs, **setting.config_kwargs(min(self.full_ranks))}

    def suits(self, setting: Setting) -> bool:
        """Whether one `r` can do what the setting is about: full rank in every layer, or below it in every layer."""
        if setting.fields["variant"] == "bottleneck":
            return True
        r = setting.rank(min(self.full_ranks))
        if setting.needs_full_rank:
            return set(self.full_ranks) == {r}
        return r > 0


# MLP: lin0 maps 10 to 20 and lin1 20 to 2. EmbConv1D: conv1d is transformers' Conv1D and maps 5 to 1.
CUSTOM_MODELS = {
    "lin0": CustomModel("MLP", {"target_modules": ["lin0"]}, (10,)),
    "lin1": CustomModel("MLP", {"target_modules": ["lin1"]}, (2,)),
    "regex": CustomModel("MLP", {"target_modules": "lin0"}, (10,)),
    "two_layers": CustomModel("MLP", {"target_modules": ["lin0", "lin1"]}, (10, 2)),
    "excluded": CustomModel("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}, (10,)),
    "modules_to_save": CustomModel("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}, (10,)),
    "conv1d": CustomModel("EmbConv1D", {"target_modules": ["conv1d"]}, (1,)),
}


@dataclass(frozen=True)
class Selection:
    """
    What one run runs. `keyword` is a `-k` expression of pytest; `whole` names the suites that it leaves whole, for
    which the numbers of `passed_at_least` apply.
    """

    suites: tuple[str, ...]
    settings: tuple[str, ...]
    keyword: str | None
    whole: tuple[str, ...]


EVERYTHING = Selection(tuple(SUITES), (*SETTINGS, DEFAULTS), keyword=None, whole=tuple(SUITES))
# One linear, one non-linear and one with a delta; of the decoders one without and one with biases.
FAST = Selection(
    suites=("custom", "config", "decoder"),
    settings=("compress", "replace_gelu", "bottleneck_low_rank_delta", DEFAULTS),
    keyword="not test_decoder_models or LlamaForCausalLM or OPTForCausalLM",
    whole=("custom", "config"),
)
