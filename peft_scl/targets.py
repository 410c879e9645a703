# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the second linear map of the FFN is: by architecture, or else by the sizes in the model's config."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


__all__ = ["DOWN_PROJECTIONS", "EXCLUDED_MODULES", "find_down_projections"]


_DOWN_PROJ = ["mlp.down_proj"]
_BERT = ["output.dense"]
_FC2 = ["fc2"]

# Suffixes, as lists: a regular expression would disable `layers_to_transform`.
DOWN_PROJECTIONS: dict[str, list[str]] = {
    **dict.fromkeys(
        (
            "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "olmo2", "phi3",
            "qwen2", "qwen3", "smollm3", "stablelm",
        ),
        _DOWN_PROJ,
    ),
    **dict.fromkeys(
        ("bert", "camembert", "deberta", "deberta-v2", "electra", "mpnet", "roberta", "xlm-roberta"), _BERT
    ),
    **dict.fromkeys(("bart", "mbart", "opt"), _FC2),
    # vision towers: `mlp.fc2` of the encoder layers, not of a pooling head in front of them
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model", "dinov2", "phi", "vit"), ["mlp.fc2"]),
    **dict.fromkeys(("siglip", "siglip_text_model", "siglip_vision_model"), ["mlp.fc2"]),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), ["mlp.dense_4h_to_h"]),
    **dict.fromkeys(("gpt2", "gpt_neo", "starcoder2"), ["mlp.c_proj"]),
    "albert": ["ffn_output"],
    "distilbert": ["ffn.lin2"],
    "gemma3": ["mlp.down_proj"],  # the language model; name `mlp.fc2` too for the vision tower
    "gptj": ["mlp.fc_out"],
    "mt5": ["DenseReluDense.wo"],
    "t5": ["DenseReluDense.wo"],
}  # fmt: skip

# Modules that a suffix above matches although they are something else.
EXCLUDED_MODULES: dict[str, list[str]] = {
    **dict.fromkeys(
        ("bert", "camembert", "deberta", "deberta-v2", "electra", "mpnet", "roberta", "xlm-roberta"),
        ["attention.output.dense"],
    ),
    **dict.fromkeys(("siglip", "siglip_vision_model"), ["head.mlp.fc2"]),
}

_FFN_SIZES = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim", "d_inner",
    "ffn_hidden_size", "dim_feedforward",
)  # fmt: skip
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")


def find_down_projections(model: nn.Module) -> list[str]:
    """
    Names of the modules that map the FFN width of the model's config to its hidden size, inside a list of layers.

    Used for architectures that [`DOWN_PROJECTIONS`] does not know; what was picked is reported with a warning.

    Args:
        model (`nn.Module`):
            A model with a transformers config.

    Returns:
        `list[str]`: Full module names, in model order.

    Raises:
        ValueError: If no module has these sizes.
    """
    config = getattr(model, "config", None)
    sizes = {pair for part in _with_sub_configs(config) for pair in _ffn_shapes(part)}
    names = []
    for name, module in model.named_modules():
        in_repeated_layer = any(part.isdigit() for part in name.split("."))
        is_part_of_adapter = ".base_layer" in name or ".scl_" in name
        if in_repeated_layer and not is_part_of_adapter and _shape(module) in sizes:
            names.append(name)
    if not names:
        kind = getattr(config, "model_type", None) or type(model).__name__
        expected = f"no linear layer maps {sorted(sizes)} (FFN width, hidden size)" if sizes else "no FFN width is given"
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: the feed-forward blocks of {kind!r} are not known to SCL, "
            f"and {expected} in its config. Name the second linear map of each feed-forward block, for instance "
            "`target_modules=['mlp.down_proj']`."
        )
    warnings.warn(
        f"The architecture {getattr(config, 'model_type', '?')!r} is not known to SCL. By their sizes, these {len(names)} "
        f"modules were taken for its down projections: {_shortened(names)}. Set `target_modules` to choose others.",
        UserWarning,
        stacklevel=2,
    )
    return names


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, wrapped by a tuner or not; None for anything else."""
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
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
    ffn = [getattr(config, name, None) for name in _FFN_SIZES]
    for width in (value for value in ffn if isinstance(value, int)):
        for size in (value for value in hidden if isinstance(value, int)):
            if width != size:
                yield width, size


def _shortened(names: list[str], limit: int = 6) -> str:
    shown = names if len(names) <= limit else [*names[: limit - 1], "...", names[-1]]
    return ", ".join(shown)
