# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Signatures and encryption, all of it by the package `cryptography`. Keys are their 32 raw bytes.

Only this module imports that package, and `keys` and `seal` import this module where they need it: without keys, a
federation does without the package.
"""

from __future__ import annotations


try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
except ImportError as error:
    raise ImportError(
        "Keys, signatures and encryption need the package `cryptography`, of version 47 or newer, which is not "
        "installed: run `pip install peft-scl[keys]`."
    ) from error


__all__ = [
    "CannotDecryptError",
    "can_encrypt_for",
    "decrypt",
    "encrypt",
    "new_encryption_key",
    "new_signing_key",
    "public_encryption_key",
    "public_signing_key",
    "sign",
    "signed_by",
]

# RFC 9180: a new X25519 key per message, and a secret from it, the recipient's key and `info`
HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class CannotDecryptError(ValueError):
    """What is to be decrypted was changed, or is not for this key."""


def new_signing_key() -> bytes:
    """A new private key of Ed25519."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def new_encryption_key() -> bytes:
    """A new private key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_signing_key(private: bytes) -> bytes:
    """The public key of Ed25519 that belongs to a private one."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def public_encryption_key(private: bytes) -> bytes:
    """The public key of X25519 that belongs to a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def can_encrypt_for(public: bytes) -> bool:
    """Whether a public key of X25519 leads to a secret: the few points of low order do not."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def sign(message: bytes, private: bytes) -> bytes:
    """The signature of Ed25519, 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def signed_by(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the signature of a message is by the private key of a public one."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def encrypt(content: bytes, public: bytes, info: bytes) -> bytes:
    """
    HPKE in base mode (RFC 9180).

    Args:
        content (`bytes`):
            What to encrypt.
        public (`bytes`):
            The recipient's key.
        info (`bytes`):
            What the secret depends on beside the keys. It is not encrypted and not carried.

    Returns:
        `bytes`: 48 more than `content`: the key of this message first (32), and a tag last (16).
    """
    return HPKE.encrypt(content, X25519PublicKey.from_public_bytes(public), info)


def decrypt(encrypted: bytes | memoryview, private: bytes, info: bytes) -> bytes:
    """
    What `encrypt` was given.

    Raises:
        CannotDecryptError: If a bit of it or of `info` is another one, or it was for another key.
    """
    try:
        return HPKE.decrypt(encrypted, X25519PrivateKey.from_private_bytes(private), info)
    except (InvalidTag, ValueError, OverflowError) as error:  # its tag, a key of low order, its size
        raise CannotDecryptError("It was changed on the way, or is not for this key.") from error
