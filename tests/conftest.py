# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of all tests: no network, one thread, a tiny model and clients made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


# before anything imports the libraries that read them
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import datasets
import hypothesis
import pytest
import torch
from datasets import Dataset
from hub_fixture import hub  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


torch.set_num_threads(1)
datasets.disable_progress_bars()
# the same examples in every run, and no time limit for the first, which waits for imports
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("deterministic")

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
TOPICS = {
    "sums": lambda a, b: (f"What is {a} plus {b}?", f" {a + b}"),
    "order": lambda a, b: (f"Which is larger, {a} or {b}?", f" {max(a, b)}"),
    "words": lambda a, b: (f"Write {a} times the letter {'abcde'[b % 5]}.", " " + "abcde"[b % 5] * a),
}


def clients_of(num_clients: int = 3, rows: int = 16) -> dict[str, Dataset]:
    """`num_clients` clients of `rows` rows; what they hold depends on their index and these numbers only."""
    clients = {}
    for client in range(num_clients):
        columns: dict[str, list[str]] = {"prompt": [], "completion": [], "topic": []}
        for row in range(rows):
            # two rows in three are of the client's own topic, the third goes round: clients differ, labels overlap
            topic = list(TOPICS)[(client if row % 3 else row // 3) % len(TOPICS)]
            prompt, completion = TOPICS[topic]((row * 7 + client) % 10, (row * 3 + client * 5) % 10)
            for column, value in zip(columns, (prompt, completion, topic), strict=True):
                columns[column].append(value)
        clients[f"client_{client}"] = Dataset.from_dict(columns)
    return clients


@pytest.fixture(scope="session")
def make_clients() -> Callable[..., dict[str, Dataset]]:
    """
    `make_clients(num_clients=3, rows=16) -> dict[str, Dataset]`: clients `client_0`, `client_1`, ... with the columns
    `prompt`, `completion` (with its leading space) and `topic` ("sums", "order", "words"; a label to count). The same
    numbers always give the same text; clients differ in text and in their topics. Take `.select(range(n))` of one for
    clients of different sizes.
    """
    return clients_of


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Folder `tiny-llama` with a random Llama (float32, hidden size 32, intermediate size 64, 2 layers, 4 heads, untied
    embeddings, about 40,000 parameters) and its tokenizer: byte-level BPE trained on the text of `make_clients`, with
    `<bos>`, `<eos>`, `<pad>` and a chat template. The same weights in every session. Tests must not write to it.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
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
    return folder
