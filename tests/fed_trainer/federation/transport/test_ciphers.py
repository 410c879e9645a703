# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Signatures and encryption against the vectors and the words of their standards."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from fed_trainer.federation.transport import ciphers


KEYS = st.binary(min_size=32, max_size=32)


# RFC 8032, section 7.1, TEST 1 to 3: private and public key, message, signature
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize("private, public, message, signature", RFC_8032, ids=["1", "2", "3"])
def test_signatures_are_those_of_the_standard(private, public, message, signature):
    assert ciphers.public_signing_key(bytes.fromhex(private)).hex() == public
    assert ciphers.sign(bytes.fromhex(message), bytes.fromhex(private)).hex() == signature
    assert ciphers.signed_by(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message))
    assert not ciphers.signed_by(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message) + b"\0")


P = 2**255 - 19


def x25519(private: bytes, public: bytes) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    k = int.from_bytes(private, "little") & ~7 & (2**255 - 1) | 2**254
    u = int.from_bytes(public, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, u, 1
    for t in reversed(range(255)):
        if k >> t & 1:
            x2, x3, z2, z3 = x3, x2, z3, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        x3, z3 = (da + cb) ** 2 % P, u * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, (aa - bb) * (aa + 121665 * (aa - bb)) % P
        if k >> t & 1:
            x2, x3, z2, z3 = x3, x2, z3, z2
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def extract(salt: bytes, label: bytes, key: bytes, suite: bytes) -> bytes:
    """`LabeledExtract` of RFC 9180, section 4, with HKDF-SHA256 (RFC 5869)."""
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + key, "sha256")


def expand(key: bytes, label: bytes, info: bytes, length: int, suite: bytes) -> bytes:
    """`LabeledExpand` there, of at most one block."""
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(key, labelled + b"\x01", hashlib.sha256)[:length]


def key_and_nonce(shared: bytes, shown: bytes, public: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 9180 in base mode, from what X25519 gives: DHKEM (0x0020), HKDF-SHA256 (0x0001), ChaCha20-Poly1305 (0x0003)."""
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x03"
    secret = expand(extract(b"", b"eae_prk", shared, kem), b"shared_secret", shown + public, 32, kem)
    context = b"\x00" + extract(b"", b"psk_id_hash", b"", suite) + extract(b"", b"info_hash", info, suite)
    key = extract(secret, b"secret", b"", suite)
    return expand(key, b"key", context, 32, suite), expand(key, b"base_nonce", context, 12, suite)


@given(private=KEYS)
def test_public_keys_are_those_of_the_standard(private):
    assert ciphers.public_encryption_key(private) == x25519(private, (9).to_bytes(32, "little"))


@given(content=st.binary(max_size=200), info=st.binary(max_size=50), private=KEYS)
def test_what_is_encrypted_can_be_decrypted_by_the_words_of_the_standard(content, info, private):
    public = ciphers.public_encryption_key(private)
    encrypted = ciphers.encrypt(content, public, info)
    assert len(encrypted) == len(content) + 48
    shown, payload = encrypted[:32], encrypted[32:]
    key, nonce = key_and_nonce(x25519(private, shown), shown, public, info)
    assert ChaCha20Poly1305(key).decrypt(nonce, payload, b"") == content


@given(content=st.binary(max_size=200), info=st.binary(max_size=50), private=KEYS, ephemeral=KEYS)
def test_what_was_encrypted_by_the_words_of_the_standard_is_decrypted(content, info, private, ephemeral):
    public, shown = ciphers.public_encryption_key(private), ciphers.public_encryption_key(ephemeral)
    key, nonce = key_and_nonce(x25519(ephemeral, public), shown, public, info)
    encrypted = shown + ChaCha20Poly1305(key).encrypt(nonce, content, b"")
    assert ciphers.decrypt(encrypted, private, info) == content


@given(content=st.binary(max_size=50), info=st.binary(max_size=50), private=KEYS, other=KEYS)
def test_only_the_recipient_decrypts_and_only_what_was_meant(content, info, private, other):
    encrypted = ciphers.encrypt(content, ciphers.public_encryption_key(private), info)
    for wrong in (
        (encrypted, private, info + b"\0"),
        (encrypted[:-1], private, info),
        (encrypted[:20], private, info),
    ):
        with pytest.raises(ciphers.CannotDecryptError):
            ciphers.decrypt(*wrong)
    if ciphers.public_encryption_key(other) != ciphers.public_encryption_key(private):
        with pytest.raises(ciphers.CannotDecryptError):
            ciphers.decrypt(encrypted, other, info)


def test_nothing_is_encrypted_for_points_of_low_order():
    assert not ciphers.can_encrypt_for(bytes(32))
    assert not ciphers.can_encrypt_for((1).to_bytes(32, "little"))
    assert ciphers.can_encrypt_for(ciphers.public_encryption_key(ciphers.new_encryption_key()))


def test_new_keys_are_new():
    assert len({make() for make in (ciphers.new_signing_key, ciphers.new_encryption_key) for _ in range(3)}) == 6
