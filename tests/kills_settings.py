"""Settings of `kills.py`: commands, moments and signals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import kills_judge as judge
from kills_parts import write_images
from kills_process import Kill, Moment

Times = Mapping[str, float]  # seconds after the start of the first occurrences of hooks, and "end"
Draw = Callable[[random.Random, Times], Moment]

IMAGES = 360
"""Images of a prediction: the test images of the digits."""

_QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--dashboard.every_n_epochs=0",
)
_DIGITS = ("--config=digits.yaml", *_QUIET, "--model.backbone={class_path: kills_parts.Tiny}")
# steps so large that the last epoch is rarely the best
_FIT = ("fit", *_DIGITS, "--trainer.max_epochs=4", "--model.optimizer.lr=0.5", "--model.lr_scheduler=null")
_FOLDER = (
    "fit",
    "--config=folder.yaml",
    *_QUIET,
    "--model.backbone={class_path: kills_parts.Tiny, init_args: {pixels: 192}}",
    "--data.root=images",
    "--data.image_size=8",
    "--data.batch_size=8",
    "--data.crop_padding=1",
    "--data.val_size=0.25",
    "--data.memory_gib=0",
    "--data.num_workers=2",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=5",
)
_TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
_LAST = "--ckpt_path=last"
_FIT_RESULT = ("work/runs/*/*/results.json",)


@dataclass(frozen=True)
class Scenario:
    """Commands of which one is killed and run again, and the expected results.

    Args:
        name: Unique name.
        commands: Arguments of the commands, which run one after the other.
        moments: Moments of the kill, each with targets of the signal.
        differences: Compares two working directories.
        result: Files beside or in the working directory that the killed command writes last.
        killed: Index of the command that is killed.
        expected: Number of commands of the reference after which the results must be the same.
        again: Arguments that are added when the command runs again.
        start: Scenario whose results are in the working directory at the start.
        prepare: Fills the working directory at the start.
        ranks: Number of processes of each command.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    moments: tuple[tuple[Draw, tuple[str, ...]], ...]
    differences: Callable[[Path, Path], list[str]]
    result: tuple[str, ...] = _FIT_RESULT
    killed: int = 0
    expected: int | None = None
    again: tuple[str, ...] = (_LAST,)
    start: str = ""
    prepare: Callable[[Path], None] | None = None
    ranks: int = 1

    def kills(self) -> list[Callable[[random.Random, Times], Kill]]:
        """Return all combinations of moment, target and signal."""

        def combine(draw_moment: Draw, target: str, number: int) -> Callable[[random.Random, Times], Kill]:
            return lambda draw, times: Kill(number, target, draw_moment(draw, times))

        return [
            combine(draw_moment, target, number)
            for draw_moment, targets in self.moments
            for target, number in itertools.product(targets, (SIGKILL, SIGTERM, SIGINT))
        ]


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Args:
        number: 1 to 10.
        title: First cell of the row.
        weight: Relative number of kills.
        scenarios: Names of scenarios, repeated by their weight.
    """

    number: int
    title: str
    weight: int
    scenarios: tuple[str, ...]


def _at_time(first: str = "", last: str = "end") -> Draw:
    """Return a moment between the first occurrences of two hooks in the reference."""
    return lambda draw, times: Moment("time", seconds=draw.uniform(times[first] if first else 0.0, times[last]))


def _delay(draw: random.Random, most: float) -> float:
    """Return a random delay of up to ``most`` seconds in half of the cases, otherwise 0."""
    return draw.uniform(0, most) if draw.random() < 0.5 else 0.0


def _at_hook(name: str, stage: str = "", most: int = 1, delay: float = 0.0, worker: bool = False) -> Draw:
    return lambda draw, times: Moment(
        "hook",
        name,
        seconds=_delay(draw, delay),
        count=draw.randint(1, most),
        stage=stage,
        worker=draw.randrange(2) if worker else -1,
    )


def _at_file(operation: str, pattern: str, most: int = 1, delay: float = 0.0) -> Draw:
    return lambda draw, times: Moment(
        "file", operation, seconds=_delay(draw, delay), count=draw.randint(1, most), stage=pattern
    )


def _at_call(name: str, most: int = 1, after: bool = False) -> Draw:
    return lambda draw, times: Moment("call", name, count=draw.randint(1, most), after=after)


_ONE = ("process",)
_GROUP = ("group",)
_BOTH = ("process", "group")
_RANKS = ("process", "rank 1", "group")

_START = (
    (_at_time("", "on_train_batch_start train"), _BOTH),
    (_at_time("", "on_train_batch_start train"), _BOTH),
    (_at_hook("setup"), _ONE),
    (_at_hook("on_fit_start"), _ONE),
    (_at_hook("on_sanity_check_start"), _ONE),
    (_at_hook("on_validation_batch_start", "sanity", most=2, delay=0.005), _ONE),
    (_at_hook("on_validation_end", "sanity"), _ONE),
    (_at_hook("on_sanity_check_end", delay=0.005), _ONE),
    (_at_hook("on_train_start"), _ONE),
    (_at_hook("on_train_epoch_start"), _ONE),
    (_at_file("write", r"config\.yaml", delay=0.08), _ONE),
    (_at_file("write", "events", delay=0.01), _ONE),
)
_CHECKPOINTS = (
    (_at_file("rename", r"last\.ckpt", most=5, delay=0.003), _ONE),
    (_at_file("rename", r"(best|epoch)[^/]*\.ckpt", most=3, delay=0.003), _ONE),
    (_at_file("write", r"last\.ckpt", most=5, delay=0.003), _ONE),
    (_at_file("write", r"(best|epoch)[^/]*\.ckpt", most=3, delay=0.003), _ONE),
    (_at_hook("on_save_checkpoint", most=8), _ONE),
    (_at_call("torch.serialization._save", most=8, after=True), _ONE),
)
_REMOVALS = (
    (_at_file("remove", r"\.ckpt$", most=2, delay=0.002), _ONE),
    (_at_file("remove", r"\.ckpt$", most=2), _ONE),
)
_PREDICT = (
    (_at_time(), _BOTH),
    (_at_hook("on_predict_batch_start", most=6, delay=0.003), _ONE),
    (_at_hook("on_predict_batch_end", most=6, delay=0.003), _ONE),
    (_at_hook("on_predict_start", delay=0.002), _ONE),
    (_at_hook("on_predict_epoch_end", delay=0.01), _ONE),
    (_at_file("rename", "predictions", delay=0.002), _ONE),
    (_at_file("remove", "predictions", delay=0.001), _ONE),
    (_at_file("write", "predictions", most=2), _ONE),
)


def _validations(most: int) -> tuple[tuple[Draw, tuple[str, ...]], ...]:
    return (
        (_at_hook("on_validation_start", "validate", most), _ONE),
        (_at_hook("on_validation_batch_start", "validate", 3 * most, delay=0.005), _BOTH),
        (_at_hook("on_validation_batch_end", "validate", 3 * most, delay=0.005), _BOTH),
        (_at_hook("on_validation_epoch_end", "validate", most, delay=0.005), _ONE),
        (_at_hook("on_validation_end", "validate", most, delay=0.01), _ONE),
    )


def _predict(name: str, *args: str) -> Scenario:
    files = ("work/predictions.*",)
    command = ("predict", *_DIGITS, "--ckpt_path=best", *args)
    return Scenario(name, (command,), _PREDICT, judge.different_outputs, files, again=(), start="trained")


def _export(name: str, form: str, file: str, *moments: tuple[Draw, tuple[str, ...]]) -> Scenario:
    path = "runs/digits/m4-s0/checkpoints/best.ckpt"
    command = ("export", f"--ckpt_path={path}", f"--format={form}")
    return Scenario(
        name,
        (command,),
        ((_at_time(), _BOTH), *moments),
        judge.different_outputs,
        (f"work/{file}",),
        again=(),
        start="trained",
    )


def _evaluate(name: str, command: str, which: str, stage: str, *moments: tuple[Draw, tuple[str, ...]]) -> Scenario:
    common = (
        (_at_time(), _BOTH),
        (_at_hook("setup", delay=0.01), _ONE),
        (_at_hook(f"on_{stage}_start"), _ONE),
        (_at_hook(f"on_{stage}_batch_start", most=3, delay=0.003), _BOTH),
        (_at_hook(f"on_{stage}_batch_end", most=3, delay=0.003), _ONE),
        (_at_hook(f"on_{stage}_epoch_end"), _ONE),
        (_at_hook(f"on_{stage}_end", delay=0.003), _ONE),
    )
    return Scenario(
        name,
        ((command, *_DIGITS, f"--ckpt_path={which}"),),
        (*common, *moments),
        judge.different_test if command == "test" else judge.different_table,
        ("work/runs/*/*/test/results.json",) if command == "test" else ("*.0.out",),
        again=(),
        start="trained",
    )


_STOPPING = (
    *_FIT,
    "--trainer.max_epochs=12",
    "--trainer.callbacks+=EarlyStopping",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.patience=1",
)
_MOVING = ("--checkpoint.filename=epoch={epoch}-loss={val/loss:.4f}", "--checkpoint.auto_insert_metric_name=false")
_COMPARE = (
    "compare",
    *_DIGITS,
    "--margins=2",
    "--seeds",
    "0",
    "1",
    "--folder=compared",
    "--trainer.max_epochs=3",
)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("trained", (_FIT,), (), judge.different_fit),
        Scenario("start", (_FIT,), _START, judge.different_fit),
        Scenario(
            "start of resumed",
            ((*_FIT, "--trainer.max_epochs=2"), (*_FIT, _LAST)),
            _START,
            judge.different_fit,
            killed=1,
            again=(),
        ),
        Scenario(
            "workers",
            (_FOLDER,),
            (
                (_at_time(), _BOTH),
                (_at_time(), _GROUP),
                (_at_hook("on_validation_batch_start", "sanity", 2, delay=0.02), _GROUP),
                (_at_hook("on_train_batch_start", "train", 16, delay=0.02), _BOTH),
                (_at_hook("on_train_batch_end", "train", 16, delay=0.02), _GROUP),
                (_at_hook("on_validation_batch_end", "validate", 6, delay=0.02), _GROUP),
                (_at_hook("on_train_epoch_end", "train", 2, delay=0.02), _GROUP),
                (_at_hook("on_test_batch_end", "test", 5, delay=0.02), _GROUP),
            ),
            judge.different_fit,
            prepare=lambda folder: write_images(folder / "images"),
        ),
        Scenario(
            "validation",
            ((*_FIT, "--trainer.val_check_interval=7", "--trainer.check_val_every_n_epoch=null"),),
            _validations(11),
            judge.different_fit,
        ),
        Scenario(
            "validation during accumulation",
            ((*_FIT, "--trainer.val_check_interval=0.5", "--trainer.accumulate_grad_batches=3"),),
            _validations(8),
            judge.different_fit,
        ),
        Scenario(
            "final test",
            (_FIT,),
            (
                (_at_hook("on_train_end"), _ONE),
                (_at_hook("on_fit_end", delay=0.01), _ONE),
                (_at_hook("teardown"), _ONE),
                (_at_hook("setup", "test"), _ONE),
                (_at_hook("on_test_start"), _ONE),
                (_at_hook("on_test_batch_start", most=6, delay=0.003), _BOTH),
                (_at_hook("on_test_batch_end", most=6, delay=0.003), _BOTH),
                (_at_hook("on_test_end", delay=0.003), _ONE),
                (_at_file("write", r"results\.json", delay=0.001), _ONE),
                (_at_file("write", r"results\.json"), _ONE),
            ),
            judge.different_fit,
        ),
        Scenario(
            "pictures",
            ((*_FIT, "--dashboard.every_n_epochs=4", "--dashboard.max_samples=50", "--dashboard.save=true"),),
            (
                (_at_hook("on_fit_end", delay=0.6), _BOTH),
                (_at_file("write", r"dashboard/.*png", most=8, delay=0.1), _ONE),
                (_at_hook("on_test_end", delay=0.6), _ONE),
            ),
            judge.different_fit,
        ),
        _evaluate("validate", "validate", "best", "validation"),
        _evaluate("test", "test", "best", "test", (_at_file("write", r"results\.json", delay=0.001), _ONE)),
        _evaluate("test last", "test", "last", "test", (_at_file("write", r"results\.json"), _ONE)),
        _predict("predict csv", "--predictions.output=predictions.csv"),
        _predict("predict parquet", "--predictions.output=predictions.parquet"),
        _predict("predict embeddings", "--predictions.output=predictions.csv", "--predictions.embeddings=true"),
        Scenario("best", ((*_FIT, "--trainer.max_epochs=6"),), _CHECKPOINTS, judge.different_fit),
        Scenario(
            "three best",
            ((*_FIT, "--trainer.max_epochs=6", "--checkpoint.save_top_k=3", *_MOVING),),
            (*_CHECKPOINTS, *_REMOVALS),
            judge.different_fit,
        ),
        Scenario(
            "one best",
            ((*_FIT, "--trainer.max_epochs=6", *_MOVING),),
            (*_CHECKPOINTS, *_REMOVALS),
            judge.different_fit,
        ),
        *(
            Scenario(
                f"extended {killed}",
                ((*_FIT, "--trainer.max_steps=27"), (*_FIT, _LAST, "--trainer.max_steps=55")),
                (
                    (_at_time("on_train_batch_start train" if killed == 0 else ""), _BOTH),
                    (_at_hook("on_train_batch_end", most=27, delay=0.005), _ONE),
                    (_at_hook("on_train_end"), _ONE),
                ),
                judge.different_fit,
                killed=killed,
                again=(_LAST,) if killed == 0 else (),
            )
            for killed in (0, 1)
        ),
        Scenario(
            "early stopping",
            (_STOPPING,),
            (
                (_at_time("on_train_batch_start train"), _BOTH),
                (_at_hook("on_validation_end", "validate", 3, delay=0.005), _ONE),
                (_at_hook("on_train_epoch_end", "", 3, delay=0.005), _ONE),
                (_at_hook("on_train_end"), _ONE),
            ),
            judge.different_fit,
        ),
        Scenario(
            "early stopping, finished",
            (_STOPPING, (*_STOPPING, _LAST)),
            ((_at_time(), _BOTH), (_at_hook("on_test_batch_end", most=6), _ONE)),
            judge.different_fit,
            killed=1,
            expected=1,
            again=(),
        ),
        Scenario(
            "two ranks",
            ((*_FIT, *_TWO, "--trainer.max_epochs=3"),),
            (
                (_at_time(), _GROUP),
                # before they have found each other, only torchrun ends a rank that waits for another
                (_at_time("on_train_batch_start train"), _RANKS),
                (_at_hook("on_train_batch_start", "train", 55), _RANKS),
                (_at_hook("on_validation_batch_end", "validate", 9), _RANKS),
                (_at_hook("on_test_batch_end", "test", 6), _RANKS),
            ),
            judge.different_fit,
            ranks=2,
        ),
        Scenario(
            "test on two ranks",
            (("test", *_DIGITS, *_TWO, "--ckpt_path=best"),),
            ((_at_hook("on_test_batch_end", "test", 6), _RANKS),),
            judge.different_test,
            again=(),
            start="trained",
            ranks=2,
        ),
        Scenario(
            "predict on two ranks",
            (("predict", *_DIGITS, *_TWO, "--ckpt_path=best", "--predictions.output=predictions.csv"),),
            (
                (_at_hook("on_predict_batch_end", "predict", 6), _RANKS),
                (_at_hook("on_predict_epoch_end", delay=0.005), _RANKS),
                (_at_file("rename", "predictions"), _ONE),
            ),
            judge.different_outputs,
            ("work/predictions.*",),
            again=(),
            start="trained",
            ranks=2,
        ),
        Scenario(
            "compare",
            (_COMPARE,),
            (
                (_at_time(), ("process", "group", "all")),
                (_at_time(), ("process", "group", "all")),
                (_at_hook("on_train_batch_end", "train", 50, worker=True), ("worker", "process", "all")),
                (_at_hook("on_test_batch_end", "test", 6, worker=True), ("worker",)),
                (_at_hook("on_sanity_check_start", worker=True), ("worker",)),
                (_at_file("write", r"run\.json", most=2, delay=0.001), _ONE),
                (_at_file("write", r"compared/.*\.(csv|md|png)", most=5, delay=0.01), _ONE),
            ),
            judge.different_comparison,
            ("work/compared/*.png", "work/compared/*.csv"),
            again=(),
        ),
        _export(
            "export weights",
            "state_dict",
            "backbone.pt",
            (_at_call("torch.serialization._save", after=True), _ONE),
            (_at_call("torch.save"), _ONE),
        ),
        _export(
            "export program",
            "torch_export",
            "model.pt2",
            (_at_call("torch.export.save", after=True), _ONE),
            (_at_call("torch.export.load"), _ONE),
            (_at_file("rename", r"model\.pt2"), _ONE),
        ),
    )
}

SETTINGS = (
    Setting(1, "`fit`, during its start", 50, ("start", "start of resumed")),
    Setting(2, "`fit` with processes that read images", 30, ("workers",)),
    Setting(3, "`fit`, in a validation", 40, ("validation", "validation during accumulation")),
    Setting(
        4,
        "`fit`, in the final test or while plots are drawn",
        30,
        ("final test", "final test", "final test", "pictures"),
    ),
    Setting(5, "`validate`, `test`", 36, ("validate", "test", "test last")),
    Setting(
        6, "`predict` to CSV, Parquet and with embeddings", 36, ("predict csv", "predict parquet", "predict embeddings")
    ),
    Setting(7, "`fit`, between the best and the last checkpoint", 40, ("best", "three best", "one best")),
    Setting(
        8,
        "`fit` extended by `max_steps`, or ended by `EarlyStopping`",
        32,
        ("extended 0", "extended 1", "early stopping", "early stopping, finished"),
    ),
    Setting(
        9,
        "two processes (DDP): one of them, or both",
        30,
        ("two ranks", "two ranks", "test on two ranks", "predict on two ranks"),
    ),
    Setting(10, "`compare` and `export`", 30, ("compare", "export weights", "compare", "export program")),
)
