# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the second linear map of the FFN is: by architecture, or else by the sizes in the model's config."""

import re
import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


__all__ = ["DOWN_PROJECTIONS", "EXCLUDED_MODULES", "find_down_projections", "find_fused_experts"]


_BERT_LIKE = ("bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta")
_LLAMA_LIKE = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "olmo2", "phi3",
    "qwen2", "qwen3", "smollm3", "stablelm",
)  # fmt: skip
_VISION = (
    "clip", "clip_text_model", "clip_vision_model", "dinov2", "siglip", "siglip_text_model", "siglip_vision_model",
    "vit",
)  # fmt: skip

# Suffixes, as lists: a regular expression would disable `layers_to_transform`.
DOWN_PROJECTIONS: dict[str, list[str]] = {
    **{model_type: ["mlp.down_proj"] for model_type in _LLAMA_LIKE},
    **{model_type: ["output.dense"] for model_type in (*_BERT_LIKE, "mpnet")},
    **{model_type: ["mlp.fc2"] for model_type in (*_VISION, "phi")},
    **{model_type: ["fc2"] for model_type in ("bart", "mbart", "opt")},
    **{model_type: ["mlp.dense_4h_to_h"] for model_type in ("bloom", "falcon", "gpt_neox")},
    **{model_type: ["mlp.c_proj"] for model_type in ("gpt2", "gpt_neo", "starcoder2")},
    "albert": ["ffn_output"],
    "distilbert": ["ffn.lin2"],
    "gemma3": ["mlp.down_proj"],  # the language model; name `mlp.fc2` too for the vision tower
    "gptj": ["mlp.fc_out"],
    "mt5": ["DenseReluDense.wo"],
    "t5": ["DenseReluDense.wo"],
}

# Modules that a suffix above matches although they are something else.
EXCLUDED_MODULES: dict[str, list[str]] = {
    **{model_type: ["attention.output.dense", "crossattention.output.dense"] for model_type in _BERT_LIKE},
    # the pooling head of the vision tower
    **{model_type: ["head.mlp.fc2"] for model_type in ("siglip", "siglip_vision_model")},
}

_FFN_SIZES = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim", "d_inner",
    "ffn_hidden_size", "dim_feedforward",
)  # fmt: skip
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_LAYER_INDEX = re.compile(r"(?:^|\.)\d+\.")
_ATTENTION = re.compile(r"attn|attention")  # its output projection can have the sizes of a down projection


def find_down_projections(model: nn.Module) -> tuple[list[str], list[str]]:
    """
    The modules that map the FFN width of the model's config to its hidden size, inside a list of layers.

    Used for architectures that [`DOWN_PROJECTIONS`] does not know; what was picked is reported with a warning.

    Args:
        model (`nn.Module`):
            A model with a transformers config.

    Returns:
        `tuple[list[str], list[str]]`: Suffixes of these modules' names, and the names of other modules that end in one
        of them. Suffixes, because full names would disable `layers_to_transform`.

    Raises:
        ValueError: If no module has these sizes.
    """
    config = getattr(model, "config", None)
    sizes = {pair for part in _with_sub_configs(config) for pair in _ffn_shapes(part)}
    modules = {
        name: module for name, module in model.named_modules() if ".base_layer" not in name and ".scl_" not in name
    }
    names = [
        name
        for name, module in modules.items()
        if _shape(module) in sizes and _LAYER_INDEX.search(name) and not _ATTENTION.search(name)
    ]
    if not names:
        kind = getattr(config, "model_type", None) or type(model).__name__
        expected = (
            f"no linear layer maps {sorted(sizes)} (FFN width, hidden size)" if sizes else "no FFN width is given"
        )
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: the feed-forward blocks of {kind!r} are not known to "
            f"SCL, and {expected} in its config. Name the second linear map of each feed-forward block, for instance "
            "`target_modules=['mlp.down_proj']`."
        )
    warnings.warn(
        f"The architecture {getattr(config, 'model_type', '?')!r} is not known to SCL. By their sizes, these "
        f"{len(names)} modules were taken for its down projections: {_shortened(names)}. Set `target_modules` to "
        "choose others.",
        UserWarning,
        stacklevel=2,
    )
    suffixes = list(dict.fromkeys(_within_layer(name) for name in names))
    endings = tuple(f".{suffix}" for suffix in suffixes)
    others = [name for name in modules if name.endswith(endings) and name not in names]
    # by suffix where that says the same for every layer: "attention.output.dense" next to "output.dense"
    excluded = dict.fromkeys(name if _within_layer(name) in suffixes else _within_layer(name) for name in others)
    return suffixes, list(excluded)


def find_fused_experts(model: nn.Module) -> list[str]:
    """Names of the modules that hold the weights of several experts as one parameter, which SCL cannot wrap."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        and any(parameter.dim() >= 3 for parameter in module.parameters(recurse=False))
    ]


def _within_layer(name: str) -> str:
    """The part of a module name behind its last layer index."""
    return _LAYER_INDEX.split(name)[-1]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, wrapped by a tuner or not; None for anything else."""
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    # quantised layers do not all derive from nn.Linear, but carry its sizes
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    return None


def _with_sub_configs(config: Any) -> Iterable[Any]:
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", {}):
        yield from _with_sub_configs(getattr(config, name, None))


def _ffn_shapes(config: Any) -> Iterable[tuple[int, int]]:
    hidden = [getattr(config, name, None) for name in _HIDDEN_SIZES]
    ffn: list[Any] = []
    for value in (getattr(config, name, None) for name in _FFN_SIZES):
        ffn.extend(value if isinstance(value, (list, tuple)) else [value])  # some name a width per layer
    if getattr(config, "n_inner", 0) is None:  # the GPT-2 family's way to say
        ffn.append(4 * config.n_embd)
    for width in (value for value in ffn if isinstance(value, int)):
        for size in (value for value in hidden if isinstance(value, int)):
            if width != size:
                yield width, size


def _shortened(names: list[str], limit: int = 6) -> str:
    shown = names if len(names) <= limit else [*names[: limit - 1], "...", names[-1]]
    return ", ".join(shown)
