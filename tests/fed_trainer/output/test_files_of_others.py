# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every reader of files that others may have written, against every kind of damage: a sentence with the file's name, each
time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fed_trainer import FederatedConfig, FederatedTrainer
from fed_trainer.client.joining import Invitation, invite, join
from fed_trainer.client.live.adapter import LiveAdapter
from fed_trainer.output.checkpoint import load_adapter
from fed_trainer.output.record import read_record
from fed_trainer.output.report import write_report
from fed_trainer.state.roles import TensorRoles
from peft_scl import FederaConfig, SclConfig, load_federa
from peft_scl.convert import main as convert
from peft_scl.foreign_files import read_json, read_shapes, read_tensors
from peft_scl.patterns import check_pattern


TARGETS = ["v_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Folders of sound adapters."""
    folder = tmp_path_factory.mktemp("sound")
    kinds = {
        "lora": LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "federa": FederaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "scl": SclConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"),
    }
    for name, config in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        get_peft_model(model, config).save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


# Readers of a folder with an adapter


@pytest.fixture
def base(tiny_model_dir) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def readers(tiny_model_dir, base, make_clients, tmp_path) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    def start(folder: Path) -> None:
        args = FederatedConfig(
            output_dir=str(tmp_path / "run"), initial_adapter=str(folder), num_rounds=1, use_cpu=True, report_to="none"
        )
        FederatedTrainer(str(tiny_model_dir), args, make_clients(num_clients=1, rows=8))

    def resume(folder: Path) -> None:
        live = LiveAdapter(get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")))
        live.load(load_adapter(folder, live.saved_shapes()), f"The adapter in {str(folder)!r}")

    def resume_federa(folder: Path) -> None:
        live = LiveAdapter(get_peft_model(base(), FederaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")))
        live.load(load_adapter(folder, live.saved_shapes()), f"The adapter in {str(folder)!r}")

    def converted(folder: Path) -> None:
        try:
            convert([str(folder), str(tmp_path / "lora"), "--base_model", str(tiny_model_dir), "--overwrite"])
        except SystemExit as stop:
            raise ValueError(stop.code) from stop

    return {
        "initial_adapter": ("lora", start),
        "checkpoint": ("lora", resume),
        "checkpoint of FeDeRA": ("federa", resume_federa),
        "load_federa": ("federa", lambda folder: load_federa(base(), folder)),
        "scl-to-lora": ("scl", converted),
    }


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def change_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, body = header_of(path)
        changed = change(header)
        with_header(path, json.dumps(header if changed is None else changed).encode(), body)

    return damage


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[min(key for key in header if key != "__metadata__")]


def change_tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors, min(tensors))
        save_file(tensors, path)

    return damage


def as_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    return change_tensors(lambda tensors, key: tensors.update({key: tensors[key].to(dtype)}))


def grow(path: Path) -> None:
    """A file of 1 TiB that takes no space, in which one tensor is as large as it says."""
    header, body = header_of(path)
    last = max((entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"][1] = last["data_offsets"][0] + 2**40
    last["shape"] = [2**19, 2**19]
    text = json.dumps(header).encode()
    with_header(path, text, body)
    os.truncate(path, 8 + len(text) + last["data_offsets"][1])


DAMAGED_WEIGHTS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(4)),
    "cut off in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1.0] * 100})),
    "header without end": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "header that is no JSON": lambda path: with_header(path, b"{" + b" " * 30, header_of(path)[1]),
    "header that is no text": lambda path: with_header(path, b"\xff\xfe" * 20, header_of(path)[1]),
    "header of another type": change_header(lambda header: list(header)),
    "header nested deeply": lambda path: with_header(path, b"[" * 10**6, header_of(path)[1]),
    "names twice": lambda path: with_header(path, b'{"a":{},"a":{}}', b""),
    "claims terabytes": change_header(lambda header: first(header).update(shape=[2**40, 2**10])),
    "claims terabytes and has them": grow,
    "claims more with its offsets": change_header(
        lambda header: first(header).update(shape=[2**40], data_offsets=[0, 2**42])
    ),
    "negative shape": change_header(lambda header: first(header).update(shape=[-1, -32])),
    "shape in words": change_header(lambda header: first(header).update(shape="2, 32")),
    "no offsets": change_header(lambda header: first(header).pop("data_offsets") and None),
    "entry that is none": change_header(lambda header: {**header, "a": None}),
    "overlap": change_header(lambda header: {**header, "copy": first(header)}),
    "unknown dtype": change_header(lambda header: first(header).update(dtype="F32x")),
    "int8": as_dtype(torch.int8),
    "bool": as_dtype(torch.bool),
    "complex": as_dtype(torch.complex64),
    "float8": as_dtype(torch.float8_e4m3fn),
    "int64": as_dtype(torch.int64),
    "nan": change_tensors(lambda tensors, key: tensors[key].view(-1)[3:4].fill_(float("nan"))),
    "infinite": change_tensors(lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("-inf"))),
    "beyond float32": change_tensors(lambda tensors, key: tensors.update({key: tensors[key].double() + 1e300})),
    "another shape": change_tensors(lambda tensors, key: tensors.update({key: tensors[key].T.contiguous()})),
    "no dimension": change_tensors(lambda tensors, key: tensors.update({key: torch.tensor(1.0)})),
    "missing": change_tensors(lambda tensors, key: tensors.pop(key)),
    "unexpected": change_tensors(lambda tensors, key: tensors.update({"more": torch.ones(2)})),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}
# PEFT leaves out what it does not know
UNREAD = {(reader, "unexpected") for reader in ("load_federa", "scl-to-lora")}


def refused(read: Callable[[Path], Any], folder: Path, what: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        read(folder)
    message = str(info.value)
    assert str(folder) in message and len(message) < 700 and message.rstrip().endswith((".", "?")), (what, message)
    return message


@pytest.mark.parametrize(
    "reader", ["initial_adapter", "checkpoint", "checkpoint of FeDeRA", "load_federa", "scl-to-lora"]
)
def test_damaged_weights_are_named_by_every_reader(reader: str, readers, saved, tmp_path) -> None:
    kind, read = readers[reader]
    for name, damage in DAMAGED_WEIGHTS.items():
        if (reader, name) in UNREAD:
            continue
        folder = tmp_path / "adapter"
        shutil.copytree(saved[kind], folder)
        damage(folder / WEIGHTS)
        refused(read, folder, name)
        shutil.rmtree(folder)
    read(saved[kind])  # a sound one passes


def entry(**changed: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changed})


CATASTROPHES = [
    r"(a+)+$",
    r"(x|x)*y",
    r"([a-z]+\.?)*q",
    r".*.*.*.*.*.*k",
    "a?" * 40 + "a" * 40,
    r"(.*a){20}",
    "(" * 5000 + ")" * 5000,
]
DAMAGED_JSON: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "list": lambda text: f"[{text}]",
    "null": lambda text: "null",
    "string": lambda text: '"adapter"',
    "number": lambda text: "1e999",
    "nested deeply": lambda text: "[" * 10**5 + "]" * 10**5,
    "objects nested deeply": lambda text: '{"a":' * 10**5 + "1" + "}" * 10**5,
    "names twice": lambda text: text.rstrip()[:-1] + ', "r": 2, "r": 3}',
    "number without end": lambda text: text.rstrip()[:-1] + f', "more": {"9" * 5000}' + "}",
}
DAMAGED_CONFIG: dict[str, Callable[[str], str]] = {
    **DAMAGED_JSON,
    "rank without end": entry(r=10**12),
    "large rank": entry(r=60_000),
    "rank in words": entry(r="8"),
    "boolean rank": entry(r=True),
    "rank that is no number": entry(r=[8]),
    "rank of a pattern": entry(rank_pattern={"v_proj": 10**9}),
    "patterns in a list": entry(rank_pattern=["v_proj"]),
    "targets as a number": entry(target_modules=7),
    "targets as numbers": entry(target_modules=[7]),
    "no expression": entry(target_modules="(v_proj"),
    **{f"target_modules {pattern[:9]}": entry(target_modules=pattern) for pattern in CATASTROPHES},
    **{f"exclude_modules {pattern[:9]}": entry(exclude_modules=pattern) for pattern in CATASTROPHES},
    **{f"rank_pattern {pattern[:9]}": entry(rank_pattern={pattern: 2}) for pattern in CATASTROPHES},
    **{f"alpha_pattern {pattern[:9]}": entry(alpha_pattern={pattern: 2}) for pattern in CATASTROPHES},
    **{f"layers_pattern {pattern[:9]}": entry(layers_pattern=[pattern]) for pattern in CATASTROPHES},
    **{f"modules_to_save {pattern[:9]}": entry(modules_to_save=[pattern]) for pattern in CATASTROPHES},
}


@pytest.mark.parametrize(
    "reader, name", [("initial_adapter", CONFIG), ("load_federa", "federa_config.json"), ("scl-to-lora", CONFIG)]
)
def test_damaged_configs_are_named_by_every_reader(reader: str, name: str, readers, saved, tmp_path) -> None:
    kind, read = readers[reader]
    for what, damage in DAMAGED_CONFIG.items():
        folder = tmp_path / "adapter"
        shutil.copytree(saved[kind], folder)
        (folder / name).write_text(damage((folder / name).read_text()))
        refused(read, folder, what)
        shutil.rmtree(folder)


@pytest.mark.parametrize("what", DAMAGED_JSON)
@pytest.mark.parametrize("read", [read_record, write_report], ids=["record", "report"])
def test_a_damaged_record_is_named_by_every_reader(read: Callable[[Path], Any], what: str, tmp_path) -> None:
    (tmp_path / "federation.json").write_text(DAMAGED_JSON[what]('{"format": 1, "rounds": []}'))
    refused(read, tmp_path, what)
    (tmp_path / "federation.json").write_text('{"format": 2}')
    (tmp_path / "federation.jsonl").write_text(DAMAGED_JSON[what]('{"round": 1, "clients": {}}') + "\n")
    refused(read, tmp_path, what)


def test_unknown_or_missing_types_of_adapters_are_named(readers, saved, tmp_path) -> None:
    for reader in ("initial_adapter", "scl-to-lora"):
        kind, read = readers[reader]
        for change in ({"peft_type": "NOTHING"}, {"peft_type": 3}, {"peft_type": None}):
            folder = tmp_path / "adapter"
            shutil.copytree(saved[kind], folder)
            (folder / CONFIG).write_text(entry(**change)((folder / CONFIG).read_text()))
            refused(read, folder, str(change))
            shutil.rmtree(folder)


def test_values_that_the_model_cannot_hold_are_refused(saved, base, tmp_path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved["lora"], folder)
    change_tensors(lambda tensors, key: tensors[key].fill_(1e6))(folder / WEIGHTS)
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    LiveAdapter(model).load(load_adapter(folder), "The adapter")
    live = LiveAdapter(model.half())
    with pytest.raises(ValueError, match=r"The adapter has values in .* that torch.float16, .* cannot represent"):
        live.load(load_adapter(folder), "The adapter")


# In memory


def invitations(good: Invitation) -> dict[str, Invitation]:
    key = min(good.adapter)

    def adapter(value: Any) -> Invitation:
        return dataclasses.replace(good, adapter={**good.adapter, key: value})

    return {
        "no adapter": dataclasses.replace(good, adapter=None),
        "list": dataclasses.replace(good, adapter=list(good.adapter.values())),
        "numbers as names": dataclasses.replace(good, adapter={1: good.adapter[key]}),
        "digest that is a number": dataclasses.replace(good, base_digest=7),
        "no config": dataclasses.replace(good, peft_config=None),
        "type that is none": dataclasses.replace(good, peft_type=None),
        "none": adapter(None),
        "sparse": adapter(good.adapter[key].to_sparse()),
        "meta": adapter(good.adapter[key].to("meta")),
        "int8": adapter(good.adapter[key].to(torch.int8)),
        "bool": adapter(good.adapter[key].bool()),
        "complex": adapter(good.adapter[key].to(torch.complex64)),
        "float8": adapter(good.adapter[key].to(torch.float8_e4m3fn)),
        "nan": adapter(good.adapter[key] * float("nan")),
        "beyond float32": adapter(good.adapter[key].double() + 1e300),
        "another shape": adapter(good.adapter[key][:1]),
    }


@pytest.mark.parametrize("config", [LoraConfig, FederaConfig])
def test_damaged_invitations_are_named_and_leave_the_model_as_it_was(config: Any, base) -> None:
    server = get_peft_model(base(), config(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    client: PeftModel = get_peft_model(base(), config(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    before = {key: tensor.clone() for key, tensor in client.state_dict().items()}
    good = invite(server)
    for name, bad in invitations(good).items():
        with pytest.raises(ValueError, match="client 'north'"):
            join(client, bad, "north")
        assert all(torch.equal(tensor, before[key]) for key, tensor in client.state_dict().items()), name
    join(client, good, "north")


# Patterns


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_patterns_that_could_match_for_hours_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"could be matched in too many ways|is not a regular expression"):
        check_pattern(pattern, "The pattern")
    with pytest.raises(ValueError, match="The pattern"):
        TensorRoles(local=(pattern,))


@pytest.mark.parametrize(
    "pattern",
    [
        "v_proj",
        r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*patch_embed).*(?:up|down|gate)_proj.*",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q_proj|k_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        r"model\.layers\.(1|2|10|11)\.(mlp\.)?down_proj",
    ],
)
def test_patterns_that_people_use_pass(pattern: str) -> None:
    check_pattern(pattern, "The pattern")


# The header


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "__metadata__", "shape"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(HEADERS, st.binary(max_size=16), st.integers(-3, 3))
def test_whatever_is_in_a_header_the_answer_is_a_sentence_or_its_shapes(
    tmp_path_factory, header: Any, body: bytes, more: int
) -> None:
    path = tmp_path_factory.mktemp("header") / WEIGHTS
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", max(0, len(text) + more)) + text + body)
    try:
        shapes = read_shapes(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert {key: tuple(tensor.shape) for key, tensor in read_tensors(path, None).items()} == shapes
    with pytest.raises(ValueError, match="more than the 2 that such a file can have"):
        read_json(path, 2)
