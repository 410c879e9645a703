# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_trainer.state.low_rank import LowRank, LowRankSum, product_norm, product_svd, truncate
from helpers.dense_clients import assert_close, randn


sizes = st.integers(1, 7)


def product(out: int, k: int, in_: int, seed: int = 0) -> LowRank:
    return LowRank(randn((out, k), f"left {seed}"), randn((k, in_), f"right {seed}"))


@settings(deadline=None, max_examples=40)
@given(out=sizes, k=sizes, in_=sizes)
def test_singular_values_and_vectors_are_those_of_the_dense_product(out: int, k: int, in_: int) -> None:
    left, right = product(out, k, in_)
    u, values, vt = product_svd(left, right)
    dense = left.double() @ right.double()
    assert len(values) == min(out, k, in_)
    assert_close(values, torch.linalg.svdvals(dense)[: len(values)], 1e-12)
    assert_close(u @ torch.diag(values) @ vt, dense, 1e-12)
    assert_close(u.T @ u, torch.eye(len(values)), 1e-12)


def test_signs_are_fixed() -> None:
    left, right = product(6, 3, 5)
    u, _, vt = product_svd(left, right)
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    mixing = torch.tensor([[-1.0, 0, 0], [0, 0, 2], [0, -3, 0]])
    u_too, _, vt_too = product_svd(left @ mixing, torch.linalg.inv(mixing) @ right)
    assert_close(u_too, u, 1e-6)
    assert_close(vt_too, vt, 1e-6)


def test_norm_of_a_product_comes_from_small_grams() -> None:
    left, right = product(9, 3, 8)
    assert product_norm(left, right) == pytest.approx(float((left.double() @ right.double()).norm()), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_truncation_is_the_best_approximation_and_says_what_it_drops(rank: int) -> None:
    whole = product(6, 4, 5)
    kept, dropped = truncate(whole, rank)
    dense = whole.left.double() @ whole.right.double()
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    assert_close(kept.left.double() @ kept.right.double(), u[:, :rank] @ torch.diag(values[:rank]) @ vt[:rank], 1e-6)
    assert dropped == pytest.approx(float(values[rank:].norm()), abs=1e-9)
    assert kept.num_columns == min(rank, 4)
    assert_close(kept.left.norm(dim=0), kept.right.norm(dim=1), 1e-6)  # shared evenly


def test_sum_is_exact_and_copies_its_summands() -> None:
    total, expected = LowRankSum(), torch.zeros(6, 5, dtype=torch.float64)
    for seed in range(4):
        left, right = product(6, 2, 5, seed)
        total.add(left, right)
        expected += left.double() @ right.double()
        left.fill_(float("nan"))
        right.fill_(float("nan"))
    ours = total.product(0.5)
    assert ours.num_columns == total.num_columns == 8
    assert_close(ours.left.double() @ ours.right.double(), expected / 2, 1e-6)
    assert total.dropped == 0


@pytest.mark.parametrize(("out", "in_"), [(6, 9), (9, 6)])
def test_a_sum_of_many_products_takes_no_more_than_a_few_matrices_and_stays_exact(out: int, in_: int) -> None:
    total, expected = LowRankSum(), torch.zeros(out, in_, dtype=torch.float64)
    for seed in range(40):
        left, right = product(out, 2, in_, seed)
        total.add(left, right)
        expected += left.double() @ right.double()
        assert total.num_columns <= 12
    ours = total.product(0.5)
    torch.testing.assert_close(ours.left.double() @ ours.right.double(), 0.5 * expected, rtol=1e-5, atol=1e-5)
    assert total.dropped == 0


def test_bounded_sum_keeps_its_size_and_bounds_its_error() -> None:
    total, expected = LowRankSum(max_columns=5), torch.zeros(20, 18, dtype=torch.float64)
    for seed in range(30):
        left, right = product(20, 2, 18, seed)
        left = left * 0.7**seed
        total.add(left, right)
        expected += left.double() @ right.double()
        assert total.num_columns <= 10
    ours = total.product()
    error = float((ours.left.double() @ ours.right.double() - expected).norm())
    assert 1e-3 * float(expected.norm()) < error <= total.dropped * (1 + 1e-6)
