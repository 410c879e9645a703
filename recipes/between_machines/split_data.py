# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Write the data of three clients of the offline demo into files, as if each were at a site of its own:
`python recipes/between_machines/split_data.py sites`.
"""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "offline"))

import datasets  # noqa: E402
from client_data import build_clients  # noqa: E402


SITES = ("formats", "mail", "numbers")
HELD_OUT = 20  # rows of each


def main(folder: Path) -> None:
    datasets.disable_progress_bars()
    clients, _ = build_clients()
    folder.mkdir(parents=True, exist_ok=True)
    for site in SITES:
        rows = clients[site].select_columns(["prompt", "completion"])
        parts = {
            f"{site}.jsonl": rows.select(range(HELD_OUT, len(rows))),
            f"{site}-held-out.jsonl": rows.select(range(HELD_OUT)),
        }
        for name, part in parts.items():
            part.to_json(folder / name)
            print(f"{folder / name}: {len(part)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
