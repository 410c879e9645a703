# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A bucket of a server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from fed_trainer import Store
from fed_trainer.federation.transport.ends import EndedError
from fed_trainer.federation.transport.store.client import LOOKS_PER_NOTE
from fed_trainer.federation.transport.store.objects import Objects, StoreError
from helpers.s3 import BUCKET


@pytest.fixture
def keys(s3_endpoint: str) -> Any:
    """`keys()`: what is in the bucket."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)

    def listed() -> list[str]:
        return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    return listed


def store_at(url: str, address: str = f"s3://{BUCKET}/run", **options: Any) -> Store:
    return Store(address, patience=60.0, lease=0.05, storage_options={"endpoint_url": url, **options})


@pytest.fixture
def of_two_processes(s3_endpoint: str) -> Iterator[tuple[Objects, Objects]]:
    """Two that share no file system object, and so no cache of s3fs."""
    yield tuple(store_at(s3_endpoint, skip_instance_cache=True).objects() for _ in range(2))  # type: ignore[misc]


def test_two_ends(s3_endpoint: str, keys: Any) -> None:
    store = store_at(s3_endpoint)
    server, end = store.server_end(), store_at(s3_endpoint, skip_instance_cache=True).client_end("ward-1")
    assert end.look_for_run() is None
    server.open("run-1")
    server.greet(b"hello")
    assert end.look_for_run() == ("run-1", 1, b"hello")
    end.enrol(b"I am here")
    [member] = server.look_for(None).values()
    counts = []
    for _ in range(4):
        number = server.send("ward-1", member.session, b"work" * 100_000)
        assert end.look() == (number, b"work" * 100_000) and end.look() is None
        end.reply(number, b"done" * 100_000)
        [envelope] = server.arrived()
        assert server.read(envelope) == b"done" * 100_000 and server.arrived() == []
        server.end_round()
        counts.append(len(keys()))
    assert counts == [counts[0]] * 4
    server.close("4 of 4 rounds are done", is_finished=True)
    assert not [key for key in keys() if key.startswith("run/g")]
    with pytest.raises(EndedError, match="4 of 4 rounds are done"):
        for _ in range(LOOKS_PER_NOTE):
            end.look()


def test_nothing_stale_is_read(of_two_processes: tuple[Objects, Objects]) -> None:
    writer, reader = of_two_processes
    assert reader.read_note("a/note") is None and reader.files.names("a") == []
    for number in range(3):
        writer.write_note("a/note", {"number": number})
        assert reader.read_note("a/note") == {"number": number} and reader.files.names("a") == ["note.json"]
    writer.files.delete("a/note.json")
    assert reader.read_note("a/note") is None and reader.files.names("a") == []


def test_a_look_is_one_request_and_no_listing(
    of_two_processes: tuple[Objects, Objects], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    reader = of_two_processes[1]
    call = type(reader.files._fs)._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        requests.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(reader.files._fs), "_call_s3", counted)
    assert not reader.is_there("a")
    reader.put("a", b"content")
    assert reader.get("a") == b"content"
    assert requests == ["get_object", "put_object", "put_object", "get_object", "get_object"]


@pytest.mark.parametrize("act", ["come", "serve", "write"])
def test_a_missing_bucket(s3_endpoint: str, act: str) -> None:
    store = store_at(s3_endpoint, "s3://missing/run")
    acts = {
        "come": lambda: store.client_end("ward-1").look_for_run(),
        "serve": lambda: store.server_end().open("run-1"),
        "write": lambda: store.objects().put("a", b""),
    }
    with pytest.raises(
        StoreError, match="is in a bucket that does not exist. Look for a misspelling, or make the bucket"
    ):
        acts[act]()
    buckets = boto3.client("s3", endpoint_url=s3_endpoint).list_buckets()["Buckets"]
    assert [bucket["Name"] for bucket in buckets] == [BUCKET]


def test_no_credentials(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match="does not let this process read 'coordinator.json'.*its credentials are set"):
        store_at(s3_endpoint, skip_instance_cache=True).client_end("ward-1").look_for_run()


def test_a_url_that_is_none(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match="Invalid endpoint: nonsense"):
        store_at("nonsense").client_end("ward-1").look_for_run()
