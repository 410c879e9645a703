# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients and rows, made on the spot: the same numbers always give the same text."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset


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


def preferences_of(clients: Mapping[str, Dataset], rows: int = 8) -> dict[str, Dataset]:
    """Pairs of answers out of [`clients_of`]: the right one is chosen, that of the next row rejected."""
    pairs = {}
    for client, dataset in clients.items():
        answers = dataset["completion"]
        columns = {"prompt": dataset["prompt"], "chosen": answers, "rejected": answers[1:] + answers[:1]}
        pairs[client] = Dataset.from_dict(columns).select(range(rows))
    return pairs


# all rows of `sums_with_answers` in every step, so that losses compare
ALL_ROWS = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": 32,
}


def sums_with_answers(number: int = 8) -> Dataset:
    """Pairs of answers of one client, of which the right one is chosen."""
    columns = {
        "prompt": [f"What is {row} plus 1?" for row in range(number)],
        "chosen": [f" {row + 1}" for row in range(number)],
        "rejected": [f" {row + 2}" for row in range(number)],
    }
    return Dataset.from_dict(columns)


def token_rows(client: int, number: int = 16, num_labels: int = 3) -> Dataset:
    """The label is the first token, so it can be learnt; clients differ in their labels."""
    labels = [(client if row % 2 else row // 2) % num_labels for row in range(number)]
    tokens = [[label, 5 + row % 7, 12 + client, 20 + (row * 3) % 11] for row, label in enumerate(labels)]
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 4] * number, "label": labels})
