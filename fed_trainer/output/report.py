# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tables and plots of a finished or interrupted run, from the record in its output directory.

    python -m fed_trainer.output.report OUTPUT_DIR

prints the table of rounds and writes `learning_curves.png` into the directory, and `split.png` if the labels of the
clients were counted. The plots need matplotlib; the table does not.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.table import format_table
from .figures import evaluations, held_out_metrics
from .record import IN_LINES, RECORD_NAME, WHOLE, read_record


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["failures", "main", "partial_means", "plot_curves", "plot_split", "round_table", "write_report"]

CURVES_FILE = "learning_curves.png"
SPLIT_FILE = "split.png"

# A heat map with more cells has no room for numbers, one with more rows or columns none for all names.
MAX_ANNOTATED_CELLS = 200
MAX_NAMES = 60
# Longer names are cut in the heat map, where they would leave no room for the cells.
MAX_NAME_LENGTH = 32
# A legend with more entries stands below the axes, where it hides no curve.
MAX_INNER_LEGEND = 4
MAX_LARGE_POINTS = 40
DPI = 150


def round_table(federation: dict[str, Any]) -> str:
    """
    Lays out the rounds of a run as a plain text table.

    Args:
        federation (`dict[str, Any]`):
            The record of the run ([`read_record`]).

    Returns:
        `str`: The table, without a line break at the end. Its columns are the round (0 is the evaluation before
        training), the number of clients that trained, the training loss, the loss and the other metrics on each
        held-out set, the data sent by all clients (up) and to all clients (down) in MB (10^6 bytes), and the seconds
        the round took. A value that was not measured is `-`, one that is not finite `nan` or `inf`.
    """
    measured = evaluations(federation)
    # Without an evaluation the column stays, so that the table of every run has one.
    keys = _metric_keys(measured) or ["eval_loss"]
    header = ["round", "clients", "train loss", *map(_metric_name, keys), "MB up", "MB down", "seconds"]
    rows = []
    if 0 in measured:
        rows.append(["0", "-", "-", *_metric_cells(measured[0], keys), "-", "-", "-"])
    for entry in federation["rounds"]:
        rows.append(
            [
                str(entry["round"]),
                str(len(entry["clients"])),
                _number(entry["train_loss"], 4),
                *_metric_cells(measured.get(entry["round"], {}), keys),
                _number(entry["bytes_up"], 3, 1e-6),
                _number(entry["bytes_down"], 3, 1e-6),
                _number(None if entry["seconds"] is None else sum(entry["seconds"].values()), 1),
            ]
        )
    return format_table(header, rows)


def failures(federation: dict[str, Any]) -> str:
    """A line for every client that was left out of a round, with the reason; empty if there was none."""
    return "\n".join(
        f"left out in round {entry['round']}: {client}, {reason}"
        for entry in federation["rounds"]
        for client, reason in entry.get("refused", {}).items()  # older records have none
    )


def partial_means(federation: dict[str, Any]) -> str:
    """A line for every metric of a round that only some of the clients have a number for; empty if there is none."""
    return "\n".join(
        f"{_metric_name(name)} of round {entry['round']}: over {entry['eval_clients'][name]} of "
        f"{len(entry['client_eval'])} clients, without "
        + ", ".join(f"{client} ({value})" for client, value in clients.items())
        for entry in federation["rounds"]
        for name, clients in (entry.get("eval_without") or {}).items()  # older records have none
    )


