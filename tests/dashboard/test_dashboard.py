"""Dashboard, read back from its event files and folders."""

import csv
import gc
import io
import os
import re
import shutil
import struct
import time
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from lsoftmax_lightning import VerificationModule
from lsoftmax_lightning.callbacks import Dashboard, MarginMonitor
from lsoftmax_lightning.dashboard.baseline import baseline_angles
from lsoftmax_lightning.dashboard.collector import EvalCollector
from lsoftmax_lightning.dashboard.panels import draw
from lsoftmax_lightning.dashboard.snapshots import ClassSnapshot, Snapshot
from lsoftmax_lightning.datamodules import LFWFoldDataModule
from lsoftmax_lightning.errors import DivergenceError, InputError
from lsoftmax_lightning.geometry import target_angles
from lsoftmax_lightning.metrics import PairVerification

from ..helpers.formats import write_lfw
from ..helpers.training import BlobsDataModule, make_model, make_trainer, num_hooks

CLASS_PLOTS = {"angles", "class_angles", "confusion", "confusion_percent", "features", "most_confused", "segments"}
PAIR_PLOTS = {"roc", "pair_angles", "hardest_pairs"}


class HardBlobs(BlobsDataModule):
    """Blobs with some wrong labels, so that there are mistakes to plot."""

    def load(self, train: bool) -> Any:
        images, targets = super().load(train)
        targets[::9] = (targets[::9] + 1) % 4
        return type(super().load(train))(images, targets)


def with_logger(dashboard: Dashboard | None = None, **settings: Any) -> tuple[Any, Path]:
    logger = TensorBoardLogger(".", name="run", default_hp_metric=False)
    callbacks = [dashboard or Dashboard(), *settings.pop("callbacks", [])]
    return make_trainer(logger=logger, log_every_n_steps=4, callbacks=callbacks, **settings), Path(logger.log_dir)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0}).Reload()


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Images(tag)]


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "dashboard" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.draws
def test_training_writes_plots() -> None:
    trainer, folder = with_logger(max_epochs=2)  # epochs of 8 steps
    trainer.fit(make_model(), HardBlobs())
    events = read(folder)
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in CLASS_PLOTS}
    for name in CLASS_PLOTS:
        assert steps(events, f"val/{name}") == [8, 16]
        event = events.Images(f"val/{name}")[0]
        size = Image.open(io.BytesIO(event.encoded_image_string)).size
        assert size == (event.width, event.height)
        assert min(size) >= 400
    assert set(events.Tags()["histograms"]) == {"angles/train", "angles/val"}
    histogram = events.Histograms("angles/val")[-1]
    assert (histogram.step, histogram.histogram_value.num) == (16, 40)
    assert histogram.histogram_value.max <= 180
    assert (
        events.Histograms("angles/train")[-1].histogram_value.num == 2 * 20
    )  # the logged steps since the last snapshot


KEPT = [0, 5, 10, 13, 18, 23, 26, 31, 34, 39]
"""Ten samples spread over two batches of 20."""


def test_projector_has_features_names_and_images() -> None:
    trainer, folder = with_logger(Dashboard(max_samples=10))
    model, data = make_model(), BlobsDataModule()
    trainer.fit(model, data)
    (config,) = folder.glob("projector_config.pbtxt")
    paths = {kind: Path(folder, path) for kind, path in re.findall(r'(\w+)_path: "(.*?)"', config.read_text())}
    rows, metadata = (
        [line.split("\t") for line in paths[kind].read_text().splitlines()] for kind in ("tensor", "metadata")
    )
    assert (len(rows), len(rows[0])) == (10, 64)
    assert metadata[0] == ["class", "index"]
    images, targets = data.val_data
    assert metadata[1:] == [[data.class_names[number], str(number)] for number in targets[KEPT].tolist()]
    with torch.inference_mode():
        features = model.eval().forward_features(data.normalize(images[KEPT]))
    torch.testing.assert_close(torch.tensor([[float(x) for x in row] for row in rows]), features, rtol=1e-3, atol=1e-3)
    sprite = Image.open(paths["image"])
    assert sprite.size == (4 * 8, 4 * 8)  # ten images in a square of four by four
    first = pil_to_tensor(sprite.convert("L").crop((0, 0, 8, 8)))
    assert torch.equal(first, images[0])  # the pixels before normalisation


@pytest.mark.draws
def test_test_and_validate_write_plots() -> None:
    trainer, folder = with_logger()
    trainer.test(make_model(), HardBlobs(), verbose=False)
    events = read(folder)
    assert set(events.Tags()["images"]) == {f"test/{name}" for name in CLASS_PLOTS}
    trainer, folder = with_logger()
    trainer.validate(make_model(), HardBlobs(), verbose=False)
    assert set(read(folder).Tags()["images"]) == {f"val/{name}" for name in CLASS_PLOTS}


