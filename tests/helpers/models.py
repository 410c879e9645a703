# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, always the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from .data import clients_of


CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
TOKENS = torch.arange(1, 13).view(2, 6)
BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the text of [`clients_of`], with `<bos>`, `<eos>`, `<pad>` and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [row for dataset in clients_of().values() for row in dataset]
    bpe.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny_llama(folder: Path) -> None:
    """A Llama with a hidden size of 32, 2 layers and 4 heads, and its tokenizer."""
    tokenizer = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def tiny_bert(
    trained: str = "", kind: type[PreTrainedModel] = BertForSequenceClassification, **config: object
) -> PreTrainedModel:
    """A classifier, always the same; only the parameters whose names match `trained` require gradients."""
    set_seed(0)
    model = kind(BertConfig(**{**BERT, **config}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.search(trained, name) is not None
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens).logits


@torch.no_grad()
def logits_of_text(model: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    return model.eval()(**tokenizer(["What is 3 plus 1? 4"], return_tensors="pt")).logits


@torch.no_grad()
def move(model: Any, seed: int = 1, size: float = 0.05) -> Any:
    """What training does to the trained parameters, roughly; starts of zero or one would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model
