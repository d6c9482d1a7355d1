"""Report of a comparison: table, rows and figures of generated runs."""

import csv
import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.compare import report, reporting
from lsoftmax_lightning.compare.figures import draw
from lsoftmax_lightning.compare.results import read
from lsoftmax_lightning.errors import InputError

from ..helpers.training import file_size_limit


def write_run(
    folder: Path,
    margin: int,
    seed: int,
    accuracy: float,
    swept: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    pairs: bool = False,
    backbone: str = "digits",
) -> None:
    run = folder / f"{margin} {seed} {swept}"
    run.mkdir(parents=True)
    params = {"margin": margin, **(swept or {}), "seed": seed}
    facts = {"steps": 7, "seconds": 1.5, "threads": 1, "command": "the command", "machine": "M", "torch": "2.6"}
    (run / "run.json").write_text(json.dumps({"params": params, **facts}))
    (run / "results.json").write_text(json.dumps({"test/acc": accuracy, "test/angle": 10.0 / margin, "val/acc": 0.5}))
    config = {
        "checkpoint": {"monitor": "val/acc", "mode": "max"},
        "data": data or {"class_path": "DigitsDataModule", "init_args": {"batch_size": 8}},
        "model": {"class_path": "ClassificationModule", "init_args": {"backbone": backbone}},
    }
    with SummaryWriter(str(run)) as events:
        for step in (1, 2):
            events.add_scalar("train/loss", seed + step, step)
            events.add_scalar("lambda", 10 / step, step)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if pairs:
        torch.save({"cosines": torch.linspace(-1, 1, 10), "same": torch.arange(10) > 4}, run / "test.pt")
    else:
        record = {
            "class_names": ["a", "b"],
            "points": torch.rand(6, 2),
            "rays": torch.eye(2),
            "points_target": torch.arange(6) % 2,
            "counts": torch.tensor([[3, 1], [0, 2]]),
            "angles": torch.rand(6) * 90,
        }
        torch.save(record, run / "test.pt")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, because a figure takes longer than the rest of a report."""
    monkeypatch.setattr("lsoftmax_lightning.compare.reporting.draw", lambda runs: ())


def cells(folder: Path) -> list[list[str]]:
    lines = (folder / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_means_and_paired_differences_equal_a_reference(tmp_path: Path) -> None:
    softmax, margin = [0.90, 0.92, 0.97], [0.91, 0.94, 1.00]
    for seed, (one, four) in enumerate(zip(softmax, margin, strict=True)):
        write_run(tmp_path, 1, seed, one)
        write_run(tmp_path, 4, seed, four)
    write_run(tmp_path, 4, 9, 0.10)  # a seed without a run at m = 1: in the mean, not in the difference
    rows = report(tmp_path)
    assert [(row["margin"], row["seed"]) for row in rows] == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2), (4, 9)]
    header, _, first, second = cells(tmp_path)
    assert header[:4] == ["m", "runs", "test accuracy, %", "difference to m = 1 (95 % interval)"]
    assert first[:4] == ["1", "3", "93.00 ± 3.61", "-"]
    mean, spread = 100 * statistics.fmean([*margin, 0.1]), 100 * statistics.stdev([*margin, 0.1])
    # 1, 2 and 3 points: 2 ± 4.3027 / sqrt(3), the two-sided 95 % quantile of Student's t with 2 degrees of freedom
    assert second[:4] == ["4", "4", f"{mean:.2f} ± {spread:.2f}", "+2.00 (-0.48 to +4.48)"]
    assert second[header.index("angle of a sample to its class")] == "2.5 ± 0.0"
    text = (tmp_path / "table.md").read_text()
    for part in ("maximum of val/acc", "7 steps, batch_size 8", "on M", "torch 2.6", "the command"):
        assert part in text
    assert "paper" not in text.lower()  # other data than the paper

    with (tmp_path / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["test/acc"]) for row in written] == [*softmax, *margin, 0.1]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "curves", "features", "confusion", "angles"}


@pytest.mark.draws
@pytest.mark.parametrize("accuracy", [math.nan, math.inf])
def test_metrics_that_are_not_finite_are_reported(accuracy: float, tmp_path: Path) -> None:
    for margin in (1, 4):
        write_run(tmp_path, margin, 0, 0.5)
        write_run(tmp_path, margin, 1, 0.5 if margin == 1 else accuracy)
    report(tmp_path)
    _, _, _, margin_4 = cells(tmp_path)
    assert margin_4[2:4] == [f"{accuracy} ± nan", f"{accuracy:+}"]
    assert (tmp_path / "accuracy.png").is_file()


@pytest.mark.draws
def test_each_swept_value_has_rows_differences_and_figures(tmp_path: Path) -> None:
    for value, gap in ((10, 0.02), (2, -0.01)):
        for margin in (1, 2):
            write_run(tmp_path, margin, 0, 0.5 + gap * (margin - 1), {"data.size": value})
    report(tmp_path)
    header, _, *lines = cells(tmp_path)
    assert header[:3] == ["m", "data.size", "runs"]
    assert [line[:2] + line[4:5] for line in lines] == [
        ["1", "2", "-"],
        ["2", "2", "-1.00"],
        ["1", "10", "-"],
        ["2", "10", "+2.00"],
    ]
    assert {"angles-data.size=2.png", "angles-data.size=10.png"} <= {path.name for path in tmp_path.glob("*.png")}


@pytest.mark.parametrize(
    ("data", "backbone", "accuracies"),
    [
        ({"class_path": "lsoftmax_lightning.datamodules.MNISTDataModule"}, "mnist", ["99.60*", "99.69*"]),
        ({"class_path": "CIFAR10DataModule", "init_args": {"flip": False}}, "cifar10", ["90.95", "92.42"]),
        ({"class_path": "CIFAR10DataModule", "init_args": {"flip": True}}, "cifar10", ["93.50", "94.08"]),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_the_table_shows_the_accuracies_of_the_paper_with_their_source(
    data: dict[str, Any], backbone: str, accuracies: list[str], tmp_path: Path
) -> None:
    for margin in (1, 4, 5):
        write_run(tmp_path, margin, 0, 0.5, data=data, backbone=backbone)
    report(tmp_path)
    header, _, *lines = cells(tmp_path)
    assert header[-1] == "paper, %"
    assert [line[-1] for line in lines] == [*accuracies, "-"]
    text = (tmp_path / "table.md").read_text()
    assert "Liu et al., ICML 2016" in text
    assert "check the paper" in text


@pytest.mark.usefixtures("no_figures")
def test_other_network_on_the_data_of_the_paper_has_no_paper_column(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5, data={"class_path": "MNISTDataModule"}, backbone="mnist_2d")
    report(tmp_path)
    assert "paper" not in (tmp_path / "table.md").read_text().lower()


@pytest.mark.usefixtures("no_figures")
def test_settings_of_several_calls_are_kept_apart(tmp_path: Path) -> None:
    for margin, gap in ((1, 0), (2, 0.1)):
        for swept in ({}, {"data.a": 1}, {"data.b": 1}, {"data.b": [1, "x"]}):
            write_run(tmp_path, margin, 0, 0.5 + gap * (len(swept) + 1), swept)
    report(tmp_path)
    header, _, *lines = cells(tmp_path)
    assert header[:4] == ["m", "data.a", "data.b", "runs"]
    assert all(len(line) == len(header) for line in lines)
    assert [(*line[:4], line[5]) for line in lines] == [
        ("1", "-", "-", "1", "-"),
        ("2", "-", "-", "1", "+10.00"),
        ("1", "1", "-", "1", "-"),
        ("2", "1", "-", "1", "+20.00"),
        ("1", "-", "1", "1", "-"),
        ("2", "-", "1", "1", "+20.00"),
        ("1", "-", "[1, 'x']", "1", "-"),
        ("2", "-", "[1, 'x']", "1", "+20.00"),
    ]


@pytest.mark.draws
def test_figures_show_the_records_of_the_runs(tmp_path: Path) -> None:
    for margin in range(1, 13):
        for seed in (0, 1):
            write_run(tmp_path, margin, seed, 0.5 + margin / 100 + seed / 10)
    figures = dict(draw(sorted(read(tmp_path), key=lambda run: (run.margin, run.seed))))
    dots_and_means = [line.get_ydata() for line in figures["accuracy"].axes[0].get_lines()]
    assert any(list(means) == pytest.approx([55.0 + margin for margin in range(1, 13)]) for means in dots_and_means)
    losses = next(axes for axes in figures["curves"].axes if axes.get_title() == "train/loss")
    assert [list(line.get_ydata()) for line in losses.get_lines()] == [[1.5, 2.5]] * 12  # more lines than colours
    lambdas = next(axes for axes in figures["curves"].axes if axes.get_title() == "lambda")
    assert len(lambdas.get_lines()) == 11  # lambda has no effect at m = 1
    confusions = [axes for axes in figures["confusion"].axes if axes.get_title()]
    assert len(confusions) == 12
    assert [text.get_text() for text in confusions[0].texts] == ["6", "2", "4"]  # the sum over two seeds
    _, labels = figures["angles"].axes[0].get_legend_handles_labels()
    assert len(labels) == 12


@pytest.mark.draws
def test_figures_of_one_run_have_no_spread_and_name_the_classes_shown(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    (path,) = tmp_path.glob("*/test.pt")
    torch.save(torch.load(path, weights_only=True) | {"num_classes": 250}, path)
    figures = dict(draw(list(read(tmp_path))))
    (bars,) = figures["accuracy"].axes[0].containers
    assert not [segment for line in bars.lines[2] for segment in line.get_segments() if len(segment)]
    assert figures["features"].get_suptitle() == "first seed, 2 of 250 classes"
    assert figures["confusion"].get_suptitle() == "2 of 250 classes"
    assert figures["confusion"].axes[-1].get_ylabel() == "images, 1 run"


@pytest.mark.draws
def test_runs_on_pairs_have_figures_of_pairs(tmp_path: Path) -> None:
    for margin in (1, 2):
        write_run(tmp_path, margin, 0, 0.5, pairs=True)
    report(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "curves", "roc", "pair_angles"}


def test_run_without_a_record_is_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    next(tmp_path.glob("*/test.pt")).unlink()
    assert len(report(tmp_path)) == 1
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "curves"}


def test_run_without_standard_metrics_has_a_row(tmp_path: Path) -> None:
    write_run(tmp_path, 2, 0, 0.5)
    next(tmp_path.glob("*/results.json")).write_text('{"test/mine": 1.0}')
    assert report(tmp_path)[0]["test/mine"] == 1
    assert cells(tmp_path)[2] == ["2", "1", "-", "-"]
    assert "Tested checkpoint: last." in (tmp_path / "table.md").read_text()


def test_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    (tmp_path / "m4-s0").mkdir()
    (tmp_path / "m4-s0" / "config.yaml").write_text("{}")
    assert [run.margin for run in read(tmp_path)] == [1]


def test_folder_without_a_comparison_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run in .* is finished"):
        report(tmp_path / "gone")


@pytest.mark.usefixtures("no_figures")
def test_notes_state_train_size_and_label_noise(tmp_path: Path) -> None:
    data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8, "train_size": 1000.0, "label_noise": 0.2}}
    for margin in (1, 2):
        write_run(tmp_path, margin, 0, 0.9, data=data, backbone="mnist")
    report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "batch_size 8, train_size 1000, label_noise 0.2, on M" in table
    assert "Paper:" not in table  # the paper trains on all images


def test_facts_include_train_size_and_label_noise(tmp_path: Path) -> None:
    for name, settings in (("plain", {"label_noise": 0.0}), ("noisy", {"train_size": 0.5, "label_noise": 0.2})):
        data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8} | settings}
        write_run(tmp_path / name, 2, 0, 0.9, data=data)
        (run,) = read(tmp_path / name)
        stated = {key: run.facts[key] for key in ("train_size", "label_noise") if key in run.facts}
        assert stated == (settings if name == "noisy" else {})


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ("--jobs 2 --folder b --model.width 8.0", None),
        ("--model.width 8 --model.name 'it''s", "model.width (8 / not set)."),  # edited by hand
        ("--model.width=8 --data.train_size 9", None),  # a column of the table
        ("--model.init_args.width 8 --trainer.max_steps 9", "trainer.max_steps (not set / 9)."),
        ("--model.width '8 9' --html", "model.width (8 / 8 9)."),
    ],
)
def test_a_note_names_settings_in_which_compared_runs_differ(arguments: str, note: str | None, tmp_path: Path) -> None:
    data = {"class_path": "DigitsDataModule", "init_args": {"batch_size": 8, "train_size": 9}}
    for margin, command in ((1, "--margins 1 --seeds 0 --model.width 8"), (2, f"--margins 2 --seeds 0 {arguments}")):
        write_run(tmp_path / f"m{margin}", margin, 0, 0.9, data=data if "train_size" in command else None)
        (file,) = tmp_path.glob(f"m{margin}/*/run.json")
        file.write_text(file.read_text().replace("the command", f"python -m lsoftmax_lightning compare {command}"))
    report([tmp_path / "m1", tmp_path / "m2"], folder=tmp_path / "both")
    text = (tmp_path / "both/table.md").read_text()
    before, _, differences = text.partition("The commands of runs that are compared here differ in ")
    assert differences.partition("\n")[0] == note if note else before == text


@pytest.mark.usefixtures("no_figures")
def test_notes_leave_out_absent_facts(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.9)
    report(tmp_path)
    assert "train_size" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("no_figures")
def test_formulas_but_not_numbers_are_quoted_in_results_csv(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.9, {"model.a": "=1+1", "model.b": "-x", "model.c": "-0.1", "model.d": -2})
    next(tmp_path.glob("*/results.json")).write_text('{"test/acc": 0.9, "test/mine": -1.5}')
    report(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    found = [row[name] for name in ("model.a", "model.b", "model.c", "model.d", "test/mine")]
    assert found == ["'=1+1", "'-x", "-0.1", "-2", "-1.5"]


DAMAGES = [
    b"",
    b"\x00" * 40,
    b"caf\xe9",
    b'{"params": {"marg',
    b"[1]",
    b'{"point": [{}]}',
    b'{"params": [{}]}',
    b'{"params": {"seed": 0}}',
    b'{"params": {"seed": 0, "margin": "1"}}',
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("no_figures")
def test_damaged_run_json_is_skipped_with_a_warning(damage: bytes, tmp_path: Path) -> None:
    for margin in (1, 2):
        write_run(tmp_path, margin, 0, 0.5)
    path = tmp_path / "2 0 None" / "run.json"
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match=r"2 0 None/run\.json is missing or damaged; its run is left out"):
        assert len(report(tmp_path)) == 1
    path.parent.joinpath("results.json").write_text("{")
    with pytest.warns(UserWarning, match="is missing or damaged; its run is left out"):
        assert len(report(tmp_path)) == 1


@pytest.mark.parametrize("metrics", ['{"test/acc": null}', '{"test/acc": "0.5"}', '{"test/acc": [0.5]}', "[]", "{"])
@pytest.mark.usefixtures("no_figures")
def test_damaged_results_json_is_skipped_with_a_warning(metrics: str, tmp_path: Path) -> None:
    for margin in (1, 2):
        write_run(tmp_path, margin, 0, 0.5)
    (tmp_path / "2 0 None" / "results.json").write_text(metrics)
    with pytest.warns(UserWarning, match=r"2 0 None/results\.json is missing or damaged; its run is left out"):
        assert len(report(tmp_path)) == 1


@pytest.mark.usefixtures("no_figures")
def test_runs_of_earlier_releases_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5, {"model.x": 3})
    rows = report(tmp_path)
    (path,) = tmp_path.glob("*/run.json")
    path.write_text(path.read_text().replace('"params"', '"point"'))
    assert report(tmp_path) == rows
    assert rows[0]["model.x"] == 3


CUT = b"checkpoint: {}\ndata:\n  class_path: A\nmodel:"
NO_ARGUMENTS = b"checkpoint: {}\ndata: {class_path: A, init_args: null}\nmodel: {class_path: B}\n"


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x00" * 40, b"caf\xe9", b"data: [", b"text", b"data: {}\n", CUT, CUT + b" text", NO_ARGUMENTS],
)
def test_damaged_config_of_a_finished_run_is_an_error(damage: bytes, tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    (tmp_path / "1 0 None" / "config.yaml").write_bytes(damage)
    match = (
        r"config\.yaml is missing or damaged, but its run is finished; restore the file, or remove .*/1 0 None to train"
    )
    with pytest.raises(InputError, match=match):
        report(tmp_path)


def test_a_damaged_record_is_left_out_of_the_figures(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    path = next(tmp_path.glob("*/test.pt"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"test\.pt cannot be read and is left out of the plots"):
        assert len(report(tmp_path)) == 1
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "curves"}


@pytest.mark.draws
def test_full_disk_keeps_the_previous_report(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    report(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    write_run(tmp_path, 2, 0, 0.6)
    for size in (10, len(before[tmp_path / "results.csv"]) + 500):
        with file_size_limit(size), pytest.raises(OSError, match=f"File too large: '{tmp_path}"):
            report(tmp_path)
        after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert after.keys() == before.keys()
        assert all(after[path] == before[path] for path in tmp_path.glob("*.png"))


def test_report_of_results_csv_equals_that_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8}}
    for margin in (1, 4):
        for seed in (0, 1, 2):
            for value in (0, 0.1, "a", [1, "x"], True, None, "=1", "'a'", "a|b", ""):
                accuracy = 0.5 + margin / 30 + seed / 70
                write_run(tmp_path / "runs", margin, seed, accuracy, {"model.x": value}, data, backbone="mnist")
    with monkeypatch.context() as patch:
        patch.setattr("lsoftmax_lightning.compare.reporting.draw", lambda runs: ())  # for each value of model.x
        report(tmp_path / "runs")
    capsys.readouterr()
    rows = report(tmp_path / "runs" / "results.csv")
    table = (tmp_path / "runs" / "table.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert "99.69*" in table
    assert len(rows) == 60
    (tmp_path / "runs" / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "runs" / "results.csv").read_bytes())
    assert report(tmp_path / "runs" / "bom.csv") == rows
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}

    main(["compare", "--report", str(tmp_path / "runs" / "results.csv"), "--folder", str(tmp_path / "new")])
    assert (tmp_path / "new" / "results.csv").read_text() == (tmp_path / "runs" / "results.csv").read_text()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.csv", "table.md", "accuracy.png"}


@pytest.mark.usefixtures("no_figures")
def test_metrics_of_any_name_are_read_from_results_csv(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.5)
    next(tmp_path.glob("*/results.json")).write_text('{"test/acc": 0.5, "accuracy": 0.25}')
    report(tmp_path)
    (run,) = read(tmp_path / "results.csv")
    assert run.metrics == {"test/acc": 0.5, "accuracy": 0.25}
    (tmp_path / "by_hand.csv").write_text("margin,seed,test/acc,machine\n2,0,0.5,M\n")
    report([tmp_path / "by_hand.csv", tmp_path / "results.csv"], tmp_path / "both")
    assert {run.margin: dict(run.metrics) for run in read(tmp_path / "both" / "results.csv")} == {
        1: run.metrics,
        2: {"test/acc": 0.5},
    }


def test_several_comparisons_are_reported_together(tmp_path: Path) -> None:
    sizes = {500: 0.01, 1000: 0.02, 60000: 0.005}
    for size, gap in sizes.items():
        data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8, "train_size": size}}
        for seed in (0, 1):
            write_run(tmp_path / str(size), 1, seed, 0.8 + seed / 100, data=data)
            write_run(tmp_path / str(size), 2, seed, 0.8 + seed / 100 + gap, data=data)
            write_run(tmp_path / "smoothed" / str(size), 1, seed, 0.85, {"model.label_smoothing": 0.1}, data)
    report(tmp_path / "500")
    folders = [tmp_path / "500" / "results.csv", tmp_path / "1000", tmp_path / "60000"]
    report([*folders, *(tmp_path / "smoothed").iterdir()], tmp_path / "all")
    header, _, *lines = cells(tmp_path / "all")
    assert header[:5] == ["m", "model.label_smoothing", "train_size", "runs", "test accuracy, %"]
    assert [line[:3] + line[5:6] for line in lines] == [
        *(
            [m, "-", str(size), gap]
            for size, gaps in zip(sizes, ("+1.00", "+2.00", "+0.50"), strict=True)
            for m, gap in (("1", "-"), ("2", f"{gaps} ({gaps} to {gaps})"))
        ),
        *(["1", "0.1", str(size), "-"] for size in sizes),
    ]

    runs = sorted(
        [
            run
            for folder in [tmp_path / str(size) for size in sizes] + list((tmp_path / "smoothed").iterdir())
            for run in read(folder)
        ],
        key=lambda run: (len(run.settings), run.margin, run.seed),
    )
    data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8, "train_size": 500}}
    write_run(tmp_path / "more", 3, 0, 0.9, data=data)
    assert len(report([tmp_path / "500" / "results.csv", tmp_path / "more"])) == 5  # in one group of settings

    accuracy, difference = dict(draw(runs))["accuracy_by_train_size"].axes
    assert accuracy.get_xscale() == "log"
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["500", "1,000", "60,000"]
    curves = {bars.get_label(): list(bars.lines[0].get_ydata()) for bars in accuracy.containers}
    assert curves["m = 2"] == pytest.approx([81.5, 82.5, 81.0])
    assert curves["m = 1, model.label_smoothing = 0.1"] == pytest.approx([85.0] * 3)
    lines = [bars.lines[0] for bars in accuracy.containers]
    drawn = np.stack([line.get_transform().transform(line.get_xydata()) for line in lines])
    assert np.diff(drawn[:, :, 0], axis=0) == pytest.approx(20 / 3 / 72 * accuracy.figure.dpi)  # none hides another
    assert (np.abs(accuracy.transAxes.inverted().transform(drawn.reshape(-1, 2)) - 0.5) < 0.5).all()
    gaps = {bars.get_label(): list(bars.lines[0].get_ydata()) for bars in difference.containers}
    assert gaps == {
        "m = 2": pytest.approx([1.0, 2.0, 0.5]),
        "m = 1, model.label_smoothing = 0.1": pytest.approx([4.5] * 3),  # compared with the first curve at m = 1
    }


@pytest.mark.usefixtures("no_figures")
def test_averaged_settings_pair_the_runs(tmp_path: Path) -> None:
    for fold, (one, two) in {1: (0.7, 0.71), 2: (0.9, 0.92), 3: (0.8, 0.83)}.items():
        for margin, accuracy in ((1, one), (2, two)):
            write_run(tmp_path, margin, 0, accuracy, {"data.fold": fold})
    for path in tmp_path.glob("*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"averaged": "data.fold"}))
    for source in (tmp_path, tmp_path / "results.csv"):
        report(source, tmp_path)
        header, _, first, second = cells(tmp_path)
        assert header[:3] == ["m", "runs", "test accuracy, %"]
        assert first[1:4] == ["3", "80.00 ± 10.00", "-"]
        assert second[1:4] == ["3", "82.00 ± 10.54", "+2.00 (-0.48 to +4.48)"]
        assert "paired by seed and data.fold" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", ["data.train_size", "data.init_args.train_size"])
@pytest.mark.usefixtures("no_figures")
def test_train_size_can_be_averaged(name: str, tmp_path: Path) -> None:
    for size, gap in ((1000, 0.01), (None, 0.03)):  # None: all images, for which the paper has an accuracy
        data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8, "train_size": size}}
        for margin in (1, 2):
            write_run(tmp_path, margin, 0, 0.9 + gap * (margin - 1), {name: size}, data, backbone="mnist")
    report(tmp_path, average=[name])  # runs trained by --sweep
    swept = (tmp_path / "table.md").read_text()
    for path in tmp_path.glob("*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"averaged": name}))
    for source in (tmp_path, tmp_path / "results.csv"):
        report(source, tmp_path)
        assert (tmp_path / "table.md").read_text() == swept
        header, _, *lines = cells(tmp_path)
        assert header[:3] == ["m", "runs", "test accuracy, %"]
        assert [(*line[:2], line[3].partition(" ")[0], line[-1]) for line in lines] == [
            ("1", "2", "-", "-"),
            ("2", "2", "+2.00", "-"),
        ]


@pytest.mark.usefixtures("no_figures")
def test_averaged_batch_size_and_backbone_may_differ(tmp_path: Path) -> None:
    for size in (8, 16):
        for backbone in ("digits", "mnist"):
            data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": size}}
            write_run(tmp_path, 1, 0, 0.9, {"data.batch_size": size, "model.backbone": backbone}, data, False, backbone)
    report(tmp_path, average=["data.batch_size", "model.backbone"])
    assert cells(tmp_path)[2][:2] == ["1", "4"]


@pytest.mark.usefixtures("no_figures")
def test_equal_averaged_values_pair_the_runs(tmp_path: Path) -> None:
    write_run(tmp_path, 1, 0, 0.8, {"model.x": 0})
    write_run(tmp_path, 2, 0, 0.9, {"model.x": 0.0})
    report(tmp_path, average=["model.x"])
    assert cells(tmp_path)[3][3] == "+10.00"


@pytest.mark.usefixtures("no_figures")
def test_average_applies_to_all_runs(tmp_path: Path) -> None:
    for fold, accuracy in ((2, 0.8), (10, 0.9)):
        write_run(tmp_path, 2, 0, accuracy, {"data.fold": fold})
    rows = report(tmp_path, average=["data.fold"])  # runs trained by --sweep
    assert cells(tmp_path)[2][:3] == ["2", "2", "85.00 ± 7.07"]
    assert [(row["data.fold"], row["averaged"]) for row in rows] == [(2, "data.fold"), (10, "data.fold")]
    write_run(tmp_path / "other", 1, 0, 0.5)
    with pytest.raises(InputError, match=r"--average: needs data\.fold in every run, got one with margin 1 and seed 0"):
        report([tmp_path / "results.csv", tmp_path / "other"])


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "command"), ({"batch_size": 9}, "batch_size"), ({"backbone": "mnist"}, "backbone")],
)
def test_runs_with_differences_outside_the_table_are_rejected(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    for folder, batch_size, backbone in (
        ("a", 8, "digits"),
        ("b", settings.get("batch_size", 8), settings.get("backbone", "digits")),
    ):
        data = {"class_path": "DigitsDataModule", "init_args": {"batch_size": batch_size}}
        write_run(tmp_path / folder, 1, 0, 0.5, data=data, backbone=backbone)
    (facts,) = tmp_path.glob("b/*/run.json")
    facts.write_text(facts.read_text().replace("the command", "another command"))
    with pytest.raises(InputError, match=f"--report: two runs differ in {name}"):
        report([tmp_path / "a", tmp_path / "b"])
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(InputError, match="--report: got the run with margin 1 and seed 0 twice; leave out the copy"):
        report([tmp_path / "a", tmp_path / "copy"])


def test_every_path_of_a_report_needs_finished_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1, 0, 0.5)
    with pytest.raises(InputError, match=r"no run in .*/typo is finished"):
        report([tmp_path / "a", tmp_path / "typo"])


def test_rows_are_sorted_numerically(tmp_path: Path) -> None:
    for seed in (10, 9):
        for value in ("1e-1", "1e-3", "1e-2"):  # strings in YAML
            write_run(tmp_path, 1, seed, 0.5, {"model.lr": value})
    rows = report(tmp_path)
    order = [(value, seed) for value in ("1e-3", "1e-2", "1e-1") for seed in (9, 10)]
    assert [(row["model.lr"], row["seed"]) for row in rows] == order
    accuracy, _ = dict(draw(list(read(tmp_path / "results.csv"))))["accuracy_by_model.lr"].axes
    (curve,) = accuracy.containers
    assert list(curve.lines[0].get_xdata()) == [0.001, 0.01, 0.1]


def test_infinite_values_of_an_axis_are_left_out_with_a_warning(tmp_path: Path) -> None:
    for value in (0.0, 5.0, 50.0, math.inf):
        write_run(tmp_path, 2, 0, 0.5, {"model.value": value})
    with pytest.warns(UserWarning, match="accuracy_by_model.value leaves out runs in which model.value is inf"):
        accuracy, _ = dict(draw(list(read(tmp_path))))["accuracy_by_model.value"].axes
    assert list(accuracy.containers[0].lines[0].get_xdata()) == [0.0, 5.0, 50.0]


def test_swept_train_size_is_an_axis(tmp_path: Path) -> None:
    for size in (500.0, 1000.0, 5000.0, None):
        for margin in (1, 2):
            data = {"class_path": "MNISTDataModule", "init_args": {"batch_size": 8, "train_size": size}}
            write_run(tmp_path, margin, 0, 1.0, {"data.train_size": size}, data)
    with pytest.warns(UserWarning, match="accuracy_by_train_size leaves out runs in which train_size is all"):
        report(tmp_path)
    header, _, *lines = cells(tmp_path)
    assert header[:3] == ["m", "train_size", "runs"]
    assert [line[1] for line in lines] == ["500", "500", "1000", "1000", "5000", "5000", "all", "all"]
    runs = sorted(read(tmp_path), key=lambda run: run.margin)
    with pytest.warns(UserWarning, match="leaves out"):
        accuracy, difference = dict(draw(runs))["accuracy_by_train_size"].axes
    assert [bars.get_label() for bars in accuracy.containers] == ["m = 1", "m = 2"]
    (equal,) = difference.containers  # a difference of 0 is drawn too
    assert list(equal.lines[0].get_ydata()) == [0, 0, 0]


def test_accuracy_by_a_setting_needs_no_softmax_run(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        write_run(tmp_path, 2, 0, 0.5, {"model.checkpoint": value})
    report(tmp_path)
    assert cells(tmp_path)[0][:2] == ["m", "model.checkpoint"]
    accuracy, difference = dict(draw(list(read(tmp_path))))["accuracy_by_model.checkpoint"].axes
    assert (len(accuracy.containers), len(difference.containers)) == (1, 0)


def test_setting_without_accuracies_is_not_drawn(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        write_run(tmp_path, 1, 0, 0.5, {"data.x": value}, pairs=True)
    for path in tmp_path.glob("*/results.json"):
        path.write_text('{"test/auc": 0.9}')
    report(tmp_path)
    assert not list(tmp_path.glob("accuracy_by*"))


@pytest.mark.draws
def test_figures_with_long_or_equal_names_are_kept_apart(tmp_path: Path) -> None:
    for value in ("a b", "a?b", "a*b"):
        write_run(tmp_path, 1, 0, 0.5, {"model.x": value, f"model.{'y' * 150}": 1})
    report(tmp_path)
    assert len(list(tmp_path.glob("curves*.png"))) == 3


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "margin,seed\nx,0\n", "margin,seed\n1.7,0\n", "margin,seed,test/acc\n1,0,x\n", "\x00"]
)
def test_file_that_is_not_results_csv_is_rejected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"--report: (not a valid results\.csv, got .*other\.csv \(|no run in)"):
        report(path)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("width", "num_tables"), [(80, 2), (200, 1)])
def test_table_fits_the_terminal(width: int, num_tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for margin in (1, 2, 3, 4, 5):
        write_run(tmp_path, margin, 0, 0.9)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(reporting, "get_console", lambda: console)
    report(tmp_path)
    printed = file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert len(re.findall("test accuracy, %", printed)) == num_tables
    assert "There is one seed, 0." in " ".join(printed.split())
    assert (tmp_path / "table.md").read_text().startswith("| m | runs |")
