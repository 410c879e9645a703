# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that speaks S3."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


BUCKET = "federation"


@pytest.fixture
def s3_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """
    The URL of a server with an empty bucket `federation`; the credentials that it takes are in the environment, and so
    is the URL, as `S3_ENDPOINT`.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "loopback",
        "AWS_SECRET_ACCESS_KEY": "loopback",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    monkeypatch.setenv("S3_ENDPOINT", url)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    yield url
    for entry in client.list_objects_v2(Bucket=BUCKET).get(
        "Contents", []
    ):  # servers of one process share what they hold
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    server.stop()
