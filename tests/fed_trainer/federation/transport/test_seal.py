# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A sealed message is the one that is expected, from whom it says, or it is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation.transport import ciphers
from fed_trainer.federation.transport import seal as module
from fed_trainer.federation.transport.ends import DamagedMessageError
from fed_trainer.federation.transport.seal import Header, RefusedMessageError, seal, unseal
from helpers.boards import identity_of


WARD, OTHER, COORDINATOR = identity_of("ward-1"), identity_of("ward-2"), identity_of("coordinator")
HEADER = Header("run-1", "ward-1", "coordinator", 2, "a1b2", 3, "up")
CONTENT = b"the weights of ward 1"
HEADERS = st.builds(
    Header,
    run=st.text(st.characters(codec="utf-8"), max_size=20),
    sender=st.just("ward-1"),
    recipient=st.text(st.characters(codec="utf-8"), max_size=20),
    generation=st.integers(0, 2**60),
    session=st.text(st.characters(codec="utf-8"), max_size=20),
    number=st.integers(0, 2**60),
    kind=st.sampled_from(["up", "down"]),
)
WAYS = pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "encrypted"])


def sealed(encrypted: bool, header: Header = HEADER, content: bytes = CONTENT) -> bytes:
    return seal(content, header, WARD, COORDINATOR.public if encrypted else None)


def opened(message: bytes, header: Header = HEADER, must_be_encrypted: bool = False) -> bytes:
    return unseal(message, header, WARD.public, COORDINATOR, must_be_encrypted)


@given(content=st.binary(max_size=300), header=HEADERS, encrypted=st.booleans())
def test_what_was_sealed_is_opened(content, header, encrypted):
    message = sealed(encrypted, header, content)
    assert opened(message, header, must_be_encrypted=encrypted) == content
    assert len(message) == 13 + len(header.to_bytes()) + 32 + 64 + len(content) + (48 if encrypted else 0)


@WAYS
def test_every_changed_bit_is_refused(encrypted):
    message = sealed(encrypted)
    for place in range(len(message)):
        for bit in range(8):
            changed = bytearray(message)
            changed[place] ^= 1 << bit
            with pytest.raises(RefusedMessageError):
                opened(bytes(changed))


@WAYS
def test_every_other_length_is_refused(encrypted):
    message = sealed(encrypted)
    for changed in [*(message[:length] for length in range(len(message))), message + b"\0", message + message]:
        with pytest.raises(RefusedMessageError):
            opened(changed)


@given(message=st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"fedseal\x01\x00" + rest))
def test_whatever_comes_is_refused(message):
    with pytest.raises(RefusedMessageError):
        opened(message)


@WAYS
@pytest.mark.parametrize("name", [field.name for field in fields(Header)])
def test_a_message_of_another_header_is_refused(encrypted, name):
    """One that was signed by the right site, but at another time, for somebody else, or in another run."""
    value = getattr(HEADER, name)
    other = replace(HEADER, **{name: value + 1 if isinstance(value, int) else f"{value}x"})
    with pytest.raises(RefusedMessageError, match=f"says that its `{name}` is .* is expected, in 'up' of 'ward-1'"):
        opened(sealed(encrypted, other))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda told: told | {"number": 3.0}, "`number` is 3.0, but 3"),
        (lambda told: told | {"generation": True}, "`generation` is True, but 2"),
        (lambda told: told | {"session": None}, "`session` is None"),
        (lambda told: told | {"session": ["a1b2"]}, "`session` is a list"),
        (lambda told: {name: told[name] for name in told if name != "run"}, "`run` is missing"),
        (lambda told: told | {"more": 1}, "not written as this version writes it"),
        (lambda told: [told], "`run` is missing"),
    ],
)
def test_a_header_is_compared_to_the_bit(monkeypatch, change, reason):
    monkeypatch.setattr(
        Header,
        "to_bytes",
        lambda header: json.dumps(change(asdict(header)), sort_keys=True, separators=(",", ":")).encode(),
    )
    message = sealed(False)
    monkeypatch.undo()
    with pytest.raises(RefusedMessageError, match=reason):
        opened(message)


