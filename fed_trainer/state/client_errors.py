# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What is said of a client that failed, outside of its own log."""

from __future__ import annotations


__all__ = ["ClientError", "public_reason"]


class ClientError(ValueError):
    """
    A client whose local round cannot be used, in our own words: the message quotes nothing that the client holds, so
    it may stand in the record and in the logs of others.
    """


def public_reason(error: BaseException) -> str:
    """
    What may be said of an error outside of the client's own log: the message of a [`ClientError`], of others the
    class. Their messages, such as that of a tokeniser, can quote a row.
    """
    name = type(error).__name__
    if type(error) is ClientError:
        return str(error)
    return f"{name}: {error}" if isinstance(error, ClientError) else name
