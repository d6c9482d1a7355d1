"""Files of predictions: complete, in order, equal on any number of ranks, and not kept in memory."""

import csv
import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader

from lsoftmax_lightning import ClassificationModule, VerificationModule
from lsoftmax_lightning.atomic import csv_safe, from_csv_safe
from lsoftmax_lightning.callbacks import MarginMonitor, Predictions
from lsoftmax_lightning.data_spec import DataSpec
from lsoftmax_lightning.datamodules import ImageFolderDataModule
from lsoftmax_lightning.datamodules.images import read_image
from lsoftmax_lightning.errors import DataError, InputError, RunError
from lsoftmax_lightning.geometry import target_angles

from ..helpers.forked import run_on
from ..helpers.formats import write_folder, write_image
from ..helpers.training import BlobsDataModule, file_size_limit, make_model, make_trainer

ROOT = Path(__file__).parents[2]


class Blobs(BlobsDataModule):
    def __init__(self, predict_folder: str | None = None) -> None:
        super().__init__()
        self.predict_folder = predict_folder


def predict(output: str | None, embeddings: bool = True, **settings: Any) -> None:
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(callbacks=[Predictions(output, embeddings)], devices=devices, strategy=strategy)
    torch.manual_seed(0)
    model = Sure(4, "digits", image_shape=(1, 8, 8))
    trainer.predict(model, Blobs(**settings), return_predictions=False)


class Sure(ClassificationModule):
    """A module with a boolean output."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().predict_step(batch, batch_idx)
        return outputs | {"sure": outputs["probability"] > 0.3}


class Outputs(ClassificationModule):
    """A module with given outputs in each batch, of 25 images."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__(4, "digits", image_shape=(1, 8, 8))
        self.outputs = outputs

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.outputs[batch_idx]


def predict_outputs(path: str, *outputs: Any, embeddings: bool = False) -> None:
    data = Blobs()
    data.batch_size = 25
    make_trainer(callbacks=[Predictions(path, embeddings)]).predict(Outputs(*outputs), data, return_predictions=False)


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_a_row_has_the_outputs_of_predict_step() -> None:
    predict("out/here.csv")
    data, model = Blobs(), make_model(margin=4).eval()
    data.setup("test")
    with torch.no_grad():
        features = model.forward_features(data.normalize(data.test_data.images))
        logits = model.head(features)
    rows = read("out/here.csv")
    assert list(rows[0]) == ["index", "label", "prediction", "probability", "angle", "sure"]
    assert [row["label"] for row in rows] == [data.class_names[index] for index in data.test_data.targets]
    assert [int(row["index"]) for row in rows] == list(range(50))
    probability, prediction = logits.softmax(1).max(1)
    assert [row["prediction"] for row in rows] == [data.class_names[index] for index in prediction]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probability.tolist(), abs=1e-6)
    assert [int(row["sure"]) for row in rows] == (probability > 0.3).tolist()
    angle = F.cosine_similarity(features, model.head.weight[prediction]).arccos().rad2deg()
    assert [float(row["angle"]) for row in rows] == pytest.approx(angle.tolist(), abs=1e-2)
    assert np.load("out/here.npy") == pytest.approx(features.numpy(), abs=1e-5)
    assert {path.name for path in Path("out").iterdir()} == {"here.csv", "here.npy"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"nw": 0, "ne": 1, "sw": 2, "se": 3}, ["nw", "ne", "sw", "se"]),
        (range(4), list("0123")),
        (np.array(["nw", "ne"]), ["nw", "ne", "2", "3"]),
        (["n\udcff", "n\ne", "s\tw", "se"], [r"n\udcff", r"n\ne", r"s\tw", "se"]),
    ],
)
def test_class_names_of_any_kind_are_written(names: Any, expected: list[str]) -> None:
    class Named(Blobs):
        class_names, num_classes = names, 4

    data, model = Named(), make_model().eval()
    make_trainer(callbacks=[Predictions("out.csv")]).predict(model, data, return_predictions=False)
    with torch.no_grad():
        prediction = model(data.normalize(data.test_data.images)).argmax(1)
    assert [row["prediction"] for row in read("out.csv")] == [expected[index] for index in prediction]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_top_k_classes_are_written_and_distant_images_are_unknown(kind: str) -> None:
    data, model = Blobs(), make_model().eval()
    predictions = Predictions(f"out.{kind}", top_k=3, max_angle=80)
    make_trainer(callbacks=[predictions]).predict(model, data, return_predictions=False)
    with torch.no_grad():
        features = model.forward_features(data.normalize(data.test_data.images))
        probabilities, classes = model.head(features).softmax(1).topk(3)
    angles = F.cosine_similarity(features, model.head.weight[classes[:, 0]]).arccos().rad2deg()
    assert 0 < (angles > 80).sum() < len(angles)
    rows = read("out.csv") if kind == "csv" else parquet.read_table("out.parquet").to_pylist()
    for row, best, probability, angle in zip(rows, classes, probabilities, angles, strict=True):
        names = [data.class_names[index] for index in best]
        assert row["prediction"] == (names[0] if angle <= 80 else "unknown")
        assert [row["prediction_2"], row["prediction_3"]] == names[1:]
        found = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert found == pytest.approx(probability.tolist(), abs=1e-6)


