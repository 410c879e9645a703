# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Short federations under two source trees, side by side on this machine, compared bit for bit.

A tree of the commit `--base` is made beside, and `same_bits_cases.py` of this tree is run with either: every tensor of the final
adapter and of the last checkpoint (server, clients), all figures that are logged, returned or recorded, without times, and the
byte counts have to be the same. Some runs are also stopped after two rounds and resumed in a new process, which has to end like
the one that was not stopped; and this tree resumes what the base has left, or refuses it with a `ValueError`.

    python benchmarks/same_bits.py --base f03948f
    python benchmarks/same_bits.py --base f03948f --cases slora ddp --keep /tmp/bits

There is one line per comparison, and the exit code is 1 if something differs. What differs is of one of the kinds

* `bytes`: a byte count;
* `names`: a tensor has another name, with the same bits;
* `additions`: a tensor or figure is new;
* `values`: anything else.

With `--ignore` the first three are shown and not counted. With `--keep` all runs stay in a folder, and those of the base are taken
from there the next time. `--write` writes the values that `tests/test_golden_values.py` compares with.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("same_bits_cases.py")
GOLDEN = ROOT / "tests" / "golden_values.json"
TIMES = ("runtime", "seconds", "per_second")
KINDS = ("bytes", "names", "additions")


# What a run has left


class Outcome(NamedTuple):
    """
    What is compared: `tensors` by role (names may repeat, with one file per client), and `figures` by their path. Of a run that
    ended with an error there is nothing but the error.
    """

    tensors: dict[str, list[tuple[str, torch.Tensor]]]
    figures: dict[str, Any]
    error: str = ""


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The rounds in the record: under `rounds`, or a line each in a file beside it."""
    record = json.loads((folder / "federation.json").read_text(encoding="utf-8"))
    if "rounds" in record:
        return record["rounds"]
    (lines,) = folder.glob("federation*.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested figures by path, without times."""
    if any(time in path for time in TIMES):
        return {}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    inner = (flat(entry, f"{path}.{key}" if path else str(key)) for key, entry in value.items())
    return {key: entry for part in inner for key, entry in part.items()}


