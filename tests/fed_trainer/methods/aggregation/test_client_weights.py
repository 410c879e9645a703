# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a client counts for in a mean: its examples, its tokens that carry a loss, or as much as any other."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from fed_trainer import FederatedDPOConfig, FederatedDPOTrainer
from fed_trainer.client.token_counts import count_tokens
from fed_trainer.federation.validation import InvalidUpdateError, validated
from fed_trainer.methods.aggregation import METHODS, ClientUpdate
from fed_trainer.state.client_errors import ClientError
from fed_trainer.state.factors import FactorPair


PAIRS = [FactorPair("m", "m.lora_A.weight", "m.lora_B.weight", 2.0)]
SHAPES = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2), "head.weight": (3, 4)}
NEEDED: dict[str, dict[str, Any]] = {"norm_bounding": {"max_norm": 1.0}, "slora": {"sparse_rounds": 1}}
OPTION = {"hetlora": "weighting"}
BY_VALUES_ALONE = {"median", "trimmed_mean", "krum", "multi_krum"}
WEIGHTED = [(name, OPTION.get(name, "weights")) for name in METHODS if name not in BY_VALUES_ALONE]


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


UPDATES = [
    ClientUpdate("a", 4, state(1), num_steps=2, num_tokens=90),
    ClientUpdate("b", 10, state(2), num_steps=3, num_tokens=11),
    ClientUpdate("c", 1, state(3), num_steps=1, num_tokens=40),
]


def combined(name: str, updates: list[ClientUpdate], **options: Any) -> dict[str, torch.Tensor]:
    rule = METHODS[name].build(PAIRS, **NEEDED.get(name, {}), **options)
    rule.begin(state(0), 1)
    for update in updates:
        rule.add(update)
    result = dict(rule.finish())
    for module, change in rule.base_change.items():
        result[f"base {module}"] = change.left @ change.right
    return result


@pytest.mark.parametrize(("name", "option"), WEIGHTED)
def test_every_rule_with_weights(name: str, option: str) -> None:
    """The same as numbers of examples that are the tokens, or all one."""
    takes = inspect.signature(METHODS[name].rule).parameters
    assert option in takes, f"give {name!r} the option `weights`, or enter it into OPTION or BY_VALUES_ALONE above"
    by_tokens = [replace(update, num_examples=update.num_tokens or 0) for update in UPDATES]
    alike = [replace(update, num_examples=1) for update in UPDATES]
    expected = {"examples": UPDATES, "tokens": by_tokens, "uniform": alike}
    results = {}
    for weights, updates in expected.items():
        results[weights] = combined(name, UPDATES, **{option: weights})
        reference = combined(name, updates, **{option: "examples"})
        assert results[weights].keys() == reference.keys()
        assert all(torch.equal(results[weights][key], reference[key]) for key in reference)
    head = [result["head.weight"] for result in results.values()]
    assert not torch.equal(head[0], head[1]) and not torch.equal(head[1], head[2])
    with pytest.raises(ValueError, match=f"`{option}` should be one of .* but the value passed is 'rows'"):
        combined(name, [], **{option: "rows"})
    with pytest.raises(ValueError, match="client 'a' does not say its number of tokens"):
        combined(name, [replace(UPDATES[0], num_tokens=None)], **{option: "tokens"})


def test_every_other_rule_has_no_weights() -> None:
    for name in BY_VALUES_ALONE:
        assert "weights" not in inspect.signature(METHODS[name].rule).parameters


def test_fedavg_by_tokens_is_the_formula() -> None:
    total = sum(update.num_tokens or 0 for update in UPDATES)
    for key, tensor in combined("fedavg", UPDATES, weights="tokens").items():
        mean = sum((update.num_tokens or 0) / total * update.delta[key].double() for update in UPDATES)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_tokens", [0, -1, 1.5, True, "3", 2**60])
def test_a_number_of_tokens_that_is_none(num_tokens: Any) -> None:
    with pytest.raises(InvalidUpdateError, match="`num_tokens` is .* but it should be a positive integer"):
        validated(replace(UPDATES[0], num_tokens=num_tokens), state(0))


# Counting


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"labels": torch.tensor([row["labels"] for row in rows])}