def test_rows_before_an_error_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    good = {"prediction": torch.arange(25) % 4}
    with pytest.raises(InputError, match="must return the same 1-D outputs"):
        predict_outputs("out.csv", good, {"other": torch.arange(25)})
    assert [row["index"] for row in read("out.incomplete.csv")] == [str(index) for index in range(25)]
    assert [path.name for path in Path().iterdir()] == ["out.incomplete.csv"]
    assert "The predictions before the error are in out.incomplete.csv" in caplog.messages


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_unreadable_images_are_reported_or_skipped(skip_unreadable: bool) -> None:
    write_folder(Path("photos"), count=3)
    Path("photos/notes.txt").write_text("no image")
    write_folder(Path("images"))
    data = ImageFolderDataModule("images", 8, predict_folder="photos", skip_unreadable=skip_unreadable)
    model = ClassificationModule(4, "digits", image_shape=(3, 8, 8))
    trainer = make_trainer(callbacks=[Predictions("out.csv")])
    if skip_unreadable:
        with pytest.warns(UserWarning, match=r"Skipping 1 of \d+ files .*:\n  photos/notes.txt"):
            trainer.predict(model, data, return_predictions=False)
        assert {row["path"] for row in read("out.csv")} == {str(path) for path in Path("photos").rglob("*.png")}
        assert "label" not in read("out.csv")[0]
        for image in Path("photos").rglob("*.png"):
            image.write_text("no image")
        with (
            pytest.warns(UserWarning, match="Skipping 13 of 13 files"),
            pytest.raises(DataError, match="predict_folder: must have a readable image, got none in 13 files"),
        ):
            data.setup("predict")
    else:
        with pytest.raises(DataError, match=r"photos/notes.txt"):
            trainer.predict(model, data, return_predictions=False)


def test_the_angle_of_unknown_images_is_chosen_on_validation_images() -> None:
    data, model = Blobs(), make_model()
    trainer = make_trainer(max_epochs=1, callbacks=[MarginMonitor()])
    trainer.fit(model, data)
    trainer.save_checkpoint("last.ckpt")
    model.eval()
    with torch.no_grad():
        features = model.forward_features(data.normalize(data.val_data.images))
        angles = target_angles(features, model.head.weight[model.head(features).argmax(1)]).sort().values
    lowest = angles[math.ceil(0.8 * len(angles)) - 1].item()

    predictions = Predictions("out.csv", max_angle_quantile=0.8)
    make_trainer(callbacks=[predictions]).predict(make_model(), data, ckpt_path="last.ckpt", return_predictions=False)
    assert predictions.max_angle is not None
    assert lowest <= predictions.max_angle <= lowest + 0.1001
    rows = read("out.csv")
    assert 0 < sum(row["prediction"] == "unknown" for row in rows) < len(rows)
    for row in rows:
        assert (row["prediction"] == "unknown") == (float(row["angle"]) > predictions.max_angle)

    for path in (None, "without.ckpt"):
        make_trainer(max_epochs=0).fit(model, data)
        model.trainer.save_checkpoint("without.ckpt")
        with pytest.raises(InputError, match=f"max_angle_quantile: needs a checkpoint .* got {path}"):
            make_trainer(callbacks=[Predictions("out.csv", max_angle_quantile=0.8)]).predict(
                model, data, ckpt_path=path, return_predictions=False
            )