@pytest.mark.parametrize(
    ("dashboard", "expected"),
    [
        (Dashboard(), [8, 24, 40, 56, 72, 88, 96]),
        (Dashboard(every_n_epochs=1), list(range(8, 97, 8))),
        (Dashboard(every_n_epochs=5), [8, 48, 88, 96]),
        (Dashboard(every_n_epochs=99, max_share=1), [8, 96]),
    ],
)
def test_plots_are_drawn_every_n_epochs_and_in_the_last(
    dashboard: Dashboard, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def record(snapshot: Snapshot) -> tuple[()]:
        drawn.append(snapshot.step)
        return ()

    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.draw", record)
    trainer, _ = with_logger(dashboard, max_epochs=12)
    trainer.fit(make_model(), BlobsDataModule())
    assert drawn == expected


@pytest.mark.parametrize(("max_share", "while_training"), [(0.0, []), (1.0, [8, 16, 24])])
def test_plots_beyond_max_share_are_drawn_after_training(
    max_share: float, while_training: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watch(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.logger.experiment.flush()
            tags = read(folder).Tags()["images"]
            seen.extend(steps(read(folder), "val/features") if tags else [])

    first_call = time.perf_counter()

    def perf_counter() -> float:
        """Return times between which training has taken an hour if max_share is 1."""
        nonlocal first_call
        seconds, first_call = first_call, time.perf_counter() + 3600 * max_share
        return seconds

    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.time", SimpleNamespace(perf_counter=perf_counter))
    dashboard = Dashboard(every_n_epochs=1, max_share=max_share)
    trainer, folder = with_logger(dashboard, max_epochs=3, callbacks=[Watch()])
    trainer.fit(make_model(), BlobsDataModule())
    assert seen == while_training
    assert steps(read(folder), "val/features") == [8, 16, 24]


@pytest.mark.draws
def test_save_writes_every_plot_and_its_data() -> None:
    trainer, folder = with_logger(Dashboard(save=True))
    model, data = make_model(), HardBlobs()
    trainer.fit(model, data)
    names = {path.name for path in (folder / "dashboard").iterdir()}
    assert names == {f"val_{name}_000008.{kind}" for name in CLASS_PLOTS for kind in ("png", "csv")}

    images, target = data.val_data
    with torch.inference_mode():
        logits = model.eval()(data.normalize(images))
        cosines = torch.cosine_similarity(model.forward_features(data.normalize(images)), model.head.weight[target])
    wrong = logits.argmax(1) != target
    counts = [[int(row[name]) for name in data.class_names] for row in table(folder, "val_confusion_000008")]
    assert counts == confusion_matrix(target, logits.argmax(1)).tolist()
    angles = [float(row["degrees"]) for row in table(folder, "val_angles_000008") if row["stage"] == "val"]
    assert angles == pytest.approx(torch.rad2deg(torch.arccos(cosines)).tolist(), rel=1e-4)
    worst = table(folder, "val_most_confused_000008")
    assert len(worst) == int(wrong.sum().clamp(max=12)) > 0
    gap = logits.softmax(1).amax(1) - logits.softmax(1).gather(1, target[:, None])[:, 0]
    firsts = [  # several images may be equally confident
        (data.class_names[target[i]], data.class_names[logits[i].argmax()], pytest.approx(angles[i], rel=1e-4))
        for i in (gap > gap.max() - 1e-6).nonzero().flatten().tolist()
    ]
    assert (worst[0]["true class"], worst[0]["predicted class"], float(worst[0]["degrees"])) in firsts
    for row in worst:
        index = int(row["image"])
        assert (data.class_names[target[index]], data.class_names[logits[index].argmax()]) == (
            row["true class"],
            row["predicted class"],
        )
    segments = [float(row["fraction"]) for row in table(folder, "val_segments_000008") if row["stage"] == "val"]
    assert segments == pytest.approx([float((torch.tensor(angles) < 90).float().mean()), 1 - segments[0]])
    points = table(folder, "val_features_000008")
    assert [row["class"] for row in points] == [data.class_names[number] for number in target]
    between = table(folder, "val_class_angles_000008")
    weight = model.head.weight.detach()
    expected = torch.rad2deg(torch.arccos(torch.cosine_similarity(weight[0], weight[1], dim=0))).item()
    assert float(between[0]["ne"]) == float(between[1]["nw"]) == pytest.approx(expected, rel=1e-4)


def test_softmax_run_in_the_same_folder_is_overlaid() -> None:
    for margin in (1, 2):
        trainer, folder = with_logger(Dashboard(save=True))
        model, data = make_model(margin=margin), HardBlobs()
        trainer.fit(model, data)
        angles: dict[str, list[float]] = {}
        for row in table(folder, "val_angles_000008"):
            angles.setdefault(row["stage"], []).append(float(row["degrees"]))
        if margin == 1:
            softmax = angles["val"]
    assert set(angles) == {"train", "val", "val of softmax (version_0)"}
    assert angles["val of softmax (version_0)"] == [angle // 1 + 0.5 for angle in sorted(softmax)]

    trainer, folder = with_logger(Dashboard(save=True))  # softmax after the margin
    trainer.fit(make_model(margin=1), HardBlobs())
    assert {row["stage"] for row in table(folder, "val_angles_000008")} == {"train", "val", "val of m = 2 (version_1)"}


@pytest.mark.draws
@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_plots_are_saved_as_png_svg_or_pdf(kind: Any, start: bytes) -> None:
    trainer, folder = with_logger(Dashboard(save=kind))
    trainer.fit(make_model(), HardBlobs())
    paths = list((folder / "dashboard").glob(f"*.{kind}"))
    assert all(path.read_bytes().startswith(start) for path in paths)
    assert len(paths) == len(CLASS_PLOTS)
    for path in paths if kind == "png" else []:  # as large as on TensorBoard
        tag = "val/" + re.fullmatch(r"val_(.+)_\d+", path.stem)[1]  # type: ignore[index]
        event = read(folder).Images(tag)[-1]
        with Image.open(path) as image:
            assert image.size == (event.width, event.height)


def test_plots_need_tensorboard_or_save() -> None:
    for logger, dashboard in (
        (False, Dashboard()),
        (CSVLogger(".", "csv"), Dashboard()),
        (CSVLogger(".", "saved"), Dashboard(save=True)),
    ):
        trainer = make_trainer(logger=logger, callbacks=[dashboard])
        trainer.fit(make_model(), BlobsDataModule())
    assert {path.parts[0] for path in Path().rglob("*.png")} == {"saved"}
    with pytest.raises(InputError, match="which a logger has to name"):
        make_trainer(callbacks=[Dashboard(save=True)]).fit(make_model(), BlobsDataModule())


def test_fast_dev_run_draws_nothing() -> None:
    trainer, _ = with_logger(Dashboard(save=True), fast_dev_run=True)
    trainer.fit(make_model(), BlobsDataModule())
    assert not list(Path().rglob("*"))


def test_diverged_training_writes_plots_and_raises() -> None:
    from torch.optim import SGD

    class LateDisaster(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = 1e30

    trainer, folder = with_logger(Dashboard(every_n_epochs=1, max_share=0), max_epochs=9, callbacks=[LateDisaster()])
    with pytest.raises(DivergenceError):
        trainer.fit(make_model(optimizer=lambda params: SGD(params, lr=0.1)), BlobsDataModule())
    assert steps(read(folder), "val/features") == [8, 16]


class Raise(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise self.error


def test_interrupted_training_draws_nothing() -> None:
    trainer, folder = with_logger(Dashboard(max_share=0), max_epochs=9, callbacks=[Raise(KeyboardInterrupt())])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(make_model(), BlobsDataModule())
    assert not read(folder).Tags()["images"]


def test_training_error_takes_precedence_over_a_plot_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.draw", fail)
    trainer, _ = with_logger(Dashboard(max_share=0), max_epochs=9, callbacks=[Raise(ValueError("the first"))])
    model = make_model()
    with pytest.warns(UserWarning, match="no space left"), pytest.raises(ValueError, match="the first"):
        trainer.fit(model, BlobsDataModule())
    assert num_hooks(model) == 0


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left\non this device")


@pytest.mark.parametrize(
    ("place", "what", "left"),
    [
        ("dashboard.collector.EvalCollector.update", "images, features and predictions", {"angles", "segments"}),
        ("dashboard.dashboard.target_angles", "the angles of training", CLASS_PLOTS),
        ("dashboard.collector.collect_snapshot", "the val snapshot", set()),
        ("dashboard.dashboard.baseline_angles", "val plots", set()),
        ("dashboard.plots.angle_map", "val plots", {"angles", "features", "segments"}),
        ("dashboard.dashboard.write_csv", "val/features", set()),
        ("dashboard.snapshots.ClassSnapshot.embedding", "the projector", CLASS_PLOTS),
        ("dashboard.monitor.hparams", "HParams", CLASS_PLOTS),
    ],
)
def test_plot_error_does_not_stop_the_run(
    place: str, what: str, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"lsoftmax_lightning.{place}", fail)
    dashboard = Dashboard(every_n_epochs=1, save=place.endswith("write_csv"))
    trainer, folder = with_logger(dashboard, max_epochs=2, callbacks=[MarginMonitor()])
    cause = f"{what} left out because of OSError: no space left; the run continues without."
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.fit(make_model(), HardBlobs())
        assert trainer.global_step == 16
        assert set(read(folder).Tags()["images"]) == {f"val/{name}" for name in left}
        trainer.test(make_model(), HardBlobs(), verbose=False)
    assert trainer.callback_metrics["test/acc"] >= 0
    assert sum(cause in str(warning.message) for warning in warned) == 1


def test_each_fit_repeats_the_warning_about_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsoftmax_lightning.dashboard.monitor.hparams", fail)
    monitor = MarginMonitor()
    for _ in range(2):
        trainer, _ = with_logger(max_epochs=1, callbacks=[monitor])
        with pytest.warns(UserWarning, match="MarginMonitor: HParams left out because of OSError"):
            trainer.fit(make_model(), HardBlobs())


def test_collector_is_incomplete_after_an_error() -> None:
    collector, features, target = EvalCollector(12, None, 3), torch.randn(4, 2), torch.arange(4) % 2
    batch = (features, features @ torch.eye(2), target, torch.eye(2))
    collector.update(torch.rand(4, 1, 2, 2), *batch)
    assert collector.is_complete
    with pytest.raises(IndexError):
        collector.update(torch.rand(4, 1, 2, 2), features[:2], *batch[1:])
    collector.update(torch.rand(4, 1, 2, 2), *batch)
    assert not collector.is_complete


class Wrapped(LightningDataModule):
    """Blobs from loaders of PyTorch, in another shape or without a length."""

    def __init__(self, size: tuple[int, int] = (8, 8), length: bool = True) -> None:
        super().__init__()
        self.size, self.length = size, length

    def setup(self, stage: str) -> None:
        self.data = HardBlobs()
        self.data.setup("fit")

    def _loader(self, data: Any) -> DataLoader[Any]:
        images = torch.nn.functional.interpolate(data.images.float() / 255, self.size)
        dataset = TensorDataset(images, data.targets)
        return DataLoader(dataset if self.length else Endless(dataset), batch_size=20)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.train_data)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.val_data)


class Endless(IterableDataset[Any]):
    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return iter([self.dataset[index] for index in range(len(self.dataset))])


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (100, 60), (100, 1)])
def test_sprites_hold_images_of_any_shape(size: tuple[int, int]) -> None:
    class Mean(torch.nn.Module):
        num_features = 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x, (2, 4)).flatten(1)

    trainer, folder = with_logger(Dashboard(max_samples=10))
    model, data = make_model(backbone=Mean()), Wrapped(size)
    trainer.fit(model, data)
    (sprite,) = folder.rglob("sprite.png")
    config = (folder / "projector_config.pbtxt").read_text()
    width, height = map(int, re.findall(r"single_image_dim: (\d+)", config))
    shown = max(1, int(size[1] * height / size[0]))  # columns of the image
    left = (width - shown) // 2
    assert height == min(48, size[0])
    assert width == max(height, shown)
    pixels = pil_to_tensor(Image.open(sprite).convert("L"))
    images = next(iter(data.val_dataloader()))[0]
    for row, column, index in ((0, 0, KEPT[0]), (0, 3, KEPT[3]), (1, 0, KEPT[4])):  # in a square of four by four
        tile = pixels[0, row * height : (row + 1) * height, column * width : (column + 1) * width]
        image = images[index, 0]
        expected = 255 * (image - image.min()) / (image.max() - image.min())
        assert tile[:, left : left + shown].float().mean() == pytest.approx(expected.mean().item(), rel=0.03)
        assert tile.sum() == tile[:, left : left + shown].sum()


def test_data_of_unknown_length_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_steps = []

    def draw_last(snapshot: Snapshot) -> Any:
        snapshot_steps.append(snapshot.step)
        return draw(snapshot) if snapshot.step == 160 else ()

    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.draw", draw_last)
    trainer, folder = with_logger(Dashboard(max_samples=12, save=True), max_epochs=20)
    trainer.fit(make_model(), Wrapped(length=False))
    assert snapshot_steps == [8, 32, 56, 80, 104, 128, 152, 160]  # every third epoch
    assert steps(read(folder), "val/confusion") == [160]
    rows = table(folder, "val_features_000160")
    assert 6 <= len(rows) <= 12
    assert {row["class"] for row in rows} == set("0123")


@pytest.mark.parametrize("batches", [1, 2, 3, 50])
def test_samples_of_unknown_length_are_spread_over_all_batches(batches: int) -> None:
    collector = EvalCollector(12, None)
    for batch in range(batches):
        features = torch.full((20, 1), float(batch))
        logits = torch.zeros(20, 2)
        collector.update(torch.rand(20, 1, 2, 2), features, logits, torch.zeros(20, dtype=torch.long), torch.ones(2, 1))
    settings = {"stage": "val", "step": 1, "margin": 2, "lambda_": 0.0, "nearest_angle": 90.0}
    snapshot = collector.snapshot(**settings, class_names="ab", shown=torch.arange(2), weight=torch.ones(2, 1))
    kept = snapshot.features.flatten()
    assert 6 <= len(kept) <= 12
    assert kept.max() >= 0.7 * (batches - 1)
    assert kept.min() <= 0.1 * batches


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"nw": 0, "ne": 1, "sw": 2, "se": 3}, ["nw", "ne", "sw", "se"]),
        ({3: "se", 0: "nw", 1: "ne", 2: "sw"}, ["nw", "ne", "sw", "se"]),
        ({"0": "nw", "1": "ne", "2": "sw", "3": "se"}, ["nw", "ne", "sw", "se"]),
        pytest.param(range(10, 14), ["10", "11", "12", "13"], marks=pytest.mark.slow),
        pytest.param(np.array(["nw", "ne", "sw", "se"]), ["nw", "ne", "sw", "se"], marks=pytest.mark.slow),
        pytest.param(torch.arange(4), ["0", "1", "2", "3"], marks=pytest.mark.slow),
        pytest.param(
            [b"nw", b"n\xff", "caf\udce9", "猫"], ["nw", r"n\udcff", r"caf\udce9", "猫"], marks=pytest.mark.draws
        ),
        pytest.param(
            ["n\tw", "n\ne", "s\rw", "s\x00\u2028e"],
            [r"n\tw", r"n\ne", r"s\rw", r"s\x00\u2028e"],
            marks=pytest.mark.draws,
        ),
        pytest.param(["_nw", "__ne", "$sw$", "x" * 500], ["_nw", "__ne", "$sw$", "x" * 500], marks=pytest.mark.draws),
    ],
)
def test_class_names_of_any_kind_are_shown(names: Any, expected: list[str]) -> None:
    class Named(HardBlobs):
        class_names = names

    trainer, folder = with_logger(Dashboard(save=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Glyph|The '.*' does not have many workers")
        trainer.fit(make_model(), Named())
    assert set(read(folder).Tags()["images"]) == {f"val/{name}" for name in CLASS_PLOTS}
    assert [row["true class"] for row in table(folder, "val_confusion_000008")] == expected
    (metadata,) = folder.rglob("metadata.tsv")
    rows = [line.split("\t") for line in metadata.read_text(encoding="utf-8").split("\n")[1:-1]]
    assert len(rows) == 40
    assert all(row == [expected[int(row[1])], row[1]] for row in rows)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["nw", "ne"], ["nw", "ne", "2", "3"]), (["nw", None, "", "se"], ["nw", "1", "2", "se"]), (4, list("0123"))],
)
def test_class_without_a_name_is_shown_by_index(names: Any, expected: list[str]) -> None:
    class Named(HardBlobs):
        class_names, num_classes = names, 4

    trainer, folder = with_logger(Dashboard(save=True))
    with pytest.warns(UserWarning, match="class_names: must have a name for each of the 4 classes") as warned:
        trainer.fit(make_model(), Named())
    assert sum("class_names" in str(warning.message) for warning in warned) == 1
    assert [row["true class"] for row in table(folder, "val_confusion_000008")] == expected


