# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
All places in the code that delete, rename or empty files, each with its reason: a new one has to be entered here.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from helpers.paths import ROOT


PACKAGES = ("fed_trainer", "peft_scl", "recipes", "benchmarks")
DELETING = {"rm", "rm_file", "rmtree", "unlink", "rmdir", "removedirs", "move", "renames", "truncate", "ftruncate"}
MODULES = {"os", "shutil"}  # whose `remove`, `replace` and `rename` take paths

# file, function, call: the reason
ALLOWED = {
    ("fed_trainer/output/checkpoint.py", "_put_aside", "os.replace"): "a damaged checkpoint, to a name that is free",
    ("fed_trainer/client/store.py", "ClientStore._write_index", "os.replace"): "the index, in a marked folder",
    ("fed_trainer/client/store.py", "ClientStore.write", "os.replace"): "a client's file, in a marked folder",
    (
        "fed_trainer/output/disk.py",
        "replace_durably",
        "os.replace",
    ): "a record, or a checkpoint to a name that was looked at",
    (
        "fed_trainer/federation/transport/keys.py",
        "_write_private",
        "path.unlink",
    ): "a file that was made a line before",
    ("fed_trainer/federation/transport/nvflare/kit.py", "_write", "os.replace"): "the profile of a kit, by its name",
    (
        "fed_trainer/federation/transport/store/files.py",
        "Files.delete.act",
        "rm_file",
    ): "a message, at an address where a run has its note",
    (
        "fed_trainer/federation/transport/store/files.py",
        "Files.delete_folder.act",
        "rm",
    ): "messages of a run; where something else lies, no run begins",
    ("fed_trainer/output/owned.py", "remove_own_files", "path.unlink"): "files that a run has listed as written by it",
    ("fed_trainer/output/owned.py", "remove_own_files", "parent.rmdir"): "folders that are empty",
    ("fed_trainer/output/owned.py", "remove_own_folder", "shutil.rmtree"): "a folder that is marked",
    ("fed_trainer/output/owned.py", "unmark", "unlink"): "the mark itself",
    (
        "fed_trainer/output/saved_files.py",
        "move_into_place",
        "os.replace",
    ): "what a save has written, over what an earlier one has",
    ("fed_trainer/output/saved_files.py", "raise_contents", "os.replace"): "within a marked folder",
    ("fed_trainer/output/saved_files.py", "raise_contents", "below.rmdir"): "an empty folder within a marked folder",
}


def deletions(source: str) -> Iterator[tuple[str, str]]:
    """Function and call of what deletes or renames in the source of a module."""

    def visit(node: ast.AST, function: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = (*function, node.name)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {alias.name for alias in node.names} & (DELETING | {"remove", "replace", "rename"})
            yield from ((".".join(function), f"from {node.module} import {name}") for name in names)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in DELETING or (owner in MODULES and node.attr in ("remove", "replace", "rename")):
                yield ".".join(function), f"{owner}.{node.attr}".lstrip(".")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_path_method(node):
            yield ".".join(function), ast.unparse(node.func)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), ())


def _is_path_method(call: ast.Call) -> bool:
    """
    `path.rename(target)` and `path.replace(target)`; a string's `replace` takes two arguments, a data set's
    `rename_column` is another.
    """
    assert isinstance(call.func, ast.Attribute)
    is_module = isinstance(call.func.value, ast.Name) and call.func.value.id in MODULES | {"dataclasses"}
    return call.func.attr in ("rename", "replace") and len(call.args) == 1 and not call.keywords and not is_module


def test_every_deletion_in_the_code_has_a_reason() -> None:
    found = Counter(
        (path.relative_to(ROOT).as_posix(), *place)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for place in deletions(path.read_text(encoding="utf-8"))
    )
    new = {place for place in found if place not in ALLOWED or found[place] > 1}
    assert not new, "enter it into ALLOWED with the reason why it cannot meet what we have not written"
    assert not ALLOWED.keys() - found.keys(), "no longer there"


@pytest.mark.parametrize(
    "line",
    [
        "shutil.rmtree(folder)",
        "os.remove(path)",
        "os.unlink(path)",
        "Path(folder, 'x').unlink()",
        "(folder / 'x').rmdir()",
        "os.rename(path, other)",
        "path.rename(other)",
        "path.replace(other)",
        "os.truncate(path, 0)",
        "shutil.move(path, other)",
        "from shutil import rmtree",
        "folders.map(shutil.rmtree)",
    ],
)
def test_a_new_deletion_is_found(line: str) -> None:
    assert list(deletions(f"def tidy():\n    {line}\n"))


def test_what_deletes_nothing_is_not_found() -> None:
    harmless = "text.replace('a', 'b')\nhandle.remove()\nnames.remove(name)\ndataclasses.replace(settings, r=1)\n"
    assert not list(deletions(harmless))