def read_outcome(folder: Path) -> Outcome:
    """What the case has left that ran in `folder`."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    if "error" in figures:
        return Outcome({}, {}, figures["error"])
    out = folder / "out"
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    weights = {path for path in checkpoint.glob("*.safetensors") if path.stem in ("adapter_model", "model")}
    files = {
        "final": out.glob("*.safetensors"),
        "checkpoint": weights,
        "server": set(checkpoint.glob("*.safetensors")) - weights,
        "clients": checkpoint.glob("*/**/*.safetensors"),
        "client models": (folder / "client_models").glob("**/*.safetensors"),
    }
    tensors = {
        role: [entry for path in sorted(paths) for entry in load_file(path).items()] for role, paths in files.items()
    }
    return Outcome(tensors, flat({"rounds": rounds_of(out), **figures}))


def golden_values(outcome: Outcome) -> dict[str, Any]:
    """The outcome in a few numbers: of each tensor of the final model its norm, its mean, and its first and last entry."""

    def digest(tensor: torch.Tensor) -> list[float]:
        entries = tensor.double().flatten()
        return [float(f"{value:.9g}") for value in (entries.norm(), entries.mean(), entries[0], entries[-1])]

    values: dict[str, Any] = {name: digest(tensor) for name, tensor in outcome.tensors["final"]}
    for role in ("server", "clients", "client models"):
        if tensors := [
            tensor.double().flatten() for _, tensor in sorted(outcome.tensors[role], key=lambda entry: entry[0])
        ]:
            values[role] = [float(f"{torch.cat(tensors).norm():.9g}"), sum(map(len, tensors))]
    for path, figure in outcome.figures.items():
        name = path.rpartition(".")[2]
        if (
            path.startswith("rounds.")
            and path.count(".") <= 3
            and name in ("train_loss", "eval_loss", "bytes_up", "bytes_down")
        ):
            values[path] = float(f"{figure:.9g}") if isinstance(figure, float) else figure
    return values


# Comparing


class Difference(NamedTuple):
    kind: str
    text: str


def digest_of(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + content).hexdigest()


def distance(left: torch.Tensor, right: torch.Tensor) -> str:
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"is {right.dtype} {list(right.shape)} instead of {left.dtype} {list(left.shape)}"
    return f"differs by at most {float((left.double() - right.double()).abs().max()):.1e}"


def tensor_differences(
    role: str, base: list[tuple[str, torch.Tensor]], head: list[tuple[str, torch.Tensor]]
) -> Iterator[Difference]:
    """Between two collections of tensors with names, in no order."""
    counts = [Counter((name, digest_of(tensor)) for name, tensor in side) for side in (base, head)]
    gone, new = list((counts[0] - counts[1]).elements()), list((counts[1] - counts[0]).elements())
    of_base, of_head = ({(name, digest_of(tensor)): tensor for name, tensor in side} for side in (base, head))
    for left in gone:
        if right := next((entry for entry in new if entry[0] == left[0]), None):
            yield Difference("values", f"{role}: {left[0]} {distance(of_base[left], of_head[right])}")
        elif right := next((entry for entry in new if entry[1] == left[1]), None):
            yield Difference("names", f"{role}: {left[0]} is called {right[0]}")
        else:
            yield Difference("values", f"{role}: {left[0]} is missing")
            continue
        new.remove(right)
    for name, _ in new:
        yield Difference("additions", f"{role}: {name} is new")


def figure_differences(base: dict[str, Any], head: dict[str, Any]) -> Iterator[Difference]:
    for path in [*base, *(path for path in head if path not in base)]:
        if path in base and path in head and repr(base[path]) == repr(head[path]):
            continue
        kind = "bytes" if "bytes" in path else "values" if path in base else "additions"
        yield Difference(kind, f"{path}: {base.get(path, 'nothing')} -> {head.get(path, 'nothing')}")


def differences(base: Outcome, head: Outcome, state_alone: bool = False) -> list[Difference]:
    """All that is not the same; with `state_alone` of the models, of the states and of the rounds."""
    for name, outcome in (("the base", base), ("this tree", head)):
        if outcome.error:
            return [Difference("values", f"{name} ended with {outcome.error}")]
    figures = [
        {path: value for path, value in side.figures.items() if path.startswith("rounds.") or not state_alone}
        for side in (base, head)
    ]
    found = list(figure_differences(*figures))
    for role, tensors in base.tensors.items():
        found += tensor_differences(role, tensors, head.tensors[role])
    return found


def told(found: list[Difference], ignored: list[str]) -> tuple[str, bool]:
    """The line about a comparison, and whether it counts as a difference."""
    counted = [difference for difference in found if difference.kind not in ignored]
    others = [difference for difference in found if difference.kind in ignored]
    more = f" (and {len(counted) - 1} more)" if len(counted) > 1 else ""
    line = f"differs: {counted[0].text}{more}" if counted else "same"
    for kind in ignored:
        if texts := [difference.text for difference in others if difference.kind == kind]:
            line += f"; {len(texts)} {kind} apart: {texts[0]}"
    return line, bool(counted)


# Running


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


def run_stage(tree: Tree, model: Path, stage: str, names: list[str], launch: str, deepspeed: Path | None) -> None:
    """Run cases under a tree in a new process, or in those of a launch."""
    if not names:
        return
    for name in names:
        (tree.results / f"{name}.{stage}").mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if launch:
        config = ROOT / "recipes" / "accelerate" / f"{launch}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    command += [str(WORKER), str(tree.source), str(model), str(tree.results), stage, *names]
    environment = environment_of(tree, deepspeed if launch.startswith("zero") else None)
    log = tree.results / f"{launch or 'plain'}.{stage}.log"
    with log.open("w", encoding="utf-8") as output:
        finished = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{tree.source}, {stage}, {launch or 'plain'}:\n" + log.read_text(encoding="utf-8")[-3000:])


def run_all(
    base: Tree | None, head: Tree, base_results: Path, model: Path, cases: dict[str, Any], deepspeed: Path | None
) -> None:
    """
    Every case under both trees at once, and what is resumed a second time in new processes; without a `base` its results are there.
    """
    trees = [tree for tree in (base, head) if tree is not None]
    resumed = [name for name, case in cases.items() if case.resumed]

    def at_once(stage: str, names: list[str], launch: str = "", of: list[Tree] = trees) -> None:
        with ThreadPoolExecutor(len(trees)) as pool:
            list(pool.map(lambda tree: run_stage(tree, model, stage, names, launch, deepspeed), of))

    at_once("whole", [name for name, case in cases.items() if not case.launch])
    for name, case in cases.items():
        if case.launch:
            at_once("whole", [name], case.launch)
    at_once("stopped", resumed)
    for name in resumed:
        for tree in trees:
            shutil.copytree(tree.results / f"{name}.stopped", tree.results / f"{name}.resumed")
        shutil.copytree(base_results / f"{name}.stopped", head.results / f"{name}.old")
    at_once("resumed", resumed)
    at_once("old", resumed, of=[head])


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
    parser.add_argument(
        "--ignore", nargs="+", choices=KINDS, default=[], help="kinds of differences that do not count"
    )
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
        shutil.rmtree(tree.results, ignore_errors=True)
        tree.results.mkdir(parents=True)
    local = args.deepspeed_folder if (Path(args.deepspeed_folder) / "deepspeed").is_dir() else None
    run_all(None if reused else base, head, base.results, folder / "model", cases, local)
    if stamp is not None:
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
