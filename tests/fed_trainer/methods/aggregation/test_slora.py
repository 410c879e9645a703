# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The two stages of SLoRA, and the self-pruning of HetLoRA."""

from __future__ import annotations

import pytest
import torch

from fed_trainer.methods.aggregation import ClientUpdate, FedAvg, pruned_rank, pruning_penalty
from fed_trainer.methods.aggregation.slora import densify, lora_start, shared_mask
from helpers.dense_clients import assert_close, randn


def test_mask_is_the_same_on_every_machine_and_differs_by_weight_and_seed() -> None:
    mask = shared_mask("layers.0.q_proj", (40, 30), 0.1, seed=0)
    assert len(mask) == len(mask.unique()) == 120
    assert mask.min() >= 0 and mask.max() < 1200
    torch.manual_seed(123)
    assert torch.equal(shared_mask("layers.0.q_proj", (40, 30), 0.1, seed=0), mask)
    assert not torch.equal(shared_mask("layers.1.q_proj", (40, 30), 0.1, seed=0), mask)
    assert not torch.equal(shared_mask("layers.0.q_proj", (40, 30), 0.1, seed=1), mask)
    assert torch.equal(mask, mask.sort().values)


def test_mask_is_spread_evenly() -> None:
    counts = torch.zeros(50)
    for index in range(400):
        counts[shared_mask(f"w{index}", (50,), 0.1, seed=0)] += 1
    assert counts.sum() == 400 * 5
    assert counts.min() > 15 and counts.max() < 70  # 40 expected, standard deviation 6


def test_smallest_mask_has_one_entry() -> None:
    assert len(shared_mask("w", (3, 4), 0.001, seed=0)) == 1
    assert len(shared_mask("w", (3, 4), 1.0, seed=0)) == 12


@pytest.mark.parametrize("density", [0, 1.5])
def test_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="`density` should be in"):
        shared_mask("w", (3, 4), density, seed=0)


def test_mean_of_the_values_is_the_mean_of_the_sparse_changes() -> None:
    shape, numbers = (6, 5), (3, 50, 200)
    mask = shared_mask("w", shape, 0.2, seed=0)
    rule, expected = FedAvg(), torch.zeros(shape, dtype=torch.float64)
    rule.begin({"w": torch.zeros(len(mask))})
    for index, number in enumerate(numbers):
        values = randn((len(mask),), index)
        rule.add(ClientUpdate(str(index), number, {"w": values}))
        for place, value in zip(mask.tolist(), values.tolist(), strict=True):
            expected[place // 5, place % 5] += number / sum(numbers) * value
    assert_close(densify(rule.finish()["w"], mask, shape), expected, 1e-6)


@pytest.mark.parametrize("r, scaling", [(2, 1.5), (5, 0.25)])
def test_lora_starts_from_the_best_approximation_of_the_change(r: int, scaling: float) -> None:
    change = randn((7, 5), "change")
    (B, A), error = lora_start(change, r, scaling, randn((r, 5), "A"))
    u, values, vt = torch.linalg.svd(change.double(), full_matrices=False)
    assert_close(scaling * B.double() @ A.double(), u[:, :r] @ torch.diag(values[:r]) @ vt[:r], 1e-5)
    assert error == pytest.approx(float(values[r:].norm() / values.norm()), abs=1e-5)
    assert_close(B.norm(dim=0), A.norm(dim=1), 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_directions_that_the_change_lacks_can_be_trained(rank: int) -> None:
    change = randn((7, rank), "left") @ randn((rank, 5), "right")
    start = randn((4, 5), "A")
    (B, A), error = lora_start(change, 4, 2.0, start)
    assert_close(2.0 * B @ A, change, 1e-5)
    assert error < 1e-5
    assert torch.equal(A[rank:], start[rank:])
    assert not B[:, rank:].any()


def test_pruning_penalty_is_the_product_of_the_norms_behind_the_cut() -> None:
    A, B = randn((4, 7), "A").requires_grad_(), randn((5, 4), "B").requires_grad_()
    penalty = pruning_penalty(A, B, decay=0.6)  # floor(2.4) directions stay
    expected = float(B.detach()[:, 2:].double().norm() * A.detach()[2:].double().norm())
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    assert not A.grad[:2].any() and A.grad[2:].any()
    assert not B.grad[:, :2].any() and B.grad[:, 2:].any()


def test_pruning_penalty_has_a_gradient_where_an_adapter_starts() -> None:
    """The norm of zeros has no derivative; NaN there would spoil the first step."""
    A, B = randn((4, 7), "A").requires_grad_(), torch.zeros(5, 4, requires_grad=True)
    pruning_penalty(A, B, decay=0.5).backward()
    assert not A.grad.any() and not B.grad.any()


@pytest.mark.parametrize("rank, decay, shorter", [(50, 0.58, 29), (4, 0.6, 2), (4, 0.99, 3), (1, 0.5, 1), (8, 0.5, 4)])
def test_rank_shrinks_if_the_local_round_has_emptied_what_is_cut(rank: int, decay: float, shorter: int) -> None:
    assert pruned_rank(1.0, 0.9, rank, decay) == shorter
    assert pruned_rank(1.0, 1.0, rank, decay) == rank


def test_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="`decay` should be between 0 and 1 but the value passed is 1.0"):
        pruned_rank(1.0, 0.5, 4, 1.0)