def test_at_most_a_hundred_classes_are_shown() -> None:
    collector = EvalCollector(400, None, 1)
    names = [f"class {index}" for index in range(150)]
    generator = torch.Generator().manual_seed(0)
    target, features = torch.arange(300) % 150, torch.randn(300, 8, generator=generator)
    weight = torch.randn(150, 8, generator=generator)
    collector.update(torch.rand(300, 3, 4, 4), features, features @ weight.T, target, weight)
    shown = torch.linspace(0, 149, 100).round().long()
    snapshot = collector.snapshot(
        stage="val",
        step=5,
        margin=2,
        lambda_=1.0,
        nearest_angle=50.0,
        weight=weight[shown],
        shown=shown,
        class_names=names,
    )
    drawn = {plot.name: plot for plot in draw(snapshot)}
    header = drawn["confusion"].header
    assert (header[1], header[-1], len(header)) == ("class 0", "class 149", 101)
    inside = torch.isin(target, shown) & torch.isin((features @ weight.T).argmax(1), shown)
    assert sum(sum(row[1:]) for row in drawn["confusion"].rows) == inside.sum()
    is_correct = (features @ weight.T).argmax(1) == target
    for row in drawn["confusion_percent"].rows:
        of_class = is_correct[target == names.index(row[0])].float()
        assert dict(zip(header, row, strict=True))[row[0]] == pytest.approx(100 * of_class.mean().item())
    title = "angles between the weights of 100 of 150 classes\nm = 2, lambda 1 (effective 1.58), step 5"
    assert drawn["class_angles"].figure.axes[0].get_title() == title
    assert len(list(drawn["features"].rows)) == 200


