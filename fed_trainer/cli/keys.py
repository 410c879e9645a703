# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer keys FILE --name NAME`"""

from __future__ import annotations

from ..federation.transport.keys import Identity, make_keys


__all__ = ["public_lines"]


def public_lines(file: str | None, name: str | None, show: str | None) -> list[str]:
    """
    Make keys, or look at those that are there.

    Args:
        file (`str`, *optional*), name (`str`, *optional*):
            Where new keys go, and whose they are.
        show (`str`, *optional*):
            Keys that are there, in place of the two.

    Returns:
        `list[str]`: The public line and the fingerprint.

    Raises:
        ValueError: If neither or both were given, or what [`make_keys`] and [`Identity.load`] raise.
    """
    if (show is None) == (file is None or name is None):
        raise ValueError("Give FILE and `--name NAME` to make keys, or `--show FILE` to look at those that are there.")
    public = Identity.load(show).public if show is not None else make_keys(str(file), str(name))
    return [str(public), f"fingerprint: {public.fingerprint}"]
