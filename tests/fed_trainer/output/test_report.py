# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import sys

import numpy as np
import pytest
from PIL import Image

from fed_trainer.output.report import main, plot_curves, plot_split, round_table, write_report


CLIENTS = {
    "1_CancerGov_QA": {"treatment": 90, "symptoms": 8},
    "4_MPlus_Health_Topics_QA": {"information": 120},
    "9_CDC_QA": {"information": 5, "treatment": 5, "outlook": 1},
}


def make_round(number, train_loss, evaluation):
    return {
        "round": number,
        "clients": {
            name: {"num_examples": 10, "train_loss": train_loss, "num_steps": 5, "seconds": 1.0}
            for name in list(CLIENTS)[:2]
        },
        "train_loss": train_loss,
        "learning_rate": 1e-4,
        "bytes_up": 2_500_000,
        "bytes_down": 12_345_678,
        "seconds": {"local": 2.0, "aggregate": 0.25, "evaluate": 0.5, "checkpoint": 0.55},
        "eval": evaluation,
    }


@pytest.fixture
def federation():
    return {
        "format": 1,
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "peft_type": "SCL",
        "aggregation": "fedavg",
        "federation": {"server_optimizer": "sgd", "local_objective": None},
        "seed": 0,
        "num_rounds": 3,
        "partition": "natural",
        "label_column": "question_type",
        "clients": {
            name: {"num_examples": sum(counts.values()), "composition": counts} for name, counts in CLIENTS.items()
        },
        "start": {"eval": {"eval_loss": 3.0, "eval_runtime": 1.5}},
        "rounds": [
            make_round(1, 2.5, {"eval_loss": 2.25, "eval_runtime": 1.5}),
            make_round(2, 1.98769, None),
            make_round(3, 1.5, {"eval_loss": 1.75, "eval_runtime": 1.5}),
        ],
    }


def write(federation, folder):
    (folder / "federation.json").write_text(json.dumps(federation), encoding="utf-8")


def pixels(path):
    """Returns the picture as an array of shape `(height, width, 3)`, after a check that it is a PNG and not blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        array = np.asarray(image.convert("RGB"))
    assert array.shape[0] >= 300
    assert array.shape[1] >= 500
    assert len(np.unique(array.reshape(-1, 3), axis=0)) > 50
    # Nothing is clipped: the outermost pixels are background.
    assert all(np.all(edge == 255) for edge in (array[0], array[-1], array[:, 0], array[:, -1]))
    return array


def texts(figure):
    """Returns all words in a figure."""
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.fixture
def figures(monkeypatch):
    """Keeps the figures that are saved, so that a test can read what they show."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw)))
    return saved


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Makes every import of matplotlib fail, as where it is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class TestRoundTable:
    def test_content(self, federation):
        assert round_table(federation).splitlines() == [
            "round  clients  train loss  eval loss  MB up  MB down  seconds",
            "-----  -------  ----------  ---------  -----  -------  -------",
            "    0        -           -     3.0000      -        -        -",
            "    1        2      2.5000     2.2500  2.500   12.346      3.3",
            "    2        2      1.9877          -  2.500   12.346      3.3",
            "    3        2      1.5000     1.7500  2.500   12.346      3.3",
        ]

    def test_without_evaluation(self, federation):
        federation["start"]["eval"] = None
        federation["rounds"] = [make_round(1, 2.5, None)]
        assert round_table(federation).splitlines() == [
            "round  clients  train loss  eval loss  MB up  MB down  seconds",
            "-----  -------  ----------  ---------  -----  -------  -------",
            "    1        2      2.5000          -  2.500   12.346      3.3",
        ]

    def test_several_held_out_sets(self, federation):
        federation["start"]["eval"] = {"eval_medquad_loss": 3.0, "eval_medquad_runtime": 1.0}
        federation["rounds"] = [make_round(1, 2.5, {"eval_medquad_loss": 2.0, "eval_code_loss": 4.0})]
        header, _, start, first = round_table(federation).splitlines()
        assert "eval medquad loss  eval code loss  MB up" in header
        assert start.split() == ["0", "-", "-", "3.0000", "-", "-", "-", "-"]
        assert first.split()[3:5] == ["2.0000", "4.0000"]

    def test_a_run_without_rounds(self, federation):
        federation["rounds"] = []
        assert round_table(federation).splitlines()[-1].split() == ["0", "-", "-", "3.0000", "-", "-", "-"]

    def test_leaves_the_federation_as_it_was(self, federation):
        before = copy.deepcopy(federation)
        round_table(federation)
        assert federation == before