class Norm:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std


@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        ((3, 60, 90), None),
        ((3, 60, 90), Norm((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))),
        ((1, 8, 8), None),
        ((1, 8, 8), Norm(0.13, 0.3)),
        ((4, 8, 8), None),
        ((4, 8, 8), Norm([0.5] * 4, [0.2] * 4)),
        ((2, 8, 8), None),
        ((), None),
        ((), Norm((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))),
    ],
)
def test_images_of_any_kind_are_shown(shape: tuple[int, ...], norm: Any) -> None:
    collector, weight = EvalCollector(4, norm, 2), torch.eye(3)
    for _ in range(2):
        images = torch.randn(5, *shape) if shape else {"not": "images"}
        collector.update(
            images, torch.eye(3)[[0, 1, 2, 0, 1]], torch.eye(3)[[1, 1, 2, 0, 1]], torch.tensor([0, 1, 2, 0, 1]), weight
        )
    snapshot = collector.snapshot(
        stage="val",
        step=5,
        margin=1,
        lambda_=0.0,
        nearest_angle=90.0,
        weight=weight,
        shown=torch.arange(3),
        class_names=("a", "b", "c"),
    )
    channels = 3 if shape and shape[0] > 2 else 1
    height, width = {(): (1, 1), (3, 60, 90): (32, 48)}.get(shape, (8, 8))
    assert snapshot.thumbnails.shape == (4, channels, height, width)
    if not shape:
        assert not snapshot.thumbnails.any()
    assert int((snapshot.confused.confidence_gap > 0).sum()) == 2  # the two mistakes of two batches
    assert len(list(draw(snapshot))) == 6
    assert snapshot.embedding()["label_img"].shape[1] == 3


