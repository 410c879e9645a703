# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from fed_trainer.federation.validation import InvalidUpdateError, TooFewClientsError, require_clients, validated
from fed_trainer.methods.aggregation import ClientUpdate, FedAvg
from fed_trainer.state.adapter_state import AdapterState, state_digest


REFERENCE = {"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.bfloat16), "x.lora_B.weight": torch.zeros(4, 2)}
A, B = REFERENCE


def delta(**changed: torch.Tensor) -> AdapterState:
    return {key: torch.ones_like(tensor) for key, tensor in REFERENCE.items()} | {
        {"A": A, "B": B}.get(name, name): tensor for name, tensor in changed.items()
    }


def update(num_examples: int = 5, **changed: torch.Tensor) -> ClientUpdate:
    return ClientUpdate("alice", num_examples, delta(**changed))


def test_usable_update_comes_back_as_it_is() -> None:
    good = update()
    assert validated(good, REFERENCE) is good
    assert validated(update(A=torch.ones(2, 3)), REFERENCE)  # float32 for bfloat16 loses nothing


FAULTS = {
    "nan": (update(B=torch.full((4, 2), float("nan"))), f"{B} has values that are not finite"),
    "infinity": (
        update(A=torch.full((2, 3), float("inf"), dtype=torch.bfloat16)),
        f"{A} has values that are not finite",
    ),
    "shape": (update(B=torch.ones(2, 4)), rf"{B} has the shape \(2, 4\) instead of \(4, 2\)"),
    "rank": (update(B=torch.ones(4, 3)), rf"{B} has the shape \(4, 3\) instead of \(4, 2\)"),
    "empty": (update(B=torch.ones(0)), f"{B} is empty, as read from a partitioned model"),
    "dtype": (update(B=torch.ones(4, 2, dtype=torch.float16)), f"{B} is torch.float16, expected torch.float32"),
    "integers": (update(A=torch.ones(2, 3, dtype=torch.int32)), f"{A} is torch.int32, expected torch.bfloat16"),
    "unexpected": (update(y=torch.ones(1)), r"1 tensors are not shared in this round \(the first: y\)"),
    "missing": (ClientUpdate("alice", 5, {A: REFERENCE[A]}), rf"1 tensors are missing \(the first: {B}\)"),
    "nothing": (ClientUpdate("alice", 5, {}), r"2 tensors are missing"),
    "no examples": (update(0), "`num_examples` is 0, but it should be a positive integer"),
    "negative": (update(-3), "`num_examples` is -3"),
    "not a count": (update(float("nan")), "`num_examples` is nan"),  # type: ignore[arg-type]
    "boolean": (update(True), "`num_examples` is True"),
    "too many": (update(2**64), "`num_examples` is 18446744073709551616"),
    "no steps": (ClientUpdate("alice", 5, delta(), num_steps=0), "`num_steps` is 0, but it should be a positive"),
    "scaling": (
        ClientUpdate("alice", 5, delta(), scalings={"x": float("nan")}),
        "the scaling of x is nan, but it should be positive and finite",
    ),
    "zero scaling": (ClientUpdate("alice", 5, delta(), scalings={"x": 0.0}), "the scaling of x is 0.0"),
}


@pytest.mark.parametrize("bad, message", FAULTS.values(), ids=FAULTS)
def test_unusable_updates_are_named_and_refused(bad: ClientUpdate, message: str) -> None:
    with pytest.raises(InvalidUpdateError, match=f"The update of client 'alice' is left out: .*{message}") as info:
        validated(bad, REFERENCE)
    assert info.value.client == "alice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    reference = {A: torch.zeros(301, dtype=dtype)}
    for place in (0, 7, 150, 300):
        tensor = torch.linspace(-1, 1, 301).to(dtype)
        assert validated(ClientUpdate("alice", 5, {A: tensor}), reference)
        tensor[place] = value
        with pytest.raises(InvalidUpdateError, match=f"{A} has values that are not finite"):
            validated(ClientUpdate("alice", 5, {A: tensor}), reference)


def test_integer_buffers_and_empty_tensors_of_the_adapter_itself_pass() -> None:
    state = {"bn.num_batches_tracked": torch.tensor(3), "empty": torch.zeros(0, 4)}
    assert validated(ClientUpdate("alice", 5, state), state)


def test_second_update_of_a_client_is_refused() -> None:
    with pytest.raises(InvalidUpdateError, match="has sent one in this round already"):
        validated(update(), REFERENCE, seen={"alice"})
    assert validated(update(), REFERENCE, seen={"bob"})


def test_another_base_model_is_refused() -> None:
    other = update()
    other.base_digest = "0" * 64
    with pytest.raises(
        InvalidUpdateError, match="trained on another base model .digest 000000000000, expected 111111111111"
    ):
        validated(other, REFERENCE, base_digest="1" * 64)
    assert validated(other, REFERENCE, base_digest="0" * 64)
    assert validated(other, REFERENCE)  # the server's base is quantised and has no digest


def test_missing_tensors_pass_only_where_clients_may_train_a_part() -> None:
    part = ClientUpdate("alice", 5, {A: REFERENCE[A]})
    assert validated(part, REFERENCE, partial=True)
    with pytest.raises(InvalidUpdateError, match="2 tensors are missing"):
        validated(ClientUpdate("alice", 5, {}), REFERENCE, partial=True)


def test_round_goes_on_without_the_bad_clients() -> None:
    """What a round loop does: the bad client is named and left out, the mean is over the others."""
    updates = [
        ClientUpdate("a", 1, delta()),
        ClientUpdate("b", 9, delta(B=torch.full((4, 2), float("nan")))),
        ClientUpdate("c", 3, delta(B=torch.full((4, 2), 3.0))),
        ClientUpdate("a", 100, delta(B=torch.full((4, 2), 7.0))),
    ]
    rule, taken, refused = FedAvg(), set(), {}
    rule.begin(REFERENCE)
    for candidate in updates:
        try:
            rule.add(validated(candidate, REFERENCE, seen=taken))
        except InvalidUpdateError as error:
            refused[error.client] = error.reason
        else:
            taken.add(candidate.client)
    require_clients(taken, refused, min_clients=2)
    assert refused.keys() == {"a", "b"}
    torch.testing.assert_close(rule.finish()[B], torch.full((4, 2), (1 * 1 + 3 * 3) / 4))
    with pytest.raises(
        TooFewClientsError, match="Only 2 of at least 3 clients sent .* 'b': x.lora_B.weight has values"
    ):
        require_clients(taken, refused, min_clients=3)


@pytest.mark.parametrize("min_clients", [0, 1])
def test_round_without_any_usable_update_never_passes(min_clients: int) -> None:
    with pytest.raises(TooFewClientsError, match="Only 0 of at least 1 .*no other client answered"):
        require_clients([], {}, min_clients)


def test_digest_covers_names_shapes_dtypes_and_every_value() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"a": state["a"], "b": state["b"].view(torch.float16)},
        {"a": state["a"] + torch.tensor([0, 0, 1e-5]), "b": state["b"]},
    ]
    digests = {state_digest(entry) for entry in [state, *others]}
    assert len(digests) == 5
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)


# The limit of values


@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("exponent", range(39))
def test_of_values_that_are_taken_the_weighted_product_is_a_float32(exponent: int, key: str) -> None:
    """
    Rules multiply two factors and weight them by the examples, which may be a million; what is ordinary is never
    refused.
    """
    million = 10**6
    for mantissa in (1.0, 1.9, 3.0):
        value = mantissa * 10.0**exponent
        if value > torch.finfo(torch.float32).max:
            continue
        both = update(million, A=torch.full((2, 3), value), B=torch.full((4, 2), -value))
        single = update(million, **{"A" if key == A else "B": torch.full_like(REFERENCE[key], value)})
        try:
            validated(both, REFERENCE)
            validated(single, REFERENCE)
        except InvalidUpdateError as error:
            assert exponent >= 5, error
            assert "alice" in str(error)
        else:
            weighted = million * (both.delta[B].double() @ both.delta[A].double())
            assert weighted.float().isfinite().all(), f"{value} is taken"
