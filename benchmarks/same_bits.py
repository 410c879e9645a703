# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Short federations under two source trees, side by side on this machine, compared bit for bit.

A tree of the commit `--base` is made beside, and `same_bits_cases.py` of this tree is run with either: every tensor of
the final adapter and of the last checkpoint (server, clients), all figures that are logged, returned or recorded,
without times, and the byte counts have to be the same. Some runs are also stopped after two rounds and resumed in a
new process, which has to end like the one that was not stopped; and this tree resumes what the base has left, or
refuses it with a `ValueError`.

    python benchmarks/same_bits.py --base f03948f
    python benchmarks/same_bits.py --base f03948f --cases slora ddp --keep /tmp/bits

There is one line per comparison, and the exit code is 1 if something differs. What differs is of one of the kinds

* `bytes`: a byte count;
* `names`: a tensor has another name, with the same bits;
* `additions`: a tensor or figure is new;
* `values`: anything else.

With `--ignore` the first three are shown and not counted. With `--keep` all runs stay in a folder, and those of the
base are taken from there the next time. `--write` writes the values that `tests/test_golden_values.py` compares with.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from same_bits_outcome import differences, golden_values, read_outcome, told

from fed_trainer.output.owned import make_own, remove_own_folder


ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("same_bits_cases.py")
GOLDEN = ROOT / "tests" / "golden_values.json"


class Tree(NamedTuple):
    """A source tree, and where its runs go."""

    source: Path
    results: Path


def environment_of(tree: Tree, deepspeed: Path | None) -> dict[str, str]:
    path = [str(tree.source), *([str(deepspeed)] if deepspeed else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if deepspeed:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["PATH"] = os.pathsep.join([str(deepspeed / "bin"), os.environ["PATH"]])  # ninja
    return environment


def run_parts(tree: Tree, model: Path, parts: list[str], launch: str, deepspeed: Path | None) -> None:
    """
    Run cases under a tree in a new process, or in those of a launch.

    Args:
        parts: `"<case>.<stage>"`.

    Raises:
        RuntimeError: If the process has ended early, as one that imports another tree does.
    """
    for part in parts:
        (tree.results / part).mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if launch:
        config = ROOT / "recipes" / "accelerate" / f"{launch}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    command += [str(WORKER), str(tree.source), str(model), str(tree.results), *parts]
    environment = environment_of(tree, deepspeed if launch.startswith("zero") else None)
    log = tree.results / f"{parts[0]}.log"
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if missing := [part for part in parts if not (tree.results / part / "figures.json").is_file()]:
        text = log.read_text(encoding="utf-8")[-3000:]
        raise RuntimeError(f"Of {tree.source} there is nothing of {missing}. The processes have ended with\n{text}")


def run_all(base: Tree, head: Tree, reused: bool, model: Path, cases: dict[str, Any], deepspeed: Path | None) -> None:
    """Every case, under both trees at once, or under `head` alone if the results of `base` are there."""
    trees = [head] if reused else [base, head]
    resumed = [name for name, case in cases.items() if case.resumed]

    def at_once(launch: str, *parts: list[str]) -> None:
        with ThreadPoolExecutor(len(trees)) as pool:
            list(pool.map(lambda tree, parts: run_parts(tree, model, parts, launch, deepspeed), trees, parts))

    for launch in dict.fromkeys(case.launch for case in cases.values()):
        parts = [f"{name}.whole" for name, case in cases.items() if case.launch == launch]
        parts += [] if launch else [f"{name}.stopped" for name in resumed]
        at_once(launch, *([parts] * len(trees)))
    if not resumed:
        return
    for name in resumed:
        for tree in trees:
            copy_run(tree.results / f"{name}.stopped", tree.results / f"{name}.resumed")
        copy_run(base.results / f"{name}.stopped", head.results / f"{name}.old")
    own = [f"{name}.resumed" for name in resumed]
    both = [*own, *(f"{name}.old" for name in resumed)]
    at_once("", *([both] if reused else [own, both]))


def copy_run(stopped: Path, to: Path) -> None:
    shutil.copytree(stopped, to, ignore=lambda folder, names: [name for name in names if name == "figures.json"])


@contextlib.contextmanager
def base_tree(args: argparse.Namespace) -> Iterator[Path]:
    """The checkout that was given, or a worktree for the time being."""
    if args.base_tree is not None:
        yield args.base_tree.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        git("worktree", "add", "--quiet", "--detach", str(tree), args.base)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*command: str, where: Path = ROOT) -> str:
    return subprocess.run(
        ["git", "-C", str(where), *command], check=True, capture_output=True, text=True
    ).stdout.strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="commit to compare with")
    parser.add_argument("--base-tree", type=Path, help="a checkout of it, instead of one made for the time being")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="some of the cases, instead of all")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where runs stay, and those of the base are reused")
    kinds = ("bytes", "names", "additions")
    parser.add_argument("--ignore", nargs="+", choices=kinds, default=[], help="differences that do not count")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--write", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)} instead")
    parser.add_argument(
        "--deepspeed-folder",
        type=Path,
        default=os.environ.get("DEEPSPEED_FOLDER", ROOT / ".venv" / "deepspeed"),
        help="where DeepSpeed is, if it is not importable",
    )
    args = parser.parse_args()
    if not (args.base or args.base_tree or args.list or args.write):
        parser.error("give --base, --base-tree, --list or --write")
    return args