def test_what_counts_as_a_token() -> None:
    dataset = Dataset.from_dict({"labels": [[5, 6, -100, 7], [-100, -100, 3, 4], [-100, -100, -100, -100]]})
    assert count_tokens(dataset, collate, 2, shifts_labels=False, seed=0) == 5
    assert count_tokens(dataset, collate, 2, shifts_labels=True, seed=0) == 4  # nothing predicts the first
    assert count_tokens(Dataset.from_dict({"labels": [1, 2, -100]}), collate, 2, shifts_labels=False, seed=0) == 2
    shifted = {"labels": torch.zeros(1, 9), "shift_labels": torch.tensor([[1, -100, 2]])}
    assert count_tokens(dataset, lambda rows: shifted, 3, shifts_labels=True, seed=0) == 2
    with pytest.raises(ClientError, match="none of its tokens carries a loss"):
        count_tokens(dataset.select([2]), collate, 2, shifts_labels=False, seed=0)
    with pytest.raises(ClientError, match="its batches have no `labels`"):
        count_tokens(dataset, lambda rows: {"input_ids": torch.zeros(2)}, 2, shifts_labels=False, seed=0)


def test_counting_moves_no_generator_and_follows_its_seed(tiny_model_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.mask_token = "<pad>"
    masks = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)  # draws
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9, 10]] * 20})

    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(1).item()

    def seeded() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    counts = [count_tokens(dataset, masks, 4, False, seed) for seed in (0, 1, 2, 0)]
    assert draws() == expected
    assert counts[0] == counts[3] and len(set(counts)) > 1


# Rounds


pytestmark = pytest.mark.trainer(adapter={"r": 2}, num_clients=2, num_rounds=1, max_steps=1)


@pytest.mark.parametrize("weights", ["examples", "uniform", "tokens"])
def test_rounds_with_weights(make_trainer, monkeypatch, tmp_path, weights: str) -> None:
    # so that the first label of a row is a token, which no position predicts
    trainer = make_trainer(aggregation_kwargs={"weights": weights}, num_rounds=2, completion_only_loss=False)
    updates, take = [], trainer.federation.server.take
    monkeypatch.setattr(
        trainer.federation.server, "take", lambda update, *rest: updates.append(update) or take(update, *rest)
    )
    start = {key: tensor.clone() for key, tensor in trainer.federation.state.items()}
    trainer.train()
    if weights == "tokens":
        for update in updates:
            prepared = trainer.client.data._prepared[update.client]
            expected = sum(sum(row["labels"][i] != -100 for i in range(1, len(row["labels"]))) for row in prepared)
            assert update.num_tokens == expected > 16
    else:
        assert [update.num_tokens for update in updates] == [None] * 4  # nobody is asked
    for round in (1, 2):
        arrived = updates[2 * round - 2 : 2 * round]
        counts = [{"examples": u.num_examples, "uniform": 1, "tokens": u.num_tokens}[weights] for u in arrived]
        for key in start:
            start[key] = start[key] + sum(
                count / sum(counts) * update.delta[key] for count, update in zip(counts, arrived, strict=True)
            )
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in start.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-5, atol=1e-7)


def test_weights_of_rules_and_objectives_that_have_their_own(make_trainer, tiny_model_dir, tmp_path) -> None:
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "local_objective": "scaffold"}
    assert make_trainer(**sgd).federation.server.rule.weights == "uniform"
    assert make_trainer(**sgd, aggregation_kwargs={"weights": "uniform"}).federation.server.rule.weights == "uniform"
    with pytest.raises(ValueError, match="all weighted alike, but `aggregation_kwargs` has `weights='tokens'`"):
        make_trainer(**sgd, aggregation_kwargs={"weights": "tokens"})
    with pytest.raises(ValueError, match="all weighted alike, but `aggregation` is 'flora'"):
        make_trainer(**sgd, aggregation="flora")
    with pytest.raises(ValueError, match=r"has \['weights'\], which 'median' does not take"):
        make_trainer(aggregation="median", aggregation_kwargs={"weights": "uniform"})
    pairs = Dataset.from_dict({"prompt": ["a"] * 8, "chosen": [" b"] * 8, "rejected": [" c"] * 8})
    args = FederatedDPOConfig(
        output_dir=str(tmp_path / "dpo"), aggregation_kwargs={"weights": "tokens"}, use_cpu=True, report_to="none"
    )
    with pytest.raises(ValueError, match="the loss of `DPOTrainer` is one of pairs of answers"):
        FederatedDPOTrainer(str(tiny_model_dir), args, {"a": pairs}, peft_config=LoraConfig(task_type="CAUSAL_LM"))
