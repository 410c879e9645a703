# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.hub import REPO, hub_environment, redirect_client
from helpers.hub_server import HubServer


FILES = {
    "README.md": b"# Adapter\n",
    "adapter_model.safetensors": bytes(range(256)) * 40,
    "empty.bin": b"",
    "round 1/logs/loss.txt": b"0.5\n",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def push(folder: Path, files: dict[str, bytes], **kwargs: Any) -> str:
    """Pushes `files` to `REPO` as one commit, creates the repo if need be, returns the sha."""
    huggingface_hub.create_repo(REPO, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=REPO, folder_path=write(folder, files), **kwargs)
    return huggingface_hub.list_repo_commits(REPO, revision=kwargs.get("revision"))[0].commit_id


def test_round_trip(hub: HubServer, tmp_path: Path) -> None:
    sha = push(tmp_path / "local", FILES, commit_message="Round 1")
    pushed = FILES | {".gitattributes": hub.commits(REPO)[0][2][".gitattributes"]}

    assert huggingface_hub.whoami()["name"] == "user"
    assert huggingface_hub.model_info(REPO).sha == sha
    assert [title for _, title, _ in hub.commits(REPO)] == ["initial commit", "Round 1"]
    assert hub.commits(REPO)[-1] == (sha, "Round 1", pushed)
    assert read(snapshot_download(REPO)) == pushed
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)


def test_tree_lists_one_level_or_all(hub: HubServer, tmp_path: Path) -> None:
    push(tmp_path / "local", FILES)
    tree = huggingface_hub.list_repo_tree
    assert {entry.path for entry in tree(REPO)} == {".gitattributes", *FILES} - {"round 1/logs/loss.txt"} | {"round 1"}
    assert {entry.path for entry in tree(REPO, recursive=True)} == {".gitattributes", *FILES}
    assert [entry.path for entry in tree(REPO, "round 1")] == ["round 1/logs"]
    assert [entry.path for entry in tree(REPO, "round 1", recursive=True)] == ["round 1/logs/loss.txt"]
    with pytest.raises(EntryNotFoundError):
        list(tree(REPO, "round 2"))


def test_revisions_are_pinned(hub: HubServer, tmp_path: Path) -> None:
    first = push(tmp_path / "local", {"weights.safetensors": b"1", "only_first.txt": b"-"}, commit_message="one")
    second = push(tmp_path / "local", {"weights.safetensors": b"22"}, commit_message="two", delete_patterns="only*")
    assert first != second

    for revision, content in {first: b"1", second: b"22", "main": b"22"}.items():
        assert Path(hf_hub_download(REPO, "weights.safetensors", revision=revision)).read_bytes() == content
    assert huggingface_hub.model_info(REPO).sha == second
    assert huggingface_hub.model_info(REPO, revision=first).sha == first
    log = huggingface_hub.list_repo_commits(REPO)
    assert [(commit.commit_id, commit.title) for commit in log[:2]] == [(second, "two"), (first, "one")]
    assert len(huggingface_hub.list_repo_commits(REPO, revision=first)) == 2


def test_deleted_file(hub: HubServer, tmp_path: Path) -> None:
    before = push(tmp_path / "local", FILES)
    huggingface_hub.delete_file("README.md", REPO)
    huggingface_hub.delete_folder("round 1", REPO)
    assert {".gitattributes", *FILES} - hub.commits(REPO)[-1][2].keys() == {"README.md", "round 1/logs/loss.txt"}
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "README.md")
    assert Path(hf_hub_download(REPO, "README.md", revision=before)).read_bytes() == FILES["README.md"]


def test_allow_patterns_choose_what_is_sent(hub: HubServer, tmp_path: Path) -> None:
    push(tmp_path / "local", FILES, allow_patterns=["*.safetensors", "*.md"], ignore_patterns="README*")
    assert hub.commits(REPO)[-1][2].keys() == {".gitattributes", "adapter_model.safetensors"}
    assert read(snapshot_download(REPO, allow_patterns="*.safetensors")).keys() == {"adapter_model.safetensors"}


def test_branch(hub: HubServer, tmp_path: Path) -> None:
    base = push(tmp_path / "local", {"a.txt": b"a"})
    huggingface_hub.create_branch(REPO, branch="clients/3")
    huggingface_hub.create_branch(REPO, branch="clients/3", exist_ok=True)
    update = push(tmp_path / "local", {"b.txt": b"b"}, revision="clients/3")
    assert huggingface_hub.model_info(REPO).sha == base
    assert huggingface_hub.model_info(REPO, revision="clients/3").sha == update
    assert [sha for sha, _, _ in hub.commits(REPO, "clients/3")][1:] == [base, update]


def test_shas_depend_on_the_pushes_only(hub: HubServer, tmp_path: Path) -> None:
    with HubServer() as other:
        api = HfApi(other.endpoint, token="hf_other")
        for name in (REPO, "user/same-files"):
            api.create_repo(name)
            api.upload_folder(repo_id=name, folder_path=write(tmp_path / "local", FILES))
    push(tmp_path / "local", FILES)
    assert hub.commits(REPO) == other.commits(REPO)
    assert hub.commits(REPO)[-1][0] != other.commits("user/same-files")[-1][0]


