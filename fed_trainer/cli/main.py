# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The verbs of `fed-trainer`, and how they end."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import transformers

from .verbs import VERBS


__all__ = ["BAD_INPUT", "ENDED_EARLY", "INTERRUPTED", "TERMINATED", "main"]

BAD_INPUT, ENDED_EARLY, INTERRUPTED, TERMINATED = 2, 3, 130, 143
"""Exit codes: what was given cannot work; the run was broken off or nobody serves; an interrupt; a SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Those of the process, if not given.

    Returns:
        `int`: The exit code: 0 if all is done, 2 if what was given cannot work, 3 if the run was broken off or nobody
        serves, 130 after an interrupt, 143 after a SIGTERM.
    """
    parser = argparse.ArgumentParser(prog="fed-trainer", description="Federated fine-tuning between machines.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.help, description=verb.help)
        verb.add_arguments(own)
        own.set_defaults(act=verb.act)
    given = parser.parse_args(arguments)
    _say_what_happens(bool(getattr(given, "verbose", False)))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end_in_order)
    return _ending(given.act, given)


def _end_in_order(number: int, frame: Any) -> None:
    """As a service manager ends a process: the other side is told, as after Ctrl-C."""
    raise SystemExit(TERMINATED)


def _say_what_happens(is_verbose: bool) -> None:
    """Our own lines with the time; of the libraries warnings, and not what they are going to change."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    own = logging.getLogger("fed_trainer")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
    if not is_verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _ending(act: Callable[[argparse.Namespace], int | None], given: argparse.Namespace) -> int:
    """Run a verb, and say in a sentence how it has ended if it has not done what it should."""
    from ..federation.transport.ends import EndedError, NetworkError
    from ..federation.validation import TooFewClientsError
    from ..output.run_lock import FolderInUseError

    try:
        return act(given) or 0
    except EndedError as error:
        return _said(error, ENDED_EARLY)
    except (
        NetworkError,
        TooFewClientsError,
        FolderInUseError,
        ValueError,
        NotImplementedError,
        ImportError,
        OSError,
    ) as error:
        return _said(error, BAD_INPUT)
    except KeyboardInterrupt:
        print("Interrupted. What was kept is kept: start again to go on.", file=sys.stderr)
        return INTERRUPTED


def _said(error: BaseException, code: int) -> int:
    print(f"{error}", file=sys.stderr)
    return code
