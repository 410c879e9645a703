# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains the base model of the offline demo, the one in `recipes/offline/model`, from scratch on a CPU.

The text is the documentation of the standard library's other modules, those that no client of `client_data.py` holds,
and the language reference behind `help()`. Nothing is downloaded. Run once:

    python recipes/offline/train_base.py
"""

import argparse
import math
import platform
import random
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from client_data import CLIENTS, STDLIB, build_clients, iter_documentation, shorten, split_paragraphs, text_key
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

# Easter eggs, tests, other projects' packages, and the help topics, which are read in another way.
SKIPPED_MODULES = {"__hello__", "__phello__", "antigravity", "pydoc_data", "site-packages", "test", "this"}
# The topic about `pdb`, which a client holds.
SKIPPED_TOPICS = {"debugger"}

MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# Base model of the offline demo

A Llama of {num_parameters:,} parameters with a byte-level BPE tokenizer of {vocab_size} tokens and a context of
{context_length} tokens, trained from scratch. It writes fragments of documentation and knows nothing else: it exists
so that the demo of federated fine-tuning runs without a network. It is of no other use.

## Training

    {command}

| | |
|---|---|
| Python | {python} |
| torch, threads | {torch}, {num_threads} |
| data | {num_documents} documents, {num_chars:,} characters, {num_tokens:,} tokens |
| steps | {steps} of {batch_size} windows of {context_length} tokens |
| training loss, mean of the last steps | {train_loss:.3f} nats per token |
| evaluation loss, {eval_percent} % of the documents, held out | {eval_loss:.3f} nats per token |

The numbers are of this Python version: another one has other documentation.

## Data

The documentation strings of the Python standard library and the help topics of `pydoc_data.topics`. Left out are all
modules that a client of the demo holds (`client_data.py`), so that the clients have something to teach.

## Licence

The weights are under the Apache License 2.0, as this project. The text is from the documentation strings of the Python
standard library, (c) Python Software Foundation, under the PSF License Version 2.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--intermediate_size", type=int, default=344)
    parser.add_argument("--num_layers", type=int, default=5)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1, help="Dropout of the attention weights.")
    parser.add_argument("--eval_percent", type=int, default=5, help="Share of the documents held out, in percent.")
    parser.add_argument("--eval_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num_threads", type=int, default=2)
    return parser.parse_args()


def load_documents(seed: int) -> list[str]:
    """
    Collects the training text, one document for each documentation string and for each help topic.

    Args:
        seed (`int`):
            Seed of the order of the documents.

    Returns:
        `list[str]`: The documents, shuffled, without duplicates and without a text that a client holds.
    """
    held = {module for modules in CLIENTS.values() for module in modules}
    clients, test_set = build_clients()
    seen = {text_key(text) for dataset in [*clients.values(), test_set] for text in dataset["completion"]}

    modules = {path.stem for path in STDLIB.glob("*.py")} | {path.parent.name for path in STDLIB.glob("*/__init__.py")}
    texts = [
        entry.docstring for module in sorted(modules - held - SKIPPED_MODULES) for entry in iter_documentation(module)
    ]
    texts += [text for topic, text in sorted(topics.items()) if topic not in SKIPPED_TOPICS]

    documents = []
    for text in texts:
        paragraphs = split_paragraphs(text)
        if not paragraphs:
            continue
        # The clients hold shortened texts, so the comparison is between shortened texts.
        key = text_key(shorten(paragraphs, max_chars=400))
        if key not in seen:
            seen.add(key)
            documents.append("\n".join(paragraphs))
    random.Random(seed).shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer that puts `<bos>` before each text.

    Args:
        documents (`list[str]`):
            The training text.
        vocab_size (`int`):
            Number of tokens, the three special ones and the 256 bytes included.
        context_length (`int`):
            Longest input of the model, in tokens.

    Returns:
        `PreTrainedTokenizerFast`: The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Joins the documents, each between `<bos>` and `<eos>`, into one row of token ids."""
    ids = [token for document in tokenizer(documents)["input_ids"] for token in [*document, tokenizer.eos_token_id]]
    return torch.tensor(ids)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, context_length: int, batch_size: int) -> float:
    """
    Computes the mean loss over consecutive windows of the tokens.

    Args:
        model (`LlamaForCausalLM`):
            The model, left in training mode.
        tokens (`torch.Tensor` of shape `(num_tokens,)`):
            Token ids. The last ones, which fill no window, are left out.
        context_length (`int`):
            Length of a window, in tokens.
        batch_size (`int`):
            Number of windows in one forward pass.

    Returns:
        `float`: The loss, in nats per token.
    """
    model.eval()
    windows = tokens[: len(tokens) // context_length * context_length].view(-1, context_length)
    total = sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(batch_size))
    model.train()
    return total / len(windows)


