# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType
from transformers.activations import ACT2FN

from ..card import update_model_card


__all__ = ["SclConfig"]


@dataclass
class SclConfig(PeftConfig):
    """
    Configuration of an [`SclModel`]: Sequential Compression Layers (SCL, https://huggingface.co/papers/2412.07021).

    SCL puts a small trainable map *in series* between the first and the second linear map of the transformer FFN. With
    `h` of size `m` the input of the down projection `W: (d, m)` and `b` its bias, the two variants compute

    - `"bottleneck"`: `y = (W + delta) (h + scaling * B act(A h)) + b` with `A: (r, m)`, `B: (m, r)` and `B = 0` at the
      start, so that training starts exactly from the base model;
    - `"compress"` starts from the best rank-`r` approximation `scaling * B0 A0` of the down projection, `A0: (r, m)`,
      `B0: (d, r)`. With `keep_residual=True` the layer keeps what that drops,
      `y = W h + scaling * ((B0 + B) act((A0 + A) h) - B0 act(A0 h)) + b`; the changes `A` and `B` are trained, and are
      zero at the start, so that training starts exactly from the base model. With `keep_residual=False` the
      compression *replaces* the down projection, `y = scaling * B act(A h) + b`, started from `A = A0`, `B = B0`: the
      base model only for `r >= rank(W)` and a linear activation.

    The paper leaves shape, activation, bias, initialisation and the choice of layers open; each is a field here.
    `"compress"` with `keep_residual=False` is its literal reading (it has the parameter count of a rank-`r` LoRA).

    Args:
        r (`int`, *optional*, defaults to `16`):
            Width of the compression layer. At most `min(m, d)` for `keep_residual=False`.
        variant (`str`, *optional*, defaults to `"compress"`):
            `"compress"` (in place of the down projection, or of its principal part) or `"bottleneck"` (residual, in
            front of the down projection).
        keep_residual (`bool`, *optional*, defaults to `True`):
            Whether `"compress"` keeps what its rank-`r` start drops of the down projection. The frozen start is saved
            with the adapter then. Ignored by `"bottleneck"`.
        activation (`str`, *optional*, defaults to `"linear"`):
            Activation between `A` and `B`, a key of `transformers.activations.ACT2FN`. Only `"linear"` can be merged
            into the base weights.
        scaling (`float`, *optional*, defaults to `1.0`):
            Factor on the output of `B`, positive. For `"compress"` the start is divided by it, so that it does not
            change where training starts, but how far a step goes.
        scl_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout probability on the input of `A`.
        scl_bias (`bool`, *optional*, defaults to `False`):
            Whether `A` and `B` have biases (zero at the start). Merging then needs a down projection with a bias.
        train_down_proj (`str`, *optional*, defaults to `"low_rank"`):
            What happens to the down projection behind the bottleneck: `"none"` (frozen), `"low_rank"` (`delta` is a
            product of rank `down_proj_r`) or `"full"` (`delta` is a dense matrix). The delta is zero at the start and
            saved with the adapter. Ignored by `"compress"`, whose maps stand for the down projection.
        down_proj_r (`int`, *optional*):
            Rank of the low-rank delta, defaults to `r`.
        down_proj_start (`str`, *optional*, defaults to `"zero"`):
            Where the low-rank delta starts: `"zero"` as a LoRA does (`B = 0`), `"principal"` as FeDeRA does, at
            `delta = (B0 + B) (A0 + A) - B0 A0` with the principal singular factors of the down projection. The delta
            is zero at the start either way. The frozen start is saved with the adapter, and an export to LoRA has
            twice this rank.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the down projections: a list matches suffixes, a string is a regular expression. If not given,
            they are known per architecture, or found by the sizes in the model's config (and reported with a warning).
        exclude_modules (`list[str]` or `str`, *optional*):
            Names not to wrap, matched like `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the transformer layers to wrap; all if not given.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the layer list in the model, if it is not recognised; needs `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save with the adapter, such as a classification head.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start as described above. `False` starts every map at random, which is useful for tests only.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token embeddings to train, as in [`~peft.LoraConfig`].

    Raises:
        ValueError: For a value outside the ranges above; the message prints it.
    """

    r: int = field(default=16, metadata={"help": "Width of the compression layer."})
    variant: Literal["compress", "bottleneck"] = field(
        default="compress",
        metadata={
            "help": "'compress' (in place of the down projection, or of its principal part) or 'bottleneck' "
            "(residual, in front of the down projection)."
        },
    )
    keep_residual: bool = field(
        default=True,
        metadata={
            "help": "Whether 'compress' keeps what its rank-r start drops of the down projection. Ignored by "
            "'bottleneck'."
        },
    )
    activation: str = field(
        default="linear",
        metadata={"help": "Activation between A and B, a key of transformers' ACT2FN. Only 'linear' can be merged."},
    )
    scaling: float = field(default=1.0, metadata={"help": "Positive factor on the output of B."})
    scl_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of A."})
    scl_bias: bool = field(default=False, metadata={"help": "Whether A and B have biases (zero at the start)."})
    train_down_proj: Literal["none", "low_rank", "full"] = field(
        default="low_rank",
        metadata={
            "help": "What happens to the down projection behind the bottleneck: 'none' (frozen), 'low_rank' or 'full' "
            "(a delta, zero at the start, saved with the adapter). Ignored by 'compress'."
        },
    )
    down_proj_r: int | None = field(
        default=None, metadata={"help": "Rank of the low-rank delta of the down projection, defaults to r."}
    )
    down_proj_start: Literal["zero", "principal"] = field(
        default="zero",
        metadata={
            "help": "Where the low-rank delta starts: 'zero' as a LoRA does, 'principal' as FeDeRA does (principal "
            "singular factors of the down projection, whose product is subtracted)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the down projections: a list matches suffixes, a string is a regular expression. Found "
            "per architecture if not given."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names not to wrap, matched like target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer layers to wrap; all if not given."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list in the model; needs layers_to_transform."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start from the base model (or its best rank-r approximation). False starts at random."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train, as in LoraConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SCL"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

        for name in ("r", "down_proj_r"):
            value = getattr(self, name)
            if name == "down_proj_r" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value!r}")
        _check_choice("variant", self.variant, ("compress", "bottleneck"))
        _check_choice("train_down_proj", self.train_down_proj, ("none", "low_rank", "full"))
        _check_choice("down_proj_start", self.down_proj_start, ("zero", "principal"))
        if self.down_proj_start == "principal" and (
            self.variant != "bottleneck" or self.train_down_proj != "low_rank"
        ):
            raise ValueError(
                "`down_proj_start='principal'` is the start of the low-rank delta behind a bottleneck, but `variant` "
                f"is {self.variant!r} and `train_down_proj` {self.train_down_proj!r}. Set `variant='bottleneck'` and "
                "`train_down_proj='low_rank'`, or leave it out: `variant='compress'` starts at the principal part "
                "anyway."
            )
        if self.activation not in ACT2FN:
            raise ValueError(
                f"`activation` should be one of {sorted(ACT2FN)} but the value passed is {self.activation!r}"
            )
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"`scaling` should be positive and finite but the value passed is {self.scaling!r}")
        if not 0 <= self.scl_dropout < 1:
            raise ValueError(f"`scl_dropout` should be in [0, 1) but the value passed is {self.scl_dropout!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.variant == "bottleneck" and not self.keep_residual:
            warnings.warn(
                "`keep_residual=False` has no effect with `variant='bottleneck'`.", UserWarning, stacklevel=3
            )
        if self.variant == "compress" and (self.train_down_proj == "full" or self.down_proj_r is not None):
            warnings.warn(
                "`train_down_proj` and `down_proj_r` have no effect with `variant='compress'`, whose maps stand for "
                "the down projection.",
                UserWarning,
                stacklevel=3,
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save the configuration, and add to the `README.md` beside it how to load the adapter (see docs/scl.md).

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder of the adapter.
            kwargs:
                As in [`~peft.PeftConfig.save_pretrained`].
        """
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        # PEFT and transformers write the model card before the config, and the config is what we own of the two
        update_model_card(save_directory, self)

    @property
    def is_mergeable(self) -> bool:
        """Whether the adapter folds into the base weights: a linear activation does, any other does not."""
        return self.activation == "linear"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` should be one of {list(choices)} but the value passed is {value!r}")