def snapshot_of(collector: EvalCollector) -> ClassSnapshot:
    fields = {"stage": "val", "step": 1, "margin": 2, "lambda_": 0.0, "nearest_angle": 90.0}
    return collector.snapshot(**fields, class_names="ab", shown=torch.arange(2), weight=torch.ones(2, 1))


def collect(collector: EvalCollector, images: torch.Tensor, features: torch.Tensor) -> None:
    count = len(images)
    target = torch.zeros(count, dtype=torch.long)
    collector.update(images, features, torch.zeros(count, 2), target, torch.ones(2, 1))


def test_images_in_uint8_and_with_an_alpha_channel_keep_their_colours() -> None:
    images = torch.randint(256, (6, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, :3, 0, 0], images[:, :3, 0, 1] = 0, 255
    norm = Norm((0.5, 0.4, 0.3, 0.5), (0.2, 0.3, 0.4, 0.5))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (norm.mean, norm.std))
    for given, datamodule in (
        (images, None),
        (images, norm),
        (images / 255, None),
        ((images / 255 - mean) / std, norm),
    ):
        collector = EvalCollector(6, datamodule, 1)
        collect(collector, given, torch.ones(6, 1))
        assert torch.equal(snapshot_of(collector).thumbnails, images[:, :3])


@pytest.mark.parametrize(
    ("batches", "expected"), [(1, 20), (7, 100), (30, 100), (99, 100), (100, 100), (101, 100), (1000, 100)]
)
def test_max_samples_limits_data_of_known_length(batches: int, expected: int) -> None:
    collector = EvalCollector(100, None, batches)
    for batch in range(batches):
        collect(collector, torch.zeros(20, 1, 1, 1), torch.full((20, 1), float(batch)))
    kept = snapshot_of(collector).features.flatten()
    assert len(kept) == expected
    quarters = torch.histc(kept, 4, 0, batches)
    assert batches < 4 or quarters.max() - quarters.min() <= 20


