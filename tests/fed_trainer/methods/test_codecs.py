# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The steps of a message, against their definitions: neighbours in a dtype by searching all of its numbers."""

from __future__ import annotations

import importlib
from pkgutil import iter_modules

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.methods import codecs
from fed_trainer.methods.codecs import CODECS, DtypeStep, Pipeline, Step
from fed_trainer.state.client_errors import ClientError


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a dtype of 16 bits, in order, in float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return every[every.isfinite()].unique()


EVERY = {name: numbers(dtype) for name, dtype in DTYPES.items()}


def sent(step: Step, value: float, seed: int) -> float:
    encoded = step.encode({"x": torch.tensor([value])}, seed)["x"]
    assert encoded.dtype == step.dtype
    return float(step.decode({"x": encoded}, {"x": torch.zeros(1)})["x"])


@pytest.mark.parametrize("name", DTYPES)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), seed=st.integers(0, 2**32))
def test_a_value_is_sent_as_one_of_its_two_neighbours(name: str, value: float, seed: int) -> None:
    if abs(value) > EVERY[name][-1]:
        return
    below, above = EVERY[name][EVERY[name] <= value][-1], EVERY[name][EVERY[name] >= value][0]
    assert sent(DtypeStep(name), value, seed) in (float(below), float(above))
    nearest = sent(DtypeStep(name, rounding="nearest"), value, seed)
    assert abs(nearest - value) <= min(value - below, above - value) * (1 + 1e-12)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("index", [0.01, 0.3, 0.51, 0.7, 0.98])
def test_stochastic_rounding_is_right_on_average(name: str, share: float, index: float) -> None:
    every = EVERY[name]
    below, above = (every[int(index * len(every)) + offset] for offset in (0, 1))
    value = (below + share * (above - below)).float()
    exact = float((value.double() - below) / (above - below))  # the share that float32 can express
    step, count = DtypeStep(name), 20_000
    encoded = step.encode({"x": value.expand(count).clone()}, seed=1)["x"].double()
    assert set(encoded.tolist()) <= {float(below), float(above)}
    drawn = float((encoded == above).double().mean())
    assert drawn == pytest.approx(exact, abs=5 * (exact * (1 - exact) / count) ** 0.5 + 1e-12)
    assert step.unbiased and not DtypeStep(name, rounding="nearest").unbiased


def test_the_same_message_is_the_same_bits_and_another_seed_gives_others() -> None:
    state = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    step = DtypeStep("bfloat16")
    first, again, other = (step.encode(state, seed)["a"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_is_no_wider_is_sent_as_it_is() -> None:
    state = {
        "count": torch.tensor([3]),
        "half": torch.randn(4).half(),
        "brain": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0),
    }
    encoded = DtypeStep("bfloat16").encode(state, 0)
    assert all(encoded[key] is state[key] for key in ("count", "half", "brain"))
    assert encoded["empty"].dtype == torch.bfloat16
    wide = {"a": torch.randn(3)}
    assert DtypeStep("float32").encode(wide, 0)["a"] is wide["a"]


def test_what_the_dtype_cannot_hold_is_no_infinity() -> None:
    with pytest.raises(ClientError, match=r"a has values beyond 6.55e\+04, .*Set `wire_dtype='bfloat16'`"):
        DtypeStep("float16").encode({"a": torch.tensor([7e4])}, 0)


@pytest.mark.parametrize("foreign", [torch.zeros(2).double(), torch.zeros(2).to(torch.complex64), "text", None])
def test_what_is_not_as_it_is_encoded_is_left_for_the_server_to_refuse(foreign: object) -> None:
    decoded = DtypeStep("bfloat16").decode({"a": foreign, "b": torch.zeros(2).bfloat16()}, {"a": torch.zeros(2)})
    assert decoded["a"] is foreign and decoded["b"].dtype == torch.bfloat16  # nobody asked for it


class Tripled(Step):
    linear = True

    def encode(self, state, seed):
        return {key: 3 * tensor for key, tensor in state.items()}

    def decode(self, state, like):
        return {key: tensor / 3 for key, tensor in state.items()}


class Shifted(Step):
    lossless = True

    def encode(self, state, seed):
        return {key: tensor + 1 for key, tensor in state.items()}

    def decode(self, state, like):
        return {key: tensor - 1 for key, tensor in state.items()}


class Fed(Step):
    needs_returning_clients = True
    encode = decode = Tripled.encode


def test_a_pipeline_is_undone_in_reverse_and_is_what_all_of_its_steps_are() -> None:
    state = {"a": torch.tensor([2.0])}
    pipeline = Pipeline([Tripled(), Shifted()])
    encoded = pipeline.encode(state)
    assert float(encoded["a"]) == 7
    assert float(pipeline.decode(encoded, {})["a"]) == 2
    assert (pipeline.is_linear, pipeline.is_lossless) == (False, False)
    assert Pipeline([Tripled()]).is_linear and Pipeline([Shifted()]).is_lossless
    plain = Pipeline()
    assert plain.encode(state)["a"] is plain.decode(state, {})["a"] is state["a"]
    assert plain.is_linear and plain.is_lossless


def test_what_does_not_go_together_is_refused_from_what_the_steps_say() -> None:
    for pipeline in (Pipeline(), Pipeline([Shifted()])):
        pipeline.check("`scaffold`", some_are_sampled=True)
    with pytest.raises(ValueError, match="scaffold draws the same conclusions .* but Tripled changes it"):
        Pipeline([Shifted(), Tripled()]).check("scaffold", some_are_sampled=False)
    Pipeline([Fed()]).check(None, some_are_sampled=False)
    remembering = Fed()
    remembering.needs_memory = True
    with pytest.raises(ValueError, match="Fed has to keep something at the client"):
        Pipeline([remembering]).check(None, some_are_sampled=False)
    with pytest.raises(ValueError, match="Fed keeps at a client what it has not sent yet"):
        Pipeline([Fed()]).check(None, some_are_sampled=True)


def test_the_table_names_every_step() -> None:
    modules = [importlib.import_module(f"{codecs.__name__}.{found.name}") for found in iter_modules(codecs.__path__)]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    steps = {kind for kind in kinds if issubclass(kind, Step) and kind is not Step}
    assert steps == set(CODECS.values()), "enter the step into CODECS of fed_trainer/methods/codecs/__init__.py"
    for bad in ({"dtype": "float64"}, {"dtype": "bfloat16", "rounding": "up"}):
        with pytest.raises(ValueError, match="should be"):
            DtypeStep(**bad)
