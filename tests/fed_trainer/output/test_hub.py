# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Federations that push to, and start from, a Hub on the loopback interface."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fed_trainer import FederatedTrainer
from fed_trainer.output.card import model_card
from fed_trainer.output.hub import fetch_adapter, publish
from helpers.comparison import assert_same
from helpers.hub import REPO
from helpers.hub_server import HubServer
from peft_scl import SclConfig


WEIGHTS = "adapter_model.safetensors"
PUBLISHED = {
    "README.md",
    "adapter_config.json",
    WEIGHTS,
    "federation.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
}

MakeTrainer = Callable[..., FederatedTrainer]


# a federation of two clients and two rounds, in SCL unless something else is asked for
pytestmark = pytest.mark.trainer(
    output="adapter", adapter=SclConfig(r=4, task_type="CAUSAL_LM"), num_clients=2, rows=8
)


def push_base(tiny_model_dir: Path, repo_id: str = "user/base") -> str:
    huggingface_hub.create_repo(repo_id)
    huggingface_hub.upload_folder(repo_id=repo_id, folder_path=tiny_model_dir)
    return repo_id


def titles(hub: HubServer, repo_id: str = REPO) -> list[str]:
    (_, first, _), *commits = hub.commits(repo_id)
    assert first == "initial commit"
    return [title for _, title, _ in commits]


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model)


# Pushing


