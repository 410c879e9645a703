# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import pytest

from fed_trainer.federation.client_settings import ClientSettings, layer_of, parse_client_settings


KEYS = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight",
    "base_model.model.lm_head.lora_A.weight",
]


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        *zip(KEYS, [0, 11, None], strict=True),
        ("base_model.model.transformer.h.3.attn.c_attn.lora_A.weight", 3),
        ("base_model.model.bert.encoder.layer.2.output.dense.scl_A.weight", 2),
        ("base_model.model.classifier.0.weight", None),
    ],
)
def test_layer_of_a_tensor(key, layer):
    assert layer_of(key) == layer


def test_a_client_trains_its_layers_and_what_belongs_to_none():
    settings = parse_client_settings({"a": {"layers_to_transform": 11}}, ["a", "b"], KEYS)
    assert settings == {"a": ClientSettings(layers_to_transform=(11,))}
    assert [settings["a"].trains(key) for key in KEYS] == [False, True, True]
    assert all(ClientSettings().trains(key) for key in KEYS)


def test_ranks_and_budgets():
    settings = parse_client_settings({"b": {"r": 2, "max_steps": 7}}, ["a", "b"], KEYS)
    assert settings == {"b": ClientSettings(r=2, max_steps=7)}
    assert parse_client_settings(None, ["a"], KEYS) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": {"r": 2}}, "names the client 'c', which is not among the 2 clients"),
        ({"a": {"rank": 2}}, r"\{'rank': 2\}. Give a dictionary with some of \['r', "),
        ({"a": 3}, "is 3. Give a dictionary"),
        ({"a": {"r": 0}}, "`r` of client `a` should be an integer of at least 1 or None but the value passed is 0"),
        ({"a": {"max_steps": "5"}}, "`max_steps` of client `a` should be an integer of at least 1 .* '5'"),
        ({"a": {"max_steps": True}}, "`max_steps` of client `a` should be an integer of at least 1 .* True"),
        ({"a": {"layers_to_transform": [[0]]}}, r"is \[\[0\]\], but the adapter has the layers"),
        ({"a": {"layers_to_transform": [5]}}, r"is \[5\], but the adapter has the layers \[0, 11\]"),
        ({"a": {"layers_to_transform": []}}, r"is \[\], but the adapter has the layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_client_settings(given, ["a", "b"], KEYS)