def header_replaced(message: bytes, told: bytes) -> bytes:
    """What the owner of a store can do: another header, with a length that fits."""
    length = len(HEADER.to_bytes())
    return message[:9] + len(told).to_bytes(4, "big") + told + message[13 + length :]


@WAYS
def test_a_header_that_was_put_in_place_of_another_is_refused(encrypted):
    other = replace(HEADER, number=4)
    with pytest.raises(RefusedMessageError, match="not signed with the key that is known"):
        opened(header_replaced(sealed(encrypted, other), HEADER.to_bytes()))
    with pytest.raises(RefusedMessageError, match="is no JSON"):
        opened(header_replaced(sealed(encrypted), b"{"))
    with pytest.raises(RefusedMessageError, match="is no JSON"):
        opened(header_replaced(sealed(encrypted), b"[" * 60000))


def test_a_header_that_is_too_long_is_not_read():
    with pytest.raises(RefusedMessageError, match="its header should have 65537 bytes"):
        opened(header_replaced(sealed(False), b"[" * (2**16 + 1)))


@WAYS
@pytest.mark.parametrize("forger", [OTHER, identity_of("ward-1", attempt=1)], ids=["another site", "another key"])
def test_a_message_of_somebody_else_is_refused(encrypted, forger):
    message = seal(CONTENT, HEADER, forger, COORDINATOR.public if encrypted else None)
    with pytest.raises(RefusedMessageError, match=f"not signed with the key that is known .{WARD.fingerprint}"):
        opened(message)


@pytest.mark.parametrize(
    "signer, header",
    [(OTHER, HEADER), (OTHER, replace(HEADER, sender="ward-2")), (WARD, replace(HEADER, number=4))],
    ids=["another site in its name", "another site", "the site itself, as another message"],
)
def test_what_was_encrypted_belongs_to_its_header_and_signer(signer, header):
    """The signature is outside, so that it can be replaced: but then the content cannot be decrypted."""
    payload = sealed(True)[13 + len(HEADER.to_bytes()) + 96 :]
    start = sealed(True)[:9] + len(header.to_bytes()).to_bytes(4, "big") + header.to_bytes()
    head = start + hashlib.sha256(payload).digest()
    with pytest.raises(RefusedMessageError, match="cannot be decrypted with the key of 'coordinator'"):
        unseal(head + ciphers.sign(head, signer.signing) + payload, header, signer.public, COORDINATOR)


def test_only_the_recipient_reads_what_is_encrypted():
    assert CONTENT in sealed(False) and CONTENT not in sealed(True)
    assert sealed(False) == sealed(False) and sealed(True) != sealed(True)
    with pytest.raises(RefusedMessageError, match="cannot be decrypted with the key of 'ward-2'.*is for another key"):
        unseal(sealed(True), HEADER, WARD.public, OTHER)


def test_what_has_to_be_encrypted_is_refused_in_the_clear():
    with pytest.raises(RefusedMessageError, match="is in the clear, but this run's messages are encrypted"):
        opened(sealed(False), must_be_encrypted=True)
    with pytest.raises(RefusedMessageError, match="not signed"):  # the flag is signed, too
        opened(sealed(False)[:8] + b"\1" + sealed(False)[9:], must_be_encrypted=True)


@pytest.mark.parametrize("place, value, version", [(7, 2, "2.0"), (8, 2, "1.2")])
def test_another_version_is_named(place, value, version):
    message = bytearray(sealed(False))
    message[place] = value
    with pytest.raises(RefusedMessageError, match=f"in version {version} .*use the same version of peft-scl"):
        opened(bytes(message))


def test_a_refused_message_is_a_damaged_one():
    assert issubclass(RefusedMessageError, DamagedMessageError)


def test_what_cannot_be_sealed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="A header has at most 65536 bytes, but this one has"):
        sealed(False, replace(HEADER, run="x" * 2**16))
    monkeypatch.setattr(module, "MOST_ENCRYPTED", 10)
    with pytest.raises(ValueError, match="At most 10 bytes can be encrypted as one, but these are 21"):
        sealed(True)
    assert opened(sealed(False)) == CONTENT