@pytest.mark.parametrize(("classes", "images", "size"), [(100, 100, 256), (200, 50, 256), (10, 500, 2500), (2, 9, 4)])
def test_samples_of_sorted_images_are_of_all_classes(classes: int, images: int, size: int) -> None:
    values = torch.arange(classes * images, dtype=torch.float64) // images
    batches = values.split(size)
    collector = EvalCollector(max(2000, 2 * classes), None, len(batches))
    for batch in batches:
        collect(collector, torch.zeros(len(batch), 1, 1, 1), batch.unsqueeze(1))
    kept = torch.bincount(snapshot_of(collector).features.flatten().long(), minlength=classes)
    assert kept.min() >= 0.5 * kept.float().mean()


@pytest.mark.parametrize(("batches", "size"), [(4000, 4), (200, 64), (2, 5000), (500, 7)])
@pytest.mark.parametrize("classes", [2, 8, 10])
def test_samples_of_unknown_length_cover_all_parts_and_classes(batches: int, size: int, classes: int) -> None:
    collector = EvalCollector(500, None)
    for batch in range(batches):
        indices = torch.arange(batch * size, (batch + 1) * size, dtype=torch.float64)
        collect(collector, torch.zeros(size, 1, 1, 1), torch.stack([indices / (batches * size), indices % classes], 1))
    kept = snapshot_of(collector).features
    assert 250 <= len(kept) <= 500
    quarters = torch.histc(kept[:, 0], 4, 0, 1)
    assert quarters.max() - quarters.min() <= 0.1 * quarters.mean()
    counts = torch.bincount(kept[:, 1].long())  # classes that follow each other
    assert len(counts) == classes
    assert counts.max() - counts.min() <= 0.3 * counts.float().mean()


