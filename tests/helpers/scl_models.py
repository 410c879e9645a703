# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny randomly initialised transformers models for the SCL tests, and what SCL should find in them."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn


HIDDEN, FFN, LAYERS, HEADS, VOCAB = 16, 40, 2, 2, 64

_BASE = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_TEXT = {**_BASE, "vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
_VISION = {**_BASE, "image_size": 8, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Architecture:
    """A model class, the arguments of its tiny config, and the down projections SCL should wrap by default."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    targets: tuple[str, ...]  # "{}" is the layer index
    layers: int = LAYERS

    @property
    def target_names(self) -> set[str]:
        return {target.format(layer) for target in self.targets for layer in range(self.layers)}

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config_class)(**self.config)
        model = getattr(transformers, self.model_class)(config).eval()
        # Some heads and biases start at zero, which would hide a wrong gradient.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model


def _llama_like(name: str, **config: Any) -> Architecture:
    return Architecture(
        f"{name}ForCausalLM", f"{name}Config", {**_DECODER, **config}, ("model.layers.{}.mlp.down_proj",)
    )


ARCHITECTURES = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma": _llama_like("Gemma"),
    "gemma2": _llama_like("Gemma2"),
    "gemma3_text": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER, ("model.layers.{}.mlp.down_proj",)),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _DECODER, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 5},
        ("model.language_model.layers.{}.mlp.down_proj",),
    ),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", _TEXT, ("model.layers.{}.mlp.fc2",)),
    "phi3": _llama_like("Phi3"),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
        ("model.decoder.layers.{}.fc2",),
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 32},
        ("transformer.h.{}.mlp.c_proj",),
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, ("gpt_neox.layers.{}.mlp.dense_4h_to_h",)),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": HIDDEN, "d_ff": FFN, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCAB},
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"),
    ),
    "bert": Architecture(
        "BertForSequenceClassification", "BertConfig", _TEXT, ("bert.encoder.layer.{}.output.dense",)
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification", "RobertaConfig", _TEXT, ("roberta.encoder.layer.{}.output.dense",)
    ),
    "deberta": Architecture(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**_TEXT, "pooler_hidden_size": HIDDEN},
        ("deberta.encoder.layer.{}.output.dense",),
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_TEXT, "pooler_hidden_size": HIDDEN},
        ("deberta.encoder.layer.{}.output.dense",),
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCAB},
        ("distilbert.transformer.layer.{}.ffn.lin2",),
    ),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _VISION, ("vit.layers.{}.mlp.fc2",)),
    "siglip": Architecture(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "projection_size": HIDDEN}, "vision_config": _VISION},
        ("text_model.encoder.layers.{}.mlp.fc2", "vision_model.encoder.layers.{}.mlp.fc2"),
    ),
    "siglip_classification": Architecture(
        "SiglipForImageClassification",
        "SiglipConfig",
        {"text_config": {**_TEXT, "projection_size": HIDDEN}, "vision_config": _VISION},
        ("vision_model.encoder.layers.{}.mlp.fc2",),
    ),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_TEXT, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": _VISION,
            "projection_dim": HIDDEN,
        },
        ("text_model.encoder.layers.{}.mlp.fc2", "vision_model.encoder.layers.{}.mlp.fc2"),
    ),
}


def as_unknown(model: nn.Module) -> nn.Module:
    """Give `model` a model type that nobody has heard of."""
    model.config.__class__ = type("UnheardOfConfig", (type(model.config),), {"model_type": "unheard-of"})
    return model


def moe_model(model_type: str) -> nn.Module:
    """A mixture-of-experts model, whose experts transformers stores as one parameter per layer."""
    config = transformers.AutoConfig.for_model(
        model_type,
        **_DECODER,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=FFN,
        shared_expert_intermediate_size=FFN,
    )
    return transformers.AutoModelForCausalLM.from_config(config)