@pytest.mark.parametrize(
    ("settings", "error_text"),
    [
        ({"top_k": 0}, "top_k"),
        ({"max_angle": 200}, "max_angle"),
        ({"max_angle_quantile": 0}, "max_angle_quantile"),
    ],
)
def test_settings_of_predictions_are_checked(settings: dict[str, Any], error_text: str) -> None:
    with pytest.raises(InputError, match=f"predictions.{error_text}: must be"):
        Predictions("out.csv", **settings)
    with pytest.raises(InputError, match="need a ClassificationModule, got BoringModel"):
        make_trainer(callbacks=[Predictions("out.csv", top_k=2)]).predict(BoringModel(), return_predictions=False)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_several_ranks_write_the_same_file_as_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsoftmax_lightning.callbacks.predictions.MERGED_ROWS", 3)
    write_folder(Path("photos/more"), count=10)
    write_image(Path("photos/a.png"), (10, 200, 30))
    Path("photos/.hidden").write_text("no image")
    for count in (1, 2, 4):  # 41 images in batches of 20: one rank has the last batch alone
        done = run_on(count, partial(predict, f"{count}.{kind}", predict_folder="photos"))
        assert done.returncode == 0, done.stderr
    assert np.load("1.npy").shape == (41, 64)
    for count in (2, 4):
        assert Path(f"{count}.{kind}").read_bytes() == Path(f"1.{kind}").read_bytes()
        assert np.array_equal(np.load(f"{count}.npy"), np.load("1.npy"))
    if kind == "csv":
        rows = read("1.csv")
    else:
        table = parquet.read_table("1.parquet")
        assert list(map(str, table.schema.types)) == ["string", "string", "float", "float", "int64"]
        rows = table.to_pylist()
    paths = [row["path"] for row in rows]
    assert paths == sorted(map(str, Path("photos").rglob("*.png")))
    data, model = Blobs(), make_model(margin=4).eval()
    image = read_image(paths[3], (8, 8), channels=1)
    with torch.no_grad():
        probability = model(data.normalize(image[None])).softmax(1).max()
    assert float(rows[3]["probability"]) == pytest.approx(float(probability), abs=1e-5)