def write_model_card(args: argparse.Namespace, **values: int | float) -> None:
    """
    Writes the README of the model folder.

    Args:
        args (`argparse.Namespace`):
            The arguments of the training.
        values (`int` or `float`):
            What the training found: the numbers of parameters, documents, characters and tokens, and the last losses.
    """
    values = {**vars(args), **values}
    command = " ".join(["python", "recipes/offline/train_base.py", *sys.argv[1:]])
    card = MODEL_CARD.format(command=command, python=platform.python_version(), torch=torch.__version__, **values)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the size that `args` say, with random weights, in training mode."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.context_length,
        attention_dropout=args.dropout,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).train()


def train(
    model: LlamaForCausalLM,
    train_tokens: torch.Tensor,
    eval_tokens: torch.Tensor,
    args: argparse.Namespace,
    start: float,
) -> tuple[float, float]:
    """
    Trains the model in place on windows drawn at random, with a warm-up and a cosine to a twentieth of the rate.

    Args:
        model (`LlamaForCausalLM`):
            The model, in training mode.
        train_tokens (`torch.Tensor` of shape `(num_tokens,)`):
            Token ids to train on.
        eval_tokens (`torch.Tensor` of shape `(num_tokens,)`):
            Token ids held out.
        args (`argparse.Namespace`):
            The arguments of the training.
        start (`float`):
            When the program began, on the monotonic clock, for the log.

    Returns:
        `tuple[float, float]`: The mean training loss since the evaluation before the last, and the last evaluation
        loss, in nats per token.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )

    def schedule(step: int) -> float:
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        progress = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    offsets = torch.arange(args.context_length)
    running = 0.0
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train_tokens) - args.context_length + 1, (args.batch_size, 1))
        batch = train_tokens[starts + offsets]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % args.eval_steps == 0 or step == args.steps:
            train_loss = running / (step % args.eval_steps or args.eval_steps)
            running = 0.0
            eval_loss = evaluate(model, eval_tokens, args.context_length, args.batch_size)
            print(
                f"step {step}: train loss {train_loss:.3f}, eval loss {eval_loss:.3f}, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    return train_loss, eval_loss


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)

    documents = load_documents(args.seed)
    tokenizer = train_tokenizer(documents, args.vocab_size, args.context_length)
    num_eval = len(documents) * args.eval_percent // 100
    eval_tokens = encode(tokenizer, documents[:num_eval])
    train_tokens = encode(tokenizer, documents[num_eval:])
    num_chars = sum(map(len, documents))
    print(f"{len(documents)} documents, {num_chars} characters, {len(train_tokens)} + {len(eval_tokens)} tokens")

    model = make_model(args, tokenizer)
    print(f"{model.num_parameters()} parameters")
    train_loss, eval_loss = train(model, train_tokens, eval_tokens, args, start)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    write_model_card(
        args,
        num_parameters=model.num_parameters(),
        num_documents=len(documents),
        num_chars=num_chars,
        num_tokens=len(train_tokens) + len(eval_tokens),
        train_loss=train_loss,
        eval_loss=eval_loss,
    )


if __name__ == "__main__":
    main()
