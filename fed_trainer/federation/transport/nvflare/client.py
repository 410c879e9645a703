# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A client's end of an NVFlare job."""

from __future__ import annotations

import secrets

from ..ends import ClientEnd, EndedError
from .messages import ANSWER, GREETING, HELLO, MESSAGE, OVER, STRANGER, Attachment, LostError, Message


__all__ = ["NVFlareClientEnd"]

LOOK = 1.0  # seconds for which a look waits: NVFlare wakes it when something comes in


class NVFlareClientEnd(ClientEnd):
    """
    Answers what NVFlare delivers, task by task. NVFlare attaches a process once: when the job is gone, the process has
    to be started again for the next one.

    Args:
        attachment ([`Attachment`]):
            What NVFlare gives.
        client (`str`):
            The name, which is that of the site.
        patience (`float`):
            Seconds to wait for a job.
    """

    def __init__(self, attachment: Attachment, client: str, patience: float) -> None:
        self._attachment, self.client, self._patience = attachment, client, patience
        self._session = secrets.token_hex(8)
        self._hello: bytes | None = None
        self._generation = 0
        self._is_attached = False

    @property
    def session(self) -> str:
        return self._session

    @property
    def generation(self) -> int:
        return self._generation

    def look_for_run(self) -> tuple[str, int, bytes] | None:
        message = self._receive()
        if message is None:
            return None
        if message.kind != GREETING:
            self._answer(Message(STRANGER, {"session": self._session}))
            return None
        self._generation = int(message.fields["generation"])
        return str(message.fields["run"]), self._generation, message.content

    def enrol(self, hello: bytes) -> None:
        self._hello = hello
        self._answer(Message(HELLO, {"session": self._session}, hello))

    def look(self) -> tuple[int, bytes | str] | None:
        message = self._receive()
        if message is None:
            return None
        if message.kind == GREETING and self._hello is not None:
            self._generation = int(message.fields["generation"])
            self._answer(Message(HELLO, {"session": self._session}, self._hello))
            return None
        if message.kind != MESSAGE or message.fields.get("session") != self._session:
            self._answer(Message(STRANGER, {"session": self._session}))
            return None
        return int(message.fields["number"]), message.content

    def reply(self, number: int, content: bytes) -> None:
        fields = {"generation": self._generation, "session": self._session, "number": number}
        self._answer(Message(ANSWER, fields, content))

    def close(self) -> None:
        """NVFlare's threads would keep the process alive."""
        self._attachment.close()

    def _answer(self, message: Message) -> None:
        try:
            self._attachment.answer(message)
        except LostError as lost:
            raise self._ended(lost) from lost

    def _receive(self) -> Message | None:
        """The next message of the job, for which it waits first: NVFlare has no shorter look at that."""
        if not self._is_attached:
            self._open()
        try:
            message = self._attachment.receive(LOOK)
        except LostError as lost:
            raise self._ended(lost) from lost
        if message is not None and message.kind == OVER:
            self._answer(Message(HELLO, {"session": self._session}))
            raise EndedError(f"The run is over: {message.fields.get('reason')}", message.fields["is_finished"] is True)
        return message

    def _ended(self, lost: LostError) -> EndedError:
        return EndedError(
            f"The NVFlare job of {self.client!r} is gone ({lost}). Start this client again: it waits for the next "
            "job, and what was kept is kept."
        )

    def _open(self) -> None:
        try:
            self._attachment.open(self._patience)
        except LostError as lost:
            raise EndedError(
                f"Nothing was heard of an NVFlare job for {self._patience:g} seconds: {lost}. Look whether the "
                f"NVFlare client of {self.client!r} runs and a job was submitted, and start this client again; what "
                "was kept is kept."
            ) from lost
        self._is_attached = True