def test_predictions_are_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither outputs of predict_step nor whole files of ranks are kept."""
    monkeypatch.setattr("lsoftmax_lightning.callbacks.predictions.MERGED_ROWS", 64)
    written: list[weakref.ref[Tensor]] = []

    class Watched(Sure):
        def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            outputs = super().predict_step(batch, batch_idx)
            written.extend(weakref.ref(tensor) for tensor in outputs.values())
            return outputs

        def on_predict_end(self) -> None:
            gc.collect()

    class Measured(Predictions):
        def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
            tracemalloc.start()
            super().on_predict_end(trainer, pl_module)
            assert tracemalloc.get_traced_memory()[1] < 0.3 * 4 * 2000 * 256
            tracemalloc.stop()

    write_image(Path("one.png"), size=(8, 8))
    Path("photos").mkdir()
    for number in range(2000):
        os.link("one.png", f"photos/{number}.png")
    trainer = make_trainer(callbacks=[Measured("out.csv", embeddings=True)])
    model = Watched(4, "digits", image_shape=(1, 8, 8), backbone_args={"num_features": 256})
    trainer.predict(model, Blobs("photos"), return_predictions=False)
    assert len(written) == 5 * 100
    assert sum(tensor() is not None for tensor in written) <= 5  # of the last batch
    assert [row["path"] for row in read("out.csv")] == sorted(f"photos/{number}.png" for number in range(2000))
    embeddings = np.load("out.npy")
    assert embeddings.shape == (2000, 256)
    assert (embeddings == embeddings[0]).all()  # of one image


def test_verification_module_writes_only_embeddings() -> None:
    torch.manual_seed(0)
    model = VerificationModule(4, "digits", image_shape=(1, 8, 8))
    make_trainer(callbacks=[Predictions("faces.csv", embeddings=True)]).predict(
        model, Blobs(), return_predictions=False
    )
    assert list(read("faces.csv")[0]) == ["index"]
    assert len(np.load("faces.npy")) == 50


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_small_probabilities_are_written_exactly(kind: str) -> None:
    values = torch.logspace(-30, 30, 50)
    predict_outputs(f"out.{kind}", *({"probability": part} for part in values.split(25)))
    rows = read("out.csv") if kind == "csv" else parquet.read_table("out.parquet").to_pylist()
    assert torch.equal(torch.tensor([float(row["probability"]) for row in rows]), values)


def test_columns_keep_the_order_of_the_first_batch() -> None:
    a, b = torch.zeros(25), torch.ones(25)
    predict_outputs("out.csv", {"b": b, "a": a}, {"a": a, "b": b})
    assert {(row["a"], row["b"]) for row in read("out.csv")} == {("0", "1")}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["x"], ["x", "y"], "x (float), y (float) after x (float)"),
        (["x", "y"], ["x"], "x (float) after x (float), y (float)"),
    ],
)
def test_other_columns_in_a_later_batch_are_an_error(first: list[str], second: list[str], message: str) -> None:
    with pytest.raises(InputError, match="must return the same 1-D outputs in every batch") as caught:
        predict_outputs("out.csv", *(dict.fromkeys(names, torch.ones(25)) for names in (first, second)))
    assert message in str(caught.value)


def test_other_dtype_in_a_later_batch_is_an_error() -> None:
    with pytest.raises(InputError, match=r"got x \(integer\) after x \(float\)"):
        predict_outputs("out.parquet", {"x": torch.ones(25)}, {"x": torch.ones(25, dtype=torch.int64)})
    with pytest.raises(InputError, match=r"got x \(float\) after x \(integer\)"):
        predict_outputs("out.parquet", {"x": torch.ones(25, dtype=torch.bool)}, {"x": torch.ones(25)})


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"x": ["a"] * 25}, r"must return a dict of tensors, got \{'x': 'list'\}"),
        ({}, "must return a dict of tensors, got dict"),
        (torch.ones(25), "must return a dict of tensors, got Tensor"),
        ({"x": torch.ones(()), "y": torch.ones(25)}, r"a row for each image .* got the shapes \{'x': \(\), 'y'"),
        ({"x": torch.ones(25), "y": torch.ones(())}, "a row for each image"),
        ({"x": torch.ones(25), "y": torch.ones(24)}, "a row for each image"),
        ({"x": torch.ones(24)}, "a row for each image of the batch, got 24 rows for 25 images"),
        ({"x": torch.ones(50)}, "a row for each image of the batch, got 50 rows for 25 images"),
        ({"index": torch.ones(25)}, "must not return `index`, the name of the first column"),
        ({"x": torch.ones(25), "path": torch.ones(25)}, "must not return `path`"),
    ],
)
def test_outputs_without_a_row_for_each_image_are_an_error(outputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^predict_step: Outputs .*{message}"):
        predict_outputs("out.csv", outputs, outputs)
    assert not list(Path().glob("*out*"))


def test_names_of_the_training_data_are_written_for_a_plain_dataloader() -> None:
    model = ClassificationModule(4, "digits", image_shape=(1, 8, 8))
    model.data_spec = DataSpec(class_names=("a", "b", "c", "d"))
    model.top_k = 3
    trainer = make_trainer(callbacks=[Predictions("out.csv", top_k=2)])
    trainer.predict(model, DataLoader(torch.rand(5, 1, 8, 8)), return_predictions=False)
    rows = read("out.csv")
    assert {row["prediction"] for row in rows} <= {"a", "b", "c", "d"}
    assert "prediction_2" in rows[0]
    assert "prediction_3" not in rows[0]
    assert model.top_k == 3


@pytest.mark.parametrize("missing", ["prediction", "angle"])
def test_max_angle_needs_the_angle_of_the_predicted_class(missing: str) -> None:
    outputs = {name: torch.ones(25) for name in ("prediction", "angle", "x") if name != missing}
    trainer = make_trainer(callbacks=[Predictions("out.csv", max_angle=60)])
    data = Blobs()
    data.batch_size = 25
    with pytest.raises(InputError, match=f"predictions.max_angle: needs `{missing}` from predict_step of Outputs"):
        trainer.predict(Outputs(outputs), data, return_predictions=False)


@pytest.mark.parametrize("shapes", [[(25,), (25,)], [(25, 3, 4), (25, 3, 4)], [(25, 3), (25, 4)]])
def test_embedding_of_wrong_shape_is_an_error(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"^predict_step: Outputs must return `embedding` as \(N, D\)"):
        predict_outputs("out.csv", *({"embedding": torch.ones(shape)} for shape in shapes), embeddings=True)


def test_paths_and_class_names_are_those_of_the_current_data() -> None:
    write_folder(Path("photos"), count=10)
    trainer, model = make_trainer(callbacks=[Predictions("out.csv")]), make_model()
    trainer.predict(model, Blobs("photos"), return_predictions=False)
    assert "path" in read("out.csv")[0]
    trainer.predict(model, torch.utils.data.DataLoader(torch.ones(5, 1, 8, 8)), return_predictions=False)
    rows = read("out.csv")
    assert [row["index"] for row in rows] == list("01234")
    assert {row["prediction"] for row in rows} <= set("0123")


def test_several_dataloaders_are_an_error() -> None:
    class Two(Sure):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
            return super().predict_step(batch, batch_idx)

    loaders = [torch.utils.data.DataLoader(torch.ones(5, 1, 8, 8)) for _ in range(2)]
    with pytest.raises(InputError, match=r"^predictions: need a single dataloader, got 2"):
        make_trainer(callbacks=[Predictions("out.csv")]).predict(Two(4, "digits", image_shape=(1, 8, 8)), loaders)


def predict_in_folders() -> None:
    folder = Path(os.environ["RANK"])
    folder.mkdir()
    os.chdir(folder)
    predict("out.csv")


def test_folder_that_ranks_do_not_share_is_an_error() -> None:
    done = run_on(2, predict_in_folders)
    assert "predictions.output: all ranks must share the folder of out.csv, got no ." in done.stderr


def test_invalid_output_or_input_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^predictions\.output: must end in .* got x"):
        Predictions("x.txt")
    with pytest.raises(InputError, match=r"^predictions\.output: without a logger there is no folder of the run"):
        predict(None)
    Path("folder.csv").mkdir()
    with pytest.raises(InputError, match=r"^predictions\.output: must be a file, got the folder folder\.csv"):
        predict("folder.csv")
    write_folder(Path("photos"))
    Path("photos/broken.png").write_text("no image")
    with pytest.raises(DataError, match=r"^photos/broken\.png is not a readable image"):
        predict("x.csv", predict_folder="photos")
    assert not list(Path().glob("x.*"))
    with pytest.raises(DataError, match=r"^nowhere cannot be read: No such file or directory\."):
        predict("x.csv", predict_folder="nowhere")
    Path("empty").mkdir()
    with pytest.raises(DataError, match="must contain images, also in subfolders, got none"):
        predict("x.csv", predict_folder="empty")
    Path("empty", os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(DataError, match="is not UTF-8: rename it"):
        predict("x.csv", predict_folder="empty")

    class Other(type(make_model())):  # type: ignore[misc]
        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return 3

    trainer = make_trainer(callbacks=[Predictions("x.csv")])
    with pytest.raises(InputError, match=r"^predict_step: Other must return a dict of tensors, got int"):
        trainer.predict(Other(4, "digits", image_shape=(1, 8, 8)), Blobs(), return_predictions=False)


def test_workers_end_even_if_the_error_is_kept() -> None:
    write_folder(Path("photos"))
    Path("photos/broken.png").write_text("no image")
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        predict("x.csv", predict_folder="photos")
    assert caught.tb is not None
    assert set(multiprocessing.active_children()) <= before


KEPT = """
from pathlib import Path
from tests.callbacks.test_predictions import Blobs, write_folder
write_folder(Path("photos"))
data = Blobs("photos")
data.setup("predict")
batches = iter(data.predict_dataloader())
next(batches)
"""


@pytest.mark.slow
def test_python_exits_while_images_are_read() -> None:
    subprocess.run([sys.executable, "-c", KEPT], check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1"]


def test_csv_safe_quotes_formulas_and_keeps_numbers() -> None:
    assert csv_safe(FORMULAS) == [f"'{text}" for text in FORMULAS]
    kept = [-1, -0.5, "-0.500000", "+3", "-1e-3", "a=1", "", "'a", None, True]
    assert csv_safe(kept) == kept
    for text in [*FORMULAS, "'=1", "''=1", "'", "a=1", "'a", "-3"]:
        assert list(map(from_csv_safe, csv_safe([text]))) == [text]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_formulas_in_class_names_and_paths_are_quoted_only_in_csv(kind: str) -> None:
    class Formulas(Blobs):
        class_names = ("=1+1", "@a", "-b", "+c")

    write_folder(Path("=photos"), count=3)
    trainer = make_trainer(callbacks=[Predictions(f"out.{kind}")])
    trainer.predict(Sure(4, "digits", image_shape=(1, 8, 8)), Formulas("=photos"), return_predictions=False)
    rows = read("out.csv") if kind == "csv" else parquet.read_table("out.parquet").to_pylist()
    quote = "'" if kind == "csv" else ""
    assert [row["path"] for row in rows] == sorted(f"{quote}{path}" for path in Path("=photos").rglob("*.png"))
    assert {row["prediction"] for row in rows} <= {quote + name for name in Formulas.class_names}


@pytest.mark.parametrize("name", ["out/here.csv", "out/here.parquet"])
@pytest.mark.parametrize("limit", ["part of the rows", "rows", "part of the embeddings", "embeddings"])
def test_full_disk_is_an_error_and_keeps_the_previous_output(name: str, limit: str) -> None:
    predict(name)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    rows, embeddings = (Path(name).with_suffix(suffix).stat().st_size for suffix in (Path(name).suffix, ".npy"))
    # without embeddings the rows are the largest file; with them, they are smaller
    sizes = {
        "part of the rows": 100,
        "rows": rows - 1,
        "part of the embeddings": embeddings // 2,
        "embeddings": embeddings - 1,
    }
    match = rf"^predictions\.output: {name} cannot be written \(.*; free some space or choose another file\.$"
    with file_size_limit(sizes[limit]), pytest.raises(RunError, match=match) as caught:
        predict(name, embeddings="embeddings" in limit)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_unwritable_folder_is_an_error() -> None:
    with pytest.raises(RunError, match=r"^predictions\.output: /proc/out/here\.csv cannot be written"):
        predict("/proc/out/here.csv")


class KilledAtTheEnd(Predictions):
    def _merge_embeddings(self, rank_files: list[Path], path: Path) -> None:
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class KilledInABatch(Predictions):
    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(trainer, *args, **kwargs)
        if trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("callback", [KilledInABatch, KilledAtTheEnd])
def test_killed_prediction_leaves_no_output_and_the_next_one_cleans_up(
    callback: type[Predictions], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "Predictions", callback)
        done = run_on(count, partial(predict, "out/here.csv"))
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in Path("out").iterdir()}
    assert len(left) >= 2  # of the killed process; another rank may remove its own
    assert all(name.startswith(".") for name in left)
    predict("out/here.csv")
    assert {path.name for path in Path("out").iterdir()} == {"here.csv", "here.npy"}
    assert len(read("out/here.csv")) == 50