def test_same_files_again_make_no_commit(hub: HubServer, tmp_path: Path) -> None:
    assert push(tmp_path / "local", FILES) == push(tmp_path / "local", FILES)
    assert len(hub.commits(REPO)) == 2
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1


def test_missing(hub: HubServer, tmp_path: Path) -> None:
    push(tmp_path / "local", FILES)
    for call in (huggingface_hub.model_info, snapshot_download, huggingface_hub.list_repo_commits):
        with pytest.raises(RepositoryNotFoundError):
            call("user/nothing")
        with pytest.raises(RevisionNotFoundError):
            call(REPO, revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/nothing", "README.md")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="user/nothing")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="no-branch")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing.txt")
    assert not huggingface_hub.file_exists(REPO, "nothing.txt")
    assert not huggingface_hub.repo_exists("user/nothing")


def test_refused_writes(hub: HubServer, tmp_path: Path) -> None:
    first = push(tmp_path / "local", FILES)
    with pytest.raises(HfHubHTTPError, match="409"):
        huggingface_hub.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        huggingface_hub.create_repo("user/other", token=False)
    push(tmp_path / "local", {"new.txt": b""}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(tmp_path / "local", {"newer.txt": b""}, parent_commit=first)
    assert len(hub.commits(REPO)) == 3


def test_concurrent_pushes_are_all_kept(hub: HubServer) -> None:
    huggingface_hub.create_repo(REPO)
    operations = [CommitOperationAdd(f"{client}/update.safetensors", bytes([client])) for client in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda add: huggingface_hub.create_commit(REPO, [add], commit_message="update"), operations))
    assert len(hub.commits(REPO)) == 9
    assert hub.commits(REPO)[-1][2].keys() == {".gitattributes", *(add.path_in_repo for add in operations)}


def test_peft_adapter(hub: HubServer, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def base() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    tokens = torch.arange(8).unsqueeze(0)
    expected = {}
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    for title in ("Round 1", "Round 2"):
        model.push_to_hub("adapter", commit_message=title)  # no namespace: it is the user's own, as the Hub answers
        expected[hub.commits(REPO)[-1][0]] = model(tokens).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + parameter.requires_grad)

    assert [title for _, title, _ in hub.commits(REPO)] == ["initial commit", "Round 1", "Round 2"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.commits(REPO)[-1][2].keys()
    for sha, logits in expected.items():
        loaded = PeftModel.from_pretrained(base(), REPO, revision=sha).eval()
        torch.testing.assert_close(loaded(tokens).logits, logits, rtol=0, atol=0)
    first, second = expected.values()
    assert not torch.equal(first, second)
    assert torch.equal(PeftModel.from_pretrained(base(), REPO).eval()(tokens).logits, second)


def test_transformers_push_to_a_branch(hub: HubServer) -> None:
    LlamaConfig(hidden_size=64).push_to_hub("config", revision="small")
    assert LlamaConfig.from_pretrained("user/config", revision="small").hidden_size == 64
    assert "config.json" not in hub.commits("user/config")[-1][2]


def test_subprocess(hub: HubServer, tmp_path: Path) -> None:
    program = (
        "import sys, huggingface_hub as hub\n"
        "hub.create_repo(sys.argv[1])\n"
        "hub.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2], commit_message='from outside')\n"
        "print(hub.snapshot_download(sys.argv[1]))\n"
    )
    folder = write(tmp_path / "local", FILES)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | hub_environment(hub.endpoint, tmp_path / "other cache")
    run = subprocess.run(
        [sys.executable, "-c", program, REPO, folder], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    snapshot = Path(run.stdout.strip())
    assert snapshot.is_relative_to(tmp_path / "other cache")
    assert read(snapshot) == hub.commits(REPO)[-1][2]
    assert hub.commits(REPO)[-1][1] == "from outside"
    assert Path(hf_hub_download(REPO, "README.md")).read_bytes() == FILES["README.md"]  # the parent sees it too


def test_redirection_is_undone(tmp_path: Path) -> None:
    def state() -> dict[str, object]:
        apis = {"api": huggingface_hub.hf_api.api.endpoint, "transformers": transformers.utils.hub._hf_api}
        return {name: value for name, value in vars(constants).items() if name.isupper()} | dict(os.environ) | apis

    before = state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        redirect_client(patch, "http://127.0.0.1:9", tmp_path)
        assert not huggingface_hub.is_offline_mode()
        assert huggingface_hub.get_token() == "hf_loopback"
        assert HfApi().endpoint == transformers.utils.hub.hf_api().endpoint == "http://127.0.0.1:9"
        assert huggingface_hub.hf_hub_url(REPO, "a") == f"http://127.0.0.1:9/{REPO}/resolve/main/a"
        own = {name for name, value in vars(constants).items() if str(value).startswith(str(tmp_path))}
        assert {"HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_XET_CACHE"} <= own
    assert state() == before
