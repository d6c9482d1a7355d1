"""Compare the default schedule of lambda with hand-set ones, over margins, seeds and datasets.

Each run trains a small network with the modules, datamodules and Trainer of this package, and tests the weights of the
last step. Every schedule and margin uses the same settings; the learning rate and the weight decay are those that
``--tune`` found best for m = 1 on validation images. Finished runs are stored in the file ``--results`` and not
repeated, so an interrupted command can be run again, and several processes can train different datasets.

Usage: python benchmarks/annealing.py --data ROOT [--tune] digits mnist noisy fashion
       python benchmarks/annealing.py [--tune] --table
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import machine, table
from filelock import FileLock
from lightning import Trainer, seed_everything
from torch.optim import SGD

from lsoftmax_lightning import ClassificationModule
from lsoftmax_lightning.compare.intervals import mean_and_interval
from lsoftmax_lightning.datamodules import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule
from lsoftmax_lightning.lr_schedulers import FractionalMultiStepLR
from lsoftmax_lightning.schedules import AccuracyFeedback, LambdaSchedule, RunFraction

SEEDS = range(5)
TUNING_SEEDS = (10, 11)
MARGINS = (2, 3, 4, 6)
HAND_SET = {f"to {lambda_min}": RunFraction(lambda_min=lambda_min) for lambda_min in (0, 1, 5, 20)}
SCHEDULES: dict[str, LambdaSchedule] = {
    "feedback": AccuracyFeedback(),
    "gain 50": AccuracyFeedback(gain=50),
    **HAND_SET,
}
LEARNING_RATES = (0.02, 0.05, 0.1, 0.2)
WEIGHT_DECAYS = (5e-4, 5e-3, 1e-2)
BEYOND = {  # further (lr, weight decay) next to the best one at the edge of that grid
    "digits": [(0.05, 0.02)],
    "mnist": [(0.2, 0.02), (0.4, 0.01)],
    "noisy": [(0.02, 0.02), (0.01, 0.01), (0.01, 0.02)],
    "fashion": [(0.2, 0.02), (0.4, 0.01)],
}
SMALL = {"stem": 16, "blocks": [(16, 1), (32, 1), (64, 1)], "num_features": 64}
FIELDS = ("data", "margin", "schedule", "seed", "lr", "weight_decay", "val_acc", "test_acc", "train_acc", "machine")


class DataSet(NamedTuple):
    """A dataset and its training settings."""

    title: str
    datamodule: type[Any]
    settings: dict[str, Any]
    lr: float
    weight_decay: float = 0.01
    backbone: str = "mnist"
    steps: int = 600
    precision: str = "bf16-mixed"


DATA = {
    "digits": DataSet("digits, 1,293 images", DigitsDataModule, {}, lr=0.05, backbone="digits", precision="32-true"),
    "mnist": DataSet("MNIST, 1,000 images", MNISTDataModule, {"train_size": 1000}, lr=0.2),
    "noisy": DataSet(
        "MNIST, 1,000 images, 20 % noisy labels", MNISTDataModule, {"train_size": 1000, "label_noise": 0.2}, lr=0.02
    ),
    "fashion": DataSet("Fashion-MNIST, 2,000 images", FashionMNISTDataModule, {"train_size": 2000}, lr=0.2, steps=800),
}


def train(
    name: str, root: str, margin: int, schedule: LambdaSchedule, seed: int, lr: float, weight_decay: float
) -> dict[str, float]:
    """Train and test one network."""
    data = DATA[name]
    seed_everything(seed, verbose=False)
    settings = data.settings if name == "digits" else {**data.settings, "root": root}
    datamodule = data.datamodule(batch_size=64, **settings)
    model = ClassificationModule(
        num_classes=datamodule.num_classes,
        image_shape=datamodule.image_shape,
        margin=margin,
        lambda_schedule=schedule,
        optimizer=lambda params: SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay),
        lr_scheduler=lambda optimizer: FractionalMultiStepLR(optimizer, [2 / 3, 5 / 6]),
        channels_last=data.precision != "32-true",
        backbone=data.backbone,
        backbone_args=SMALL if data.backbone == "mnist" else None,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=data.steps,
        precision=data.precision,  # type: ignore[arg-type]
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule)
    train_acc = float(trainer.callback_metrics["train/acc"])
    trainer.limit_val_batches = 1.0
    (val,) = trainer.validate(model, datamodule, verbose=False)
    (test,) = trainer.test(model, datamodule, verbose=False)
    return {"val_acc": val["val/acc"], "test_acc": test["test/acc"], "train_acc": train_acc}


def jobs(names: list[str], seeds: Sequence[int], tune: bool) -> Iterator[tuple[str, int, str, int, float, float]]:
    """Yield dataset, margin, schedule, seed, learning rate and weight decay of each run, the default schedule first."""
    if tune:
        for seed, name in itertools.product(TUNING_SEEDS, names):
            for lr, weight_decay in [*itertools.product(LEARNING_RATES, WEIGHT_DECAYS), *BEYOND[name]]:
                yield name, 1, "none", seed, lr, weight_decay
        return
    default = [(1, "none"), *((margin, "feedback") for margin in MARGINS)]
    others = [*itertools.product(MARGINS, ["gain 50", *HAND_SET])]
    for runs in (default, others):
        for seed, name, (margin, schedule) in itertools.product(seeds, names, runs):
            yield name, margin, schedule, seed, DATA[name].lr, DATA[name].weight_decay


def read(path: Path) -> list[dict[str, str]]:
    """Return the finished runs."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a run to the results."""
    with FileLock(f"{path}.lock"):
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def mean_and_deviation(values: list[float]) -> str:
    """Format mean and standard deviation."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def tables(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield the results as Markdown; hand-set schedules are compared on the seeds that all of them have."""
    for name, data in DATA.items():
        runs = {
            (int(row["margin"]), row["schedule"], int(row["seed"])): 100 * float(row["test_acc"])
            for row in rows
            if row["data"] == name
        }
        default_runs = [(1, "none"), *itertools.product(MARGINS, ("feedback", "gain 50"))]
        seeds = [seed for seed in SEEDS if all((*key, seed) in runs for key in default_runs)]
        hand_set = list(itertools.product(MARGINS, HAND_SET))
        compared = [seed for seed in seeds if all((*key, seed) in runs for key in hand_set)]
        if len(seeds) < 2:
            continue
        base = [runs[1, "none", seed] for seed in seeds]
        lines = [["1", mean_and_deviation(base), "-", "-", *["-"] * (len(HAND_SET) + 2)]]
        for margin in MARGINS:
            default = [runs[margin, "feedback", seed] for seed in seeds]
            differences = [accuracy - softmax for accuracy, softmax in zip(default, base, strict=True)]
            gain_50 = statistics.fmean(runs[margin, "gain 50", seed] for seed in seeds)
            means, gap, best = {}, "-", ""
            if len(compared) > 1:
                means = {key: statistics.fmean(runs[margin, key, seed] for seed in compared) for key in HAND_SET}
                best = max(means, key=lambda key: means[key])
                gaps = [runs[margin, "feedback", seed] - runs[margin, best, seed] for seed in compared]
                gap = f"{statistics.fmean(gaps):+.2f} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.2f}"
            collapses = sum(difference < -2 for difference in differences)
            lines.append(
                [
                    str(margin),
                    mean_and_deviation(default),
                    mean_and_interval(differences),
                    str(collapses),
                    f"{gain_50:.2f}",
                    *(f"**{means[key]:.2f}**" if key == best else f"{means[key]:.2f}" for key in means),
                    *["-"] * (len(HAND_SET) - len(means)),
                    gap,
                ]
            )
        title = f"{data.title}: {len(seeds)} seeds"
        if len(compared) < len(seeds):
            title += f", {len(compared) or 'none'} of them with hand-set values"
        header = [
            "m",
            "default, %",
            "difference to m = 1 (95 % interval)",
            "collapses",
            "gain 50",
            *HAND_SET,
            "default - best",
        ]
        yield f"{title}; lr {data.lr:g}, weight decay {data.weight_decay:g}\n\n{table(header, lines)}"