@pytest.mark.parametrize("error", [None, ValueError("the first")])
def test_collector_is_released_and_ignores_the_sanity_check(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectors: set[weakref.ref[EvalCollector]] = set()
    update = EvalCollector.update

    def spy(self: EvalCollector, *args: Any) -> None:
        assert not trainer.sanity_checking
        collectors.add(weakref.ref(self))
        update(self, *args)

    class Fail(Callback):
        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            if error is not None and not trainer.sanity_checking:
                raise error

    monkeypatch.setattr(EvalCollector, "update", spy)
    trainer, _ = with_logger(callbacks=[Fail()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The '.*' does not have many workers")
        with pytest.raises(ValueError, match="the first") if error else nullcontext():
            trainer.fit(make_model(), BlobsDataModule())
    gc.collect()
    assert [collector() for collector in collectors] == [None]


@pytest.mark.draws
def test_pairs_have_their_own_plots(tmp_path: Path) -> None:
    write_lfw(tmp_path, folds=4, count=4)
    data = LFWFoldDataModule(str(tmp_path), 4, 3, image_size=8, batch_size=4, num_workers=0)
    model = VerificationModule(data.num_classes, "digits", image_shape=data.image_shape, margin=2)
    trainer, folder = with_logger(Dashboard(save=True), max_epochs=2)
    trainer.log_every_n_steps = 50  # the last training batch is as large as one of validation, and not read
    trainer.fit(model, data)
    assert set(read(folder).Tags()["images"]) == {f"val/{name}" for name in PAIR_PLOTS}

    trainer, folder = with_logger(Dashboard(save=True))
    trainer.test(model, data, verbose=False)
    assert set(read(folder).Tags()["images"]) == {f"test/{name}" for name in PAIR_PLOTS}
    metric = PairVerification(data.test_pairs)
    with torch.inference_mode():
        images = data.normalize(data.test_data.images[torch.arange(len(data.test_files.paths))])
        metric.update(model.eval().forward_features(images), torch.arange(len(images)))
    metric.compute()
    assert metric.cosines is not None
    rows = table(folder, "test_roc")
    same = data.test_pairs.same[data.test_pairs.is_scored]
    assert [row["same"] == "True" for row in rows] == same.tolist()
    assert [float(row["cosine"]) for row in rows] == pytest.approx(metric.cosines.tolist(), abs=1e-5)
    hardest = table(folder, "test_hardest_pairs")
    assert [row["same"] for row in hardest] == ["True"] * 4 + ["False"] * 4
    assert float(hardest[0]["cosine"]) == pytest.approx(metric.cosines[same].min().item(), abs=1e-5)
    assert float(hardest[4]["cosine"]) == pytest.approx(metric.cosines[~same].max().item(), abs=1e-5)
    pairs = {(row["first"], row["second"]): row["same"] == "True" for row in hardest}
    names = [str(path) for path in data.test_files.paths]
    scored = data.test_pairs[data.test_pairs.is_scored]
    all_pairs = {
        (names[first], names[second]): bool(is_same)
        for first, second, is_same in zip(scored.first, scored.second, scored.same, strict=True)
    }
    assert pairs.items() <= all_pairs.items()


@pytest.mark.parametrize(
    ("settings", "error_text"),
    [
        ({"every_n_epochs": -1}, "every_n_epochs must be 0 .* or more, got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"max_share": 3}, "max_share must be from 0 to 1, got 3"),
        ({"html": True, "every_n_epochs": 0}, "every_n_epochs: must be at least 1 with save or html, got 0"),
        ({"save": "pdf", "every_n_epochs": 0}, "every_n_epochs: must be at least 1 with save or html, got 0"),
        ({"save": "gif"}, "save must be true, false, png, svg or pdf, got gif"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], error_text: str) -> None:
    with pytest.raises(InputError, match=error_text):
        Dashboard(**settings)


def unreadable_hparams(run: Path) -> Path:
    path = run / "hparams.yaml"
    path.write_bytes(b"margin: 1\ncaf\xe9: 1\n")
    return path


def folder_as_hparams(run: Path) -> Path:
    path = run / "hparams.yaml"
    path.unlink()
    path.mkdir()
    return path


def fifo_as_hparams(run: Path) -> Path:
    path = run / "hparams.yaml"
    path.unlink()
    os.mkfifo(path)
    return path


def damaged_events(run: Path) -> Path:
    (path,) = run.glob("*tfevents*")
    event, length = b"\xff\xfe no event", struct.pack("<Q", 11)
    with path.open("ab") as file:  # with valid checksums, because TensorBoard stops at invalid ones
        file.write(length + struct.pack("<I", masked_crc32c(length)))
        file.write(event[:11] + struct.pack("<I", masked_crc32c(event[:11])))
    return run


def fifo_as_events(run: Path) -> Path:
    os.mkfifo(run / "events.out.tfevents.9")
    return run


def folder_as_events(run: Path) -> Path:
    (run / "events.out.tfevents.9").mkdir()
    return run


@pytest.fixture(scope="module")
def softmax_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with margin 1."""
    logger = TensorBoardLogger(str(tmp_path_factory.mktemp("softmax")), name="", version="run", default_hp_metric=False)
    make_trainer(logger=logger, callbacks=[Dashboard()]).fit(make_model(margin=1), BlobsDataModule())
    return Path(logger.log_dir)


@pytest.mark.parametrize(
    "damage",
    [unreadable_hparams, folder_as_hparams, fifo_as_hparams, damaged_events, fifo_as_events, folder_as_events],
)
def test_unreadable_softmax_run_is_skipped_with_a_warning(damage: Any, softmax_run: Path) -> None:
    for name in ("good", "bad"):
        shutil.copytree(softmax_run, Path("runs", name))
    path = damage(Path("runs/bad"))
    for name, seconds in (("good", 1), ("bad", 2)):
        os.utime(Path("runs", name, "hparams.yaml"), (seconds, seconds))
    with pytest.warns(UserWarning, match=f"^{path} cannot be read, so the angles of this run are not shown") as warned:
        angles = baseline_angles(Path("runs/own"), 2, "val")
    assert len(warned) == 1
    assert list(angles) == ["val of softmax (good)"]


def test_broken_link_next_to_a_run_does_not_stop_training() -> None:
    Path("run/gone").mkdir(parents=True)
    Path("run/gone/hparams.yaml").symlink_to("nowhere")
    Path("run/loop").symlink_to("loop")
    trainer, folder = with_logger()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cannot be read, so the angles")  # a broken link is listed by some Pythons
        trainer.fit(make_model(margin=2), BlobsDataModule())
    assert steps(read(folder), "val/angles") == [8]


def test_number_of_stored_training_angles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.MAX_TRAIN_ANGLES", 50)
    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.MAX_TRAIN_BATCHES", 4)
    angles: list[float] = []
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def recorded(*args: torch.Tensor) -> torch.Tensor:
        found = target_angles(*args)
        angles.extend(found.tolist())
        alive.append(sum(tensor() is not None for tensor in tensors))
        tensors.append(weakref.ref(found))
        return found

    monkeypatch.setattr("lsoftmax_lightning.dashboard.dashboard.target_angles", recorded)
    dashboard = Dashboard()
    trainer, _ = with_logger(dashboard, max_epochs=4, limit_val_batches=0)
    trainer.log_every_n_steps = 1
    trainer.fit(make_model(), BlobsDataModule())
    assert len(alive) == 32
    assert max(alive) < 4
    snapshot = Snapshot(stage="val", step=32, margin=2, lambda_=0.0, nearest_angle=90.0)
    dashboard.observe_snapshot(trainer, snapshot)
    assert snapshot.train_angles.tolist() == angles[-50:]
    assert snapshot.train_angles.untyped_storage().nbytes() == 4 * 50


def test_names_of_an_earlier_datamodule_are_not_shown() -> None:
    trainer, folder = with_logger(Dashboard(save=True))
    model, data = make_model(), BlobsDataModule()
    trainer.fit(model, data)
    trainer.test(model, DataLoader(TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 4), 20), verbose=False)
    assert {row["true class"] for row in table(folder, "val_confusion_000008")} == set(data.class_names)
    assert {row["true class"] for row in table(folder, "test_confusion")} == set("0123")


def test_formulas_in_class_names_are_quoted_in_csv() -> None:
    class Formulas(HardBlobs):
        class_names = ("=1+1", "@a", "-b", "-1")

    trainer, folder = with_logger(Dashboard(save=True))
    trainer.fit(make_model(), Formulas())
    quoted = ["'=1+1", "'@a", "'-b", "-1"]
    rows = table(folder, "val_confusion_000008")
    assert list(rows[0]) == ["true class", *quoted]
    assert [row["true class"] for row in rows] == quoted
    points = table(folder, "val_features_000008")
    assert {row["class"] for row in points} == set(quoted)
    assert any(float(row["x"]) < 0 for row in points)
    assert {row["predicted class"] for row in table(folder, "val_most_confused_000008")} <= set(quoted)
    assert not list(folder.rglob("*.part"))