def plot_curves(federation: dict[str, Any], path: str | Path) -> None:
    """
    Draws the training loss and the loss on each held-out set over the rounds, and beside it the other held-out
    metrics, if there are any.

    Args:
        federation (`dict[str, Any]`):
            The record of the run ([`read_record`]).
        path (`str` or `Path`):
            The PNG file to write.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If the run has neither a finished round nor an evaluation before training.
    """
    measured = held_out_metrics(federation)
    rounds = federation["rounds"]
    if not rounds and not measured:
        raise ValueError("The run has no finished round and no evaluation, so there is no curve to draw: train first.")

    keys = _metric_keys(measured)
    loss_keys, other_keys = [key for key in keys if _is_loss(key)], [key for key in keys if not _is_loss(key)]
    figure = _new_figure(14.0 if other_keys else 8.0, 4.8)
    panels = figure.subplots(1, 2 if other_keys else 1, squeeze=False)[0]
    _draw_curves(panels, rounds, measured, keys)

    axes = panels[0]
    method = federation["peft_type"] or "no adapter"
    axes.set_title(f"{method}, {federation['aggregation']}, {len(federation['clients'])} clients")
    axes.set_ylabel("loss")
    for panel in panels:
        _finish_axes(panel)
    if max(1 + len(loss_keys), len(other_keys)) <= MAX_INNER_LEGEND:
        for panel in panels:
            panel.legend(frameon=False)
    else:
        figure.set_figheight(4.8 + 0.25 * (len(keys) // 2))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, format="png", dpi=DPI)


def plot_split(federation: dict[str, Any], path: str | Path) -> None:
    """
    Draws how the labels are spread over the clients: a heat map of clients by labels.

    The colour is the share of a label in the rows of the client, so that clients of different size can be compared;
    the scale ends at the largest share. The numbers are counts of rows; they are left out where there are more than
    200 cells. Clients stand in the order of the run, labels in the order of their total, the largest first.

    Args:
        federation (`dict[str, Any]`):
            The record of the run ([`read_record`]).
        path (`str` or `Path`):
            The PNG file to write.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If no client has a composition.
    """
    compositions = _compositions(federation)
    if not compositions:
        raise ValueError(
            "No client of the run has a composition, so there is no split to draw: name the column that holds the "
            "labels when training, so that they are counted."
        )
    totals: Counter[str] = Counter()
    for composition in compositions.values():
        totals.update(composition)
    labels = [label for label, _ in totals.most_common()]
    counts = [[composition.get(label, 0) for label in labels] for composition in compositions.values()]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]

    # Inches: room for the names and the colour bar, and a cell wide enough for a count of four digits.
    figure = _new_figure(min(max(4.0 + 0.55 * len(labels), 6.5), 18.0), min(max(2.2 + 0.36 * len(counts), 3.8), 14.0))
    axes = figure.add_subplot()
    largest_share = max(map(max, shares))
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=largest_share, aspect="auto", interpolation="nearest")
    if len(counts) * len(labels) <= MAX_ANNOTATED_CELLS:
        _write_counts(axes, counts, shares)
    _name_cells(axes, list(compositions), labels)
    axes.set_xlabel(federation["label_column"] or "label", parse_math=False)
    figure.suptitle("examples of each client by label")
    figure.colorbar(image, ax=axes, label="share of the client's examples", fraction=0.04, pad=0.02, aspect=30)
    figure.savefig(path, format="png", dpi=DPI)


def write_report(output_dir: str | Path) -> list[Path]:
    """
    Writes the plots of a run beside its `federation.json`.

    Args:
        output_dir (`str` or `Path`):
            The output directory of the run.

    Returns:
        `list[Path]`: The files written: `learning_curves.png` and, if the labels of the clients were counted,
        `split.png`.

    Raises:
        `FileNotFoundError`: If the directory has no `federation.json`.
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If `federation.json` cannot be read, or has nothing to draw.
    """
    federation = _read_federation(output_dir)
    paths = [Path(output_dir) / CURVES_FILE]
    plot_curves(federation, paths[0])
    if _compositions(federation):
        paths.append(Path(output_dir) / SPLIT_FILE)
        plot_split(federation, paths[1])
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Prints the table of rounds and writes the plots.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The arguments of the command line, those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fed_trainer.output.report",
        description="Print the table of rounds of a federated run and write its plots.",
    )
    parser.add_argument("output_dir", help=f"the output directory of the run, which holds {RECORD_NAME}")
    output_dir = parser.parse_args(arguments).output_dir
    try:
        federation = _read_federation(output_dir)
        print(round_table(federation))
        for lines in (failures(federation), partial_means(federation)):
            if lines:
                print(lines)
        for path in write_report(output_dir):
            print(f"wrote {path}")
    except (FileNotFoundError, ImportError, ValueError) as error:
        # The sentence is all the reader needs; the traceback would only hide it.
        raise SystemExit(str(error)) from error


