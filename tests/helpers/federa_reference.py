# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The formulas of FeDeRA in float64, written without the code of the tuner, and the models they are checked on."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_scl import FederaConfig, FederaLayer


VOCAB, WIDTH, INNER, OUT = 11, 6, 9, 5  # all different, so that a transposed weight cannot pass
IDS = torch.tensor([[1, 4, 0, 10], [7, 7, 2, 3]])
TARGETS = ["embed", "lin", "conv"]
both_modes = {"residual": False, "keep_base": True}

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
        ["q_proj", "down_proj"],
    ),
    "llama_embedding": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
        ["embed_tokens", "v_proj"],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 16, "n_inner": 40, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32,
            "bos_token_id": 0, "eos_token_id": 0,
        },
        ["c_attn", "mlp.c_proj"],
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_SIZES, "max_position_embeddings": 32},
        ["query", "output.dense"],
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random transformers model, the same at every call."""
    torch.manual_seed(0)
    model_class, config_class, values, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero, which would hide a mistake
            parameter += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def config_for(name: str, **values: Any) -> FederaConfig:
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    return FederaConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MODELS[name][3], "task_type": task, **values})


def adapted(name: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    return get_peft_model(build(name, dtype), config_for(name, **values)).eval()


class Net(nn.Module):
    """One layer of each kind that FeDeRA wraps, in float64."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lin = nn.Linear(WIDTH, INNER)
        self.conv = Conv1D(OUT, INNER)
        self.to(dtype)
        for parameter in self.parameters():
            parameter.data.normal_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.lin(self.embed(ids))))


def net_weights(net: Any) -> dict[str, torch.Tensor]:
    """The weights of an unadapted [`Net`], each as `(out, in)`, in float64."""
    return {
        "embed": net.embed.weight.detach().double().T.clone(),
        "lin": net.lin.weight.detach().double().clone(),
        "conv": net.conv.weight.detach().double().T.clone(),
    }


def net_output(weights: dict[str, torch.Tensor], net: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The forward of [`Net`] with other weights, in float64."""
    hidden = torch.tanh(weights["embed"].T[ids] @ weights["lin"].T + net.lin.bias.double())
    return hidden @ weights["conv"].T + net.conv.bias.double()


def federa_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, FederaLayer)
    }


def scaling_of(r: int, alpha: float, rslora: bool = False) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


def dense_start(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `B0 = U_r sqrt(S_r / s)` and `A0 = sqrt(S_r / s) V_r^T` by the dense SVD, the signs fixed by each left vector.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for column in range(r):
        if left[left[:, column].abs().argmax(), column] < 0:
            left[:, column], right[column] = -left[:, column], -right[column]
    root = torch.diag((values[:r] / scaling).sqrt())
    return left[:, :r] @ root, root @ right[:r]


def factors(layer: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """All factors of an adapter in float64, by reading the names they are stored under."""
    embedding = isinstance(layer.get_base_layer(), nn.Embedding)
    stored = {
        "A": layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight,
        "B": layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight,
        "A0": layer.lora_start_A[name],
        "B0": layer.lora_start_B[name],
    }
    return {key: tensor.detach().double() for key, tensor in stored.items()}


def base_weight(layer: Any) -> torch.Tensor:
    """What the base layer holds, as `(out, in)`, in float64."""
    weight = layer.get_base_layer().weight.detach().double()
    return weight if isinstance(layer.get_base_layer(), nn.Linear) else weight.T