def test_one_commit_per_round(hub: HubServer, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(push_to_hub=True, hub_model_id="adapter")
    trainer.train()
    assert titles(hub) == ["Round 1", "Round 2, end of training"]
    assert hub.repos.keys() == {REPO}

    output_dir = Path(trainer.args.output_dir)
    adapters = []
    for round, (_, _, files) in enumerate(hub.commits(REPO)[1:], start=1):
        assert files.keys() == PUBLISHED | {".gitattributes"}  # no pickle, and no folder
        assert files[WEIGHTS] == (output_dir / f"checkpoint-{round}" / WEIGHTS).read_bytes()
        record = json.loads(files["federation.json"])
        assert [entry["round"] for entry in record["rounds"]] == list(range(1, round + 1))
        assert f"| rounds | {round} of 2 |" in files["README.md"].decode()
        adapters.append(load(files[WEIGHTS]))
    assert any(not torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_tokenizer_comes_back_with_its_chat_template(hub: HubServer, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(push_to_hub=True, hub_strategy="end")
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(REPO)
    assert tokenizer.chat_template == trainer.processing_class.chat_template != ""
    assert tokenizer("What is 3 plus 4?") == trainer.processing_class("What is 3 plus 4?")


def test_strategy_end_makes_one_commit(hub: HubServer, make_trainer: MakeTrainer) -> None:
    make_trainer(push_to_hub=True, hub_strategy="end", hub_model_id=REPO).train()
    assert titles(hub) == ["Round 2, end of training"]


def test_commit_per_saved_round(hub: HubServer, make_trainer: MakeTrainer) -> None:
    make_trainer(push_to_hub=True, num_rounds=3, save_rounds=2, max_steps=1).train()
    assert titles(hub) == ["Round 2", "Round 3, end of training"]


def test_branch_and_default_name(hub: HubServer, make_trainer: MakeTrainer) -> None:
    huggingface_hub.create_repo(REPO)
    huggingface_hub.create_branch(REPO, branch="seed-1")
    make_trainer(push_to_hub=True, hub_revision="seed-1").train()  # the name is that of the folder
    assert titles(hub) == []
    assert [title for _, title, _ in hub.commits(REPO, "seed-1")][1:] == ["Round 1", "Round 2, end of training"]


def test_push_after_a_run_that_did_not(hub: HubServer, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    assert hub.repos == {} and hub.requests == []
    assert {path.name for path in Path(trainer.args.output_dir).iterdir()} >= PUBLISHED

    trainer.push_to_hub()
    assert titles(hub) == ["End of training"]
    (*_, (_, _, files)) = hub.commits(REPO)
    assert files.keys() == PUBLISHED | {".gitattributes"}
    assert files[WEIGHTS] == Path(trainer.args.output_dir, WEIGHTS).read_bytes()
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()

    trainer.push_to_hub("Another title", model_name="A title", blocking=False).result()
    assert titles(hub) == ["End of training", "Another title"]
    assert "# A title\n" in hub.commits(REPO)[-1][2]["README.md"].decode()


def test_push_before_training_publishes_the_start(hub: HubServer, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.push_to_hub("Start")
    assert titles(hub) == ["Start"]
    files = hub.commits(REPO)[-1][2]
    assert files.keys() == (PUBLISHED | {".gitattributes"}) - {"trainer_state.json"}
    assert_same(load(files[WEIGHTS]), adapter_of(trainer.model))
    assert json.loads(files["federation.json"])["rounds"] == []


class _HubIsDown(TrainerCallback):
    """The repository is gone when a round is pushed, and back before the next one."""

    def __init__(self, hub: HubServer) -> None:
        self.hub, self.repo = hub, hub.repos.pop(REPO)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hub.repos[REPO] = self.repo


def test_failed_upload_of_a_round_does_not_stop_the_run(
    hub: HubServer, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(push_to_hub=True)
    trainer.add_callback(_HubIsDown(hub))
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        trainer.train()
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("fed_trainer")]
    assert warning.startswith(f"Round 1 could not be pushed to {REPO}: ") and warning.endswith("The run goes on.")
    assert titles(hub) == ["Round 2, end of training"]
    for folder in ("checkpoint-1", "checkpoint-2", ""):
        assert {path.name for path in Path(trainer.args.output_dir, folder).iterdir()} >= PUBLISHED


def test_failed_upload_at_the_end_is_an_error_with_all_on_disk(hub: HubServer, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(push_to_hub=True, hub_strategy="end")
    repo = hub.repos.pop(REPO)
    with pytest.raises(RepositoryNotFoundError):
        trainer.train()
    output_dir = Path(trainer.args.output_dir)
    assert {path.name for path in output_dir.iterdir()} >= PUBLISHED
    assert_same(load_file(output_dir / WEIGHTS), load_file(output_dir / "checkpoint-2" / WEIGHTS))
    assert_same(adapter_of(trainer.model), load_file(output_dir / WEIGHTS))

    hub.repos[REPO] = repo
    trainer.push_to_hub()
    assert titles(hub) == ["End of training"]


def test_publish_sends_what_it_is_told_and_no_pickles(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"adapter_model.safetensors", "federation.json", "README.md", "spiece.model", "additional/a[1].jinja"}
    pickles = {"vocab.bin": b"text", "vocab.model": b"\x80\x04N.", "state": b"PK\x03\x04", "code.so": b"\x7fELF"}
    others = {"credentials.json", "notes.md", "loss.png", "checkpoint-1/a.safetensors", "a1.jinja"}
    contents = {name: name.encode() for name in kept | others} | pickles
    for name, content in contents.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    huggingface_hub.create_repo(REPO)
    documents = {"federation.json": "{}", "other.json": "[]"}
    with caplog.at_level(logging.WARNING, "fed_trainer"):
        info = publish(tmp_path / "run", [*kept, *pickles], documents, REPO, "One", token=None, revision=None)
    assert titles(hub) == ["One"]
    files = hub.commits(REPO)[-1][2]
    assert files.keys() == kept | {"other.json", ".gitattributes"}
    assert files["spiece.model"] == b"spiece.model" and files["federation.json"] == b"{}"
    assert info.oid == hub.commits(REPO)[-1][0]
    assert {record.getMessage().split()[0] for record in caplog.records if "pickle" in record.getMessage()} == set(
        pickles
    )
    assert {
        path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == (contents.keys())
    assert not (tmp_path / "run" / ".publishing").exists()


# The model card


def test_card_of_a_run(hub: HubServer, tiny_model_dir: Path, make_trainer: MakeTrainer) -> None:
    base = push_base(tiny_model_dir)
    trainer = make_trainer(
        model=base, push_to_hub=True, partition="dirichlet(alpha=0.1) over topic", hub_strategy="end"
    )
    trainer.train()
    card = ModelCard.load(REPO)
    assert card.data.base_model == base
    assert card.data.library_name == "peft"
    assert {"federated-learning", "fed_trainer", "peft_scl"} <= set(card.data.tags)

    for row in (
        f"| base model | `{base}` |",
        "| rounds | 2 of 2 |",
        "| clients | 2, 2 per round |",
        "| split | dirichlet(alpha=0.1) over topic |",
        "| examples | 16 |",
        "| aggregation | `fedavg` |",
        "| seed | 42 |",
    ):
        assert row in card.text.splitlines()
    assert "Sequential Compression Layers" in card.text
    number = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert f"| trainable parameters | {number:,} |" in card.text
    assert f"| sent per client and round | {number * 4 / 1e6:.3f} MB up, {number * 4 / 1e6:.3f} MB down |" in card.text


def test_example_in_the_card_loads_the_adapter(
    hub: HubServer, tiny_model_dir: Path, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(model=push_base(tiny_model_dir), push_to_hub=True, hub_strategy="end")
    trainer.train()
    (example,) = re.findall(r"```python\n(.*?)```", ModelCard.load(REPO).text, re.DOTALL)
    assert "import peft_scl" in example
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    assert_same(adapter_of(namespace["model"]), adapter_of(trainer.model))


def test_card_keeps_local_folders_to_itself(hub: HubServer, tiny_model_dir: Path, make_trainer: MakeTrainer) -> None:
    make_trainer(push_to_hub=True, hub_strategy="end").train()
    card = ModelCard.load(REPO)
    assert card.data.base_model is None
    assert "| base model | `tiny-llama` |" in card.text
    assert str(tiny_model_dir.parent) not in str(card)


def record(**kwargs: Any) -> dict[str, Any]:
    clients = {name: {"num_examples": number, "composition": None} for name, number in (("a", 5), ("b", 1200))}
    return {
        "base_model": "org/base",
        "peft_type": "SCL",
        "peft_config": {},
        "num_trainable_parameters": 1234567,
        "aggregation": "fedavg",
        "federation": {"server_optimizer": "sgd", "local_objective": None},
        "seed": 7,
        "num_rounds": 3,
        "num_sampled": 1,
        "partition": None,
        "clients": clients,
        "start": {"eval": None},
        "rounds": [],
    } | kwargs


@pytest.mark.parametrize("peft_type", ["SCL", "LORA"])
@pytest.mark.parametrize(
    ("task_type", "loader"),
    [
        ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
        (None, "AutoPeftModel"),
    ],
)
def test_card_names_the_loader(peft_type: str, task_type: str | None, loader: str) -> None:
    text = model_card(record(peft_type=peft_type), task_type, "user/x").text
    assert f'model = {loader}.from_pretrained("user/x")' in text
    assert f"from peft import {loader}\n" in text
    assert ("import peft_scl" in text) == ("Sequential Compression" in text) == (peft_type == "SCL")


def test_card_before_the_first_round() -> None:
    card = model_card(record(), "CAUSAL_LM", None)
    assert "# Federated adapter" in card.text and "path/to/this/folder" in card.text
    for row in ("| rounds | 0 of 3 |", "| split | not stated |", "| sent per client and round | - |"):
        assert row in card.text
    assert "| examples per client | 5 to 1200, 1205 in all |" in card.text
    assert "eval_loss" not in card.text


def test_card_with_evaluations() -> None:
    common = {"bytes_up": 3_000_000, "bytes_down": 6_000_000, "clients": {"a": {}, "b": {}, "c": {}}}
    rounds = [
        {"round": 1, "eval": {"eval_loss": 2.25}, **common},
        {"round": 2, "eval": None, **common},
        {"round": 3, "eval": {"eval_loss": 1.0}, **common},
    ]
    text = model_card(record(rounds=rounds, start={"eval": {"eval_loss": 3.0}}), "CAUSAL_LM", "user/x").text
    table = text[text.index("| round | eval_loss |") :].splitlines()
    assert table[2:6] == ["| 0 | 3.0000 |", "| 1 | 2.2500 |", "| 3 | 1.0000 |", ""]
    assert "| sent per client and round | 1.000 MB up, 2.000 MB down |" in text


def test_card_takes_tags_and_the_dataset() -> None:
    data = model_card(record(), None, "user/x", dataset_name="org/data", tags=["medicine"]).data
    assert {"medicine", "federated-learning", "peft_scl"} <= set(data.tags)
    assert data.datasets in ("org/data", ["org/data"])


# Starting from a published adapter


def test_published_round_is_a_start(hub: HubServer, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer(push_to_hub=True)
    first.train()
    for revision, checkpoint in {
        hub.commits(REPO)[1][0]: "checkpoint-1",
        hub.commits(REPO)[2][0]: "checkpoint-2",
        "main": "checkpoint-2",
        None: "checkpoint-2",
    }.items():
        trainer = make_trainer(output="second", initial_adapter=REPO, initial_adapter_revision=revision)
        assert_same(adapter_of(trainer.model), load_file(Path(first.args.output_dir, checkpoint, WEIGHTS)))
        assert trainer.model.peft_config["default"].r == 4

    before = {key: tensor.clone() for key, tensor in adapter_of(trainer.model).items()}
    trainer.train()
    for key, tensor in adapter_of(trainer.model).items():
        assert torch.equal(tensor, before[key]) == (".scl_start_" in key), key


def test_published_round_loads_into_the_base(hub: HubServer, tiny_model_dir: Path, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(push_to_hub=True)
    trainer.train()
    for round, (sha, _, _) in enumerate(hub.commits(REPO)[1:], start=1):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        loaded = PeftModel.from_pretrained(base, REPO, revision=sha)
        assert_same(adapter_of(loaded), load_file(Path(trainer.args.output_dir, f"checkpoint-{round}", WEIGHTS)))


def test_local_folder_has_no_revision(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert fetch_adapter(str(tmp_path)) == tmp_path
    with pytest.raises(
        ValueError, match=r"The adapter '.*' is a local folder, which has no revision 'v1'. Give a Hub id"
    ):
        fetch_adapter(str(tmp_path), "v1")
    with pytest.raises(ValueError, match="is a local folder, which has no revision 'main'"):
        make_trainer(initial_adapter=str(tmp_path), initial_adapter_revision="main")


def test_pickles_are_not_even_fetched(
    hub: HubServer, tiny_model_dir: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    folder = tmp_path / "adapter_with_pickle"
    PeftModel(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    huggingface_hub.create_repo(REPO)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=folder)

    with pytest.raises(
        FileNotFoundError, match=r"There is no adapter_model\.safetensors in .* `adapter_model\.bin` is not"
    ):
        make_trainer(initial_adapter=REPO)
    assert any(request.startswith("GET") and "adapter_config.json" in request for request in hub.requests)
    assert not any(request.startswith("GET") and "adapter_model.bin" in request for request in hub.requests)


def test_repository_that_does_not_exist(hub: HubServer, make_trainer: MakeTrainer) -> None:
    with pytest.raises(RepositoryNotFoundError):
        make_trainer(initial_adapter="user/nothing")