def _read_federation(output_dir: str | Path) -> dict[str, Any]:
    path = Path(output_dir) / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {RECORD_NAME} in '{output_dir}', so there is nothing to report: pass the output directory "
            "of a run that has started to train."
        )
    try:
        federation = read_record(output_dir)
    except ValueError as error:
        raise ValueError(f"The run cannot be reported: {error} Or resume the run, which writes it again.") from error
    if federation.get("format") != WHOLE:
        raise ValueError(
            f"'{path}' has format {federation.get('format')!r}, but this version reads formats {WHOLE} and "
            f"{IN_LINES}: use the version of peft-scl that wrote it."
        )
    missing = sorted({"aggregation", "clients", "label_column", "peft_type", "rounds", "start"} - federation.keys())
    if missing:
        raise ValueError(
            f"'{path}' lacks {', '.join(missing)}, so the run cannot be reported: restore the file, or resume the "
            "run, which writes it again."
        )
    return federation


def _draw_curves(
    panels: Sequence[Axes],
    rounds: Sequence[dict[str, Any]],
    measured: dict[int, dict[str, float]],
    keys: Sequence[str],
) -> None:
    # Points that touch would hide the dashes. They stay visible, since a loss measured once is a point without a line.
    marker_size = 4 if len(rounds) <= MAX_LARGE_POINTS else 2
    losses = {entry["round"]: entry["train_loss"] for entry in rounds if entry["train_loss"] is not None}
    if losses:
        panels[0].plot(
            list(losses),
            list(losses.values()),
            color="black",
            marker="o",
            markersize=marker_size,
            label="train loss",
        )
    for key in keys:
        points = [(number, metrics[key]) for number, metrics in measured.items() if key in metrics]
        panels[0 if _is_loss(key) else -1].plot(
            *zip(*points, strict=True), marker="s", markersize=marker_size, linestyle="--", label=_metric_name(key)
        )


def _write_counts(axes: Axes, counts: Sequence[Sequence[int]], shares: Sequence[Sequence[float]]) -> None:
    largest_share = max(map(max, shares))
    for row, (row_counts, row_shares) in enumerate(zip(counts, shares, strict=True)):
        for position, (count, share) in enumerate(zip(row_counts, row_shares, strict=True)):
            # Dark text on pale cells, pale text on dark ones; an empty cell is quiet.
            color = "white" if share > 0.6 * largest_share else "black" if count else "silver"
            axes.text(position, row, str(count), ha="center", va="center", color=color, fontsize=8)


def _name_cells(axes: Axes, clients: Sequence[str], labels: Sequence[str]) -> None:
    # Names come from the data: a `$` in them is a dollar, not mathematics.
    row_step, label_step = (-(-number // MAX_NAMES) for number in (len(clients), len(labels)))
    axes.set_yticks(range(0, len(clients), row_step), [_cut(name) for name in clients][::row_step], parse_math=False)
    axes.set_xticks(
        range(0, len(labels), label_step),
        [_cut(label) for label in labels][::label_step],
        parse_math=False,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )


def _metric_keys(measured: dict[int, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for metrics in measured.values() for key in metrics))


def _is_loss(key: str) -> bool:
    return key.endswith("loss")


def _metric_name(key: str) -> str:
    """`eval medquad loss` for `eval_medquad_loss`, `eval macro_f1` for `eval_macro_f1`."""
    name = key.removeprefix("eval_")
    if not _is_loss(key):
        return f"eval {name}"
    name = name.removesuffix("loss").removesuffix("_")
    return f"eval {name} loss" if name else "eval loss"


def _metric_cells(metrics: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [_number(metrics.get(key), 4) for key in keys]


def _finish_axes(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _compositions(federation: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Returns the number of rows by label of the clients for which it is known."""
    return {name: client["composition"] for name, client in federation["clients"].items() if client["composition"]}


def _number(value: float | str | None, digits: int, factor: float = 1.0) -> str:
    if isinstance(value, str):  # "nan" and the like
        return value
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def _new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of the size in inches, drawn by Agg: no display, and none of pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The plots need matplotlib, which is not installed: run `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


if __name__ == "__main__":
    main()