def overall(rows: list[dict[str, str]]) -> str:
    """Format each schedule over all datasets, margins and seeds as Markdown, with the standard error over seeds."""
    runs = {
        (row["data"], int(row["margin"]), row["schedule"], int(row["seed"])): 100 * float(row["test_acc"])
        for row in rows
    }
    cells = list(itertools.product(DATA, MARGINS))
    lines = []
    for schedule in SCHEDULES:
        gains = [runs[name, m, schedule, seed] - runs[name, 1, "none", seed] for name, m in cells for seed in SEEDS]
        behind = [
            statistics.fmean(runs[name, m, "feedback", seed] - runs[name, m, schedule, seed] for name, m in cells)
            for seed in SEEDS
        ]
        error = statistics.stdev(behind) / math.sqrt(len(behind))
        default = schedule == "feedback"
        lines.append(
            [
                "default" if default else schedule,
                f"{sum(gain < -2 for gain in gains)} of {len(gains)}",
                f"{statistics.fmean(gains):+.2f}",
                "-" if default else f"{statistics.fmean(behind):+.2f} ± {error:.2f}",
            ]
        )
    return table(["schedule", "collapses", "mean gain over m = 1", "default - this"], lines)


def tuning(rows: list[dict[str, str]]) -> str:
    """Format the validation accuracy at m = 1 by learning rate and weight decay as Markdown, the best in bold."""
    lines = []
    weight_decays = sorted({float(row["weight_decay"]) for row in rows})
    for name, data in DATA.items():
        accuracies: dict[tuple[float, float], list[float]] = defaultdict(list)
        for row in rows:
            if row["data"] == name:
                accuracies[float(row["lr"]), float(row["weight_decay"])].append(100 * float(row["val_acc"]))
        means = {params: statistics.fmean(values) for params, values in accuracies.items()}
        best = max(means.values())
        for lr in sorted({lr for lr, _ in means}):
            cells = []
            for weight_decay in weight_decays:
                mean = means.get((lr, weight_decay))
                text = "-" if mean is None else f"{mean:.2f}"
                cells.append(f"**{text}**" if mean == best else text)
            lines.append([data.title, f"{lr:g}", *cells])
    return table(["data", "lr", *(f"weight decay {value:g}" for value in weight_decays)], lines)


def main() -> None:
    """Train the unfinished runs, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="DATA", help=", ".join(DATA))
    parser.add_argument("--data", default="data", help="folder of MNIST and FashionMNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2 3 4")
    parser.add_argument("--tune", action="store_true", help="try learning rates and weight decays at m = 1")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for job in jobs(args.names, args.seeds, args.tune):
        name, margin, schedule, seed, lr, weight_decay = job
        row = dict(zip(FIELDS, map(str, job), strict=False))
        if any(row.items() <= finished.items() for finished in read(args.results)):
            continue
        metrics = train(name, args.data, margin, SCHEDULES.get(schedule, SCHEDULES["feedback"]), seed, lr, weight_decay)
        append(args.results, row | {key: round(value, 5) for key, value in metrics.items()} | {"machine": machine()})
        print(*job, *(f"{value:.4f}" for value in metrics.values()), flush=True)
    if args.table:
        rows = read(args.results)
        print(tuning(rows) if args.tune else "\n".join([*tables(rows), overall(rows)]))


if __name__ == "__main__":
    main()