class TestPlotCurves:
    def test_curves(self, federation, figures, tmp_path):
        plot_curves(federation, tmp_path / "curves.png")
        pixels(tmp_path / "curves.png")
        [axes] = figures[0].axes
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert curves == {
            "train loss": [[1, 2.5], [2, 1.98769], [3, 1.5]],
            "eval loss": [[0, 3.0], [1, 2.25], [3, 1.75]],
        }
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert {"SCL, fedavg, 3 clients", "round", "loss", "train loss", "eval loss"} <= set(texts(figures[0]))

    def test_every_held_out_set_has_a_curve(self, federation, figures, tmp_path):
        federation["start"]["eval"] = {f"eval_{name}_loss": 3.0 for name in CLIENTS} | {"eval_loss": 2.0}
        federation["rounds"] = [make_round(1, 2.5, {f"eval_{name}_loss": 2.0 for name in CLIENTS})]
        plot_curves(federation, tmp_path / "curves.png")
        pixels(tmp_path / "curves.png")
        names = [f"eval {name} loss" for name in CLIENTS]
        assert {line.get_label() for line in figures[0].axes[0].lines} == {"train loss", "eval loss", *names}
        assert set(names) <= set(texts(figures[0]))

    def test_other_metrics_have_a_panel_of_their_own(self, federation, figures, tmp_path):
        federation["peft_type"] = None
        federation["start"]["eval"] |= {"eval_macro_f1": 0.0}
        federation["rounds"][2]["eval"] |= {"eval_accuracy": 0.5, "eval_macro_f1": 0.25, "epoch": 3}
        plot_curves(federation, tmp_path / "curves.png")
        pixels(tmp_path / "curves.png")
        left, right = figures[0].axes
        assert [line.get_label() for line in left.lines] == ["train loss", "eval loss"]
        curves = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
        assert curves == {"eval accuracy": [[3, 0.5]], "eval macro_f1": [[0, 0.0], [3, 0.25]]}
        assert "no adapter, fedavg, 3 clients" in texts(figures[0])
        header, *rows = round_table(federation).splitlines()
        assert "eval loss  eval macro_f1  eval accuracy  MB up" in header
        assert rows[-1].split()[3:6] == ["1.7500", "0.2500", "0.5000"]

    def test_one_round_has_whole_numbers_on_its_axis(self, federation, figures, tmp_path):
        federation["start"]["eval"] = None
        federation["rounds"] = federation["rounds"][:1]
        plot_curves(federation, tmp_path / "curves.png")
        pixels(tmp_path / "curves.png")
        ticks = figures[0].axes[0].get_xticks().tolist()
        assert 1 in ticks
        assert all(tick == int(tick) for tick in ticks)

    def test_nothing_to_draw(self, federation, tmp_path):
        federation["start"]["eval"] = None
        federation["rounds"] = []
        with pytest.raises(ValueError, match="no finished round and no evaluation, so there is no curve"):
            plot_curves(federation, tmp_path / "curves.png")
        assert not (tmp_path / "curves.png").exists()

    def test_pyplot_is_not_used(self, federation, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        plot_curves(federation, tmp_path / "curves.png")
        plot_split(federation, tmp_path / "split.png")


class TestPlotSplit:
    def test_heat_map(self, federation, figures, tmp_path):
        plot_split(federation, tmp_path / "split.png")
        pixels(tmp_path / "split.png")
        axes = figures[0].axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == list(CLIENTS)
        # The largest label first: 125, 95, 8 and 1 rows.
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "information",
            "treatment",
            "symptoms",
            "outlook",
        ]
        assert axes.get_xlabel() == "question_type"
        np.testing.assert_allclose(
            axes.images[0].get_array(), [[0, 90 / 98, 8 / 98, 0], [1, 0, 0, 0], [5 / 11, 5 / 11, 0, 1 / 11]]
        )
        assert [text.get_text() for text in axes.texts] == [
            "0",
            "90",
            "8",
            "0",
            "120",
            "0",
            "0",
            "0",
            "5",
            "5",
            "0",
            "1",
        ]

    def test_many_cells_are_not_annotated(self, federation, figures, tmp_path):
        labels = {f"label_{index}": index for index in range(1, 68)}
        for client in federation["clients"].values():
            client["composition"] = labels
        plot_split(federation, tmp_path / "split.png")
        pixels(tmp_path / "split.png")
        axes = figures[0].axes[0]
        assert not axes.texts
        assert len(axes.get_xticklabels()) == 34  # Every second name of 67.
        assert axes.get_xticklabels()[1].get_text() == "label_65"
        assert axes.get_xticks().tolist()[:2] == [0, 2]

    def test_names_are_taken_as_they_are_and_cut_if_long(self, federation, figures, tmp_path):
        federation["clients"] = {"x" * 50: {"num_examples": 3, "composition": {r"$\frac$10": 2, "_": 1}}}
        plot_split(federation, tmp_path / "split.png")
        pixels(tmp_path / "split.png")
        axes = figures[0].axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == [r"$\frac$10", "_"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["x" * 31 + "…"]

    def test_clients_without_a_composition_are_left_out(self, federation, figures, tmp_path):
        federation["clients"]["9_CDC_QA"]["composition"] = None
        plot_split(federation, tmp_path / "split.png")
        assert len(figures[0].axes[0].get_yticklabels()) == 2

    def test_no_composition(self, federation, tmp_path):
        for client in federation["clients"].values():
            client["composition"] = None
        with pytest.raises(ValueError, match=r"No client of the run has a composition, .* name the column"):
            plot_split(federation, tmp_path / "split.png")


class TestWriteReport:
    def test_writes_both_plots(self, federation, tmp_path):
        write(federation, tmp_path)
        assert write_report(tmp_path) == [tmp_path / "learning_curves.png", tmp_path / "split.png"]
        assert not np.array_equal(pixels(tmp_path / "learning_curves.png"), pixels(tmp_path / "split.png"))

    def test_no_split_without_composition(self, federation, tmp_path):
        for client in federation["clients"].values():
            client["composition"] = None
        write(federation, tmp_path)
        assert write_report(str(tmp_path)) == [tmp_path / "learning_curves.png"]
        assert not (tmp_path / "split.png").exists()

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no federation\.json in .*pass the output directory"):
            write_report(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"format": 1', "cannot be reported: The file .* is not JSON .* Or resume the run"),
            ("[]", r"it holds \[\], not a dictionary"),
            ("{}", "has format None, but this version reads formats 1 and 2"),
            ('{"format": 2}', "cannot be reported: The file .*federation.jsonl' cannot be used: it cannot be read"),
            ('{"format": 3}', "has format 3, but this version reads formats 1 and 2: use the version"),
            (
                '{"format": 1, "rounds": [], "clients": {}, "peft_type": "SCL"}',
                "lacks aggregation, label_column, start",
            ),
        ],
    )
    def test_invalid_file(self, content, message, tmp_path):
        (tmp_path / "federation.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path)

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "federation.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="it is not JSON"):
            write_report(tmp_path)

    def test_missing_matplotlib(self, federation, no_matplotlib, tmp_path):
        write(federation, tmp_path)
        with pytest.raises(ImportError, match=r"matplotlib, .* run `pip install matplotlib`"):
            write_report(tmp_path)
        assert len(round_table(federation).splitlines()) == 6


class TestMain:
    def test_prints_the_table_and_writes_the_plots(self, federation, capsys, tmp_path):
        write(federation, tmp_path)
        main([str(tmp_path)])
        assert capsys.readouterr().out.splitlines() == [
            *round_table(federation).splitlines(),
            f"wrote {tmp_path / 'learning_curves.png'}",
            f"wrote {tmp_path / 'split.png'}",
        ]
        assert (tmp_path / "learning_curves.png").is_file()

    def test_prints_the_table_even_without_matplotlib(self, federation, capsys, no_matplotlib, tmp_path):
        write(federation, tmp_path)
        with pytest.raises(SystemExit, match="The plots need matplotlib"):
            main([str(tmp_path)])
        assert capsys.readouterr().out.strip() == round_table(federation).strip()

    def test_a_refusal_is_one_sentence_and_a_failing_exit_code(self, tmp_path):
        with pytest.raises(SystemExit, match=r"There is no federation\.json"):
            main([str(tmp_path)])
