# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Client data of the offline demo, built from the documentation of the running interpreter's standard library.

Each client holds the documentation strings of other modules, so the clients differ in subject, vocabulary and size: a
split that nobody drew by hand. The sources are parsed, never imported, so no module of the standard library runs.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset


__all__ = [
    "CLIENTS",
    "STDLIB",
    "DocEntry",
    "build_clients",
    "iter_documentation",
    "shorten",
    "split_paragraphs",
    "text_key",
]

# Only modules that every supported Python has, and that distributions do not package separately (as they do
# `tkinter`).
CLIENTS: dict[str, tuple[str, ...]] = {
    "concurrency": ("_threading_local", "asyncio", "concurrent", "multiprocessing", "queue", "selectors", "threading"),
    "containers": (
        "_collections_abc",
        "abc",
        "bisect",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "heapq",
        "operator",
        "types",
        "typing",
        "weakref",
    ),
    "files": (
        "fileinput",
        "fnmatch",
        "glob",
        "gzip",
        "os",
        "pathlib",
        "shutil",
        "tarfile",
        "tempfile",
        "zipfile",
    ),
    "formats": ("configparser", "csv", "html", "json", "plistlib", "xml", "xmlrpc"),
    "mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "numbers": ("_pydecimal", "fractions", "numbers", "random", "statistics"),
    "tools": (
        "argparse",
        "bdb",
        "cmd",
        "doctest",
        "inspect",
        "logging",
        "optparse",
        "pdb",
        "pstats",
        "timeit",
        "trace",
        "traceback",
        "unittest",
    ),
    "web": ("ftplib", "http", "ipaddress", "socket", "socketserver", "ssl", "urllib", "webbrowser", "wsgiref"),
}

STDLIB = Path(sysconfig.get_path("stdlib"))


class DocEntry(NamedTuple):
    """
    The documentation of one module, class or function.

    Args:
        name (`str`):
            Qualified name, such as `"asyncio.queues.Queue.put"`.
        signature (`str`):
            Parameters in parentheses, such as `"(self, item)"`. Empty for a module or a class.
        docstring (`str`):
            The documentation string, with its indentation removed.
    """

    name: str
    signature: str
    docstring: str


def iter_documentation(module: str) -> Iterator[DocEntry]:
    """
    Yields the documentation of a top-level module of the standard library and of its submodules, in source order.

    Args:
        module (`str`):
            Name of a top-level module or package, such as `"asyncio"`.

    Yields:
        [`DocEntry`]: One entry for each public module, class, method and function that has a documentation string.

    Raises:
        FileNotFoundError: If this Python has no source of `module`.
    """
    root = STDLIB / module
    if root.is_dir():
        relative = sorted(path.relative_to(STDLIB).as_posix() for path in root.rglob("*.py"))
        paths = [STDLIB / path for path in relative if not {"test", "tests", "idle_test"} & set(path.split("/"))]
    else:
        paths = [root.with_suffix(".py")]

    for path in paths:
        name = ".".join(path.relative_to(STDLIB).with_suffix("").parts).removesuffix(".__init__")
        # `_pydecimal` and `_pyio` are the Python sources of `decimal` and `io`, whose usual versions are written in C.
        name = name.removeprefix("_py")
        tree = ast.parse(path.read_bytes())
        docstring = ast.get_docstring(tree)
        if docstring:
            yield DocEntry(name, "", docstring)
        yield from _iter_definitions(tree, name)


def _iter_definitions(parent: ast.AST, parent_name: str) -> Iterator[DocEntry]:
    for node in ast.iter_child_nodes(parent):
        # Definitions that depend on the platform or on an optional module stand inside `if` and `try`.
        if isinstance(node, (ast.If, ast.Try)):
            yield from _iter_definitions(node, parent_name)
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        name = f"{parent_name}.{node.name}"
        signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        docstring = ast.get_docstring(node)
        if docstring:
            yield DocEntry(name, signature, docstring)
        if isinstance(node, ast.ClassDef):
            yield from _iter_definitions(node, name)


def split_paragraphs(text: str) -> list[str]:
    """
    Splits a text into its paragraphs of prose, each on one line. Interactive examples are left out.

    Args:
        text (`str`):
            A documentation string.

    Returns:
        `list[str]`: The paragraphs, with every run of whitespace replaced by one space.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.replace("\r", "").split("\n\n"))
    return [paragraph for paragraph in paragraphs if paragraph and ">>>" not in paragraph]


def shorten(paragraphs: list[str], max_chars: int) -> str:
    """
    Joins the first paragraphs that fit into a length.

    Args:
        paragraphs (`list[str]`):
            At least one paragraph, each on one line.
        max_chars (`int`):
            Largest length of the result, in characters. A first paragraph that is longer is cut after its last full
            sentence, or, if it has none, after its last full word.

    Returns:
        `str`: The paragraphs, separated by newlines.
    """
    first = paragraphs[0]
    if len(first) > max_chars:
        # One more character, so that a sentence or a word that ends exactly at the limit is kept.
        head = first[: max_chars + 1]
        end = head.rfind(". ") + 1 or head.rfind(" ")
        return first[:end] if end > 0 else first[:max_chars]

    text = first
    for paragraph in paragraphs[1:]:
        if len(text) + 1 + len(paragraph) > max_chars:
            break
        text += "\n" + paragraph
    return text


def text_key(text: str) -> str:
    """
    Returns the letters and digits of a text in lower case: "Return a copy." and "return a copy" are one text to learn.
    """
    return "".join(filter(str.isalnum, text.lower()))


def build_clients(
    max_chars: int = 400, min_chars: int = 20, test_percent: int = 10
) -> tuple[dict[str, Dataset], Dataset]:
    """
    Builds the training data of each client, and one test set drawn from all of them.

    A row asks for the documentation of a name: `prompt` is the qualified name with its parameters and a newline,
    `completion` the first paragraphs of the documentation, and `package` the top-level module. A completion that
    occurs more than once stays with the first name that has it, so that no test row is also a training row.

    Args:
        max_chars (`int`, *optional*, defaults to `400`):
            Largest length of a completion, in characters.
        min_chars (`int`, *optional*, defaults to `20`):
            Smallest length of a completion, in characters. Shorter ones say too little to be learned from.
        test_percent (`int`, *optional*, defaults to `10`):
            Share of the names held out for the test set, in percent, chosen by a hash of the qualified name.

    Returns:
        `tuple[dict[str, Dataset], Dataset]`: The training set of each client of [`CLIENTS`], in its order, and the
        test set. The rows are the same in every process that runs the same Python version.
    """
    clients: dict[str, Dataset] = {}
    test_rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for client, modules in CLIENTS.items():
        train_rows: list[dict[str, str]] = []
        for module in modules:
            for entry in iter_documentation(module):
                paragraphs = split_paragraphs(entry.docstring)
                completion = shorten(paragraphs, max_chars) if paragraphs else ""
                key = text_key(completion)
                if len(completion) < min_chars or key in seen:
                    continue
                seen.add(key)
                # `hash()` of a string differs from process to process; a digest does not.
                digest = hashlib.sha256(entry.name.encode()).digest()
                rows = test_rows if int.from_bytes(digest[:4], "big") % 100 < test_percent else train_rows
                rows.append(
                    {
                        "prompt": f"{entry.name}{entry.signature}\n",
                        "completion": completion,
                        "package": entry.name.split(".")[0],
                    }
                )
        clients[client] = Dataset.from_list(train_rows)
    return clients, Dataset.from_list(test_rows)