def write_golden_values(cases: Any) -> None:
    torch.set_num_threads(1)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        cases.make_model(Path(folder) / "model")
        for name, case in cases.CASES.items():
            if case.is_golden:
                (Path(folder) / name).mkdir()
                cases.run(name, Path(folder) / "model", Path(folder) / name)
                values[name] = golden_values(read_outcome(Path(folder) / name))
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in case.items())
        + "\n }"
        for name, case in values.items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def stamp_of(source: Path) -> str | None:
    """What the results of the base depend on; `None` if the tree is not that of a commit."""
    if git("status", "--porcelain", where=source):
        return None
    cases = hashlib.sha256(WORKER.read_bytes()).hexdigest()
    return f"{git('rev-parse', 'HEAD', where=source)} {cases} {torch.__version__}"


def compare(folder: Path, source: Path, cases: dict[str, Any], args: argparse.Namespace) -> bool:
    """Run and compare, with a line per comparison; whether all is the same."""
    base, head, stamp = Tree(source, folder / "base"), Tree(ROOT, folder / "head"), stamp_of(source)
    stamp_file = base.results / "stamp.txt"
    reused = stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp
    reused = reused and all((base.results / f"{name}.whole" / "figures.json").is_file() for name in cases)
    for tree in (head,) if reused else (base, head):
        remove_own_folder(tree.results)
        make_own(tree.results)  # which raises if something else is there
    local = args.deepspeed_folder if (Path(args.deepspeed_folder) / "deepspeed").is_dir() else None
    run_all(base, head, reused, folder / "model", cases, local)
    if stamp is not None and stamp == stamp_of(source):  # not if something was edited meanwhile
        stamp_file.write_text(stamp, encoding="utf-8")

    all_same = True

    def show(name: str, of_base: Path, of_head: Path, state_alone: bool = False) -> None:
        nonlocal all_same
        left, right = read_outcome(of_base), read_outcome(of_head)
        if of_head.suffix == ".old" and right.error.startswith("ValueError"):
            line, differs = f"refused with {right.error}", False
        else:
            line, differs = told(differences(left, right, state_alone), args.ignore)
        all_same &= not differs
        print(f"{name:<32} {line}", flush=True)

    for name, case in cases.items():
        show(name, base.results / f"{name}.whole", head.results / f"{name}.whole")
        if case.resumed:
            show(f"{name} resumed", base.results / f"{name}.resumed", head.results / f"{name}.resumed")
            whole = head.results / f"{name}.whole"
            show(f"{name} resumed or not", whole, head.results / f"{name}.resumed", state_alone=True)
            show(f"{name} old_checkpoint", base.results / f"{name}.resumed", head.results / f"{name}.old")
    return all_same


def main() -> int:
    args, start = parse(), time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import same_bits_cases as cases

    if args.list:
        print("\n".join(cases.CASES))
        return 0
    if args.write:
        write_golden_values(cases)
        return 0
    if unknown := set(args.cases or ()) - set(cases.CASES):
        raise SystemExit(f"There is no case {sorted(unknown)}; there are {list(cases.CASES)}.")
    chosen = {name: cases.CASES[name] for name in args.cases or cases.CASES}
    has_deepspeed = (Path(args.deepspeed_folder) / "deepspeed").is_dir() or importlib.util.find_spec("deepspeed")
    for name in [name for name, case in chosen.items() if case.launch.startswith("zero") and not has_deepspeed]:
        print(f"{name:<32} skipped: deepspeed is not installed: run `make env`")
        del chosen[name]
    with base_tree(args) as source, tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        if not (folder / "model").is_dir():
            cases.make_model(folder / "model")
        all_same = compare(folder, source, chosen, args)
    print(f"{'all the same' if all_same else 'there are differences'}, {time.perf_counter() - start:.0f} s")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
