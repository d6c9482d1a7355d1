"""Data specification of a checkpoint: other data are rejected, and prediction and export need no dataset."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lsoftmax_lightning import ClassificationModule, VerificationModule
from lsoftmax_lightning.checkpoints import read, saved_data_spec
from lsoftmax_lightning.cli import main
from lsoftmax_lightning.data_spec import DataSpec
from lsoftmax_lightning.datamodules import LFWFoldDataModule
from lsoftmax_lightning.datamodules.images import ImageFiles
from lsoftmax_lightning.errors import InputError

from .helpers.command_line import QUIET, SHORT, fails
from .helpers.formats import write_folder, write_image, write_lfw, write_mnist
from .helpers.training import BlobsDataModule, make_model, make_trainer

FOLDER = [
    "--config=folder.yaml",
    "--data.root=images",
    "--data.batch_size=8",
    "--data.crop_padding=0",
    "--model.backbone=digits",
]
BEST = "runs/folder/m2-s0/checkpoints/best.ckpt"


class Renamed(BlobsDataModule):
    class_names = ("nw", "ne", "se", "sw")


class Brighter(BlobsDataModule):
    mean = (0.4,)


class Foreign(LightningDataModule):
    """Datamodule without attributes, whose images are normalised."""

    def train_dataloader(self) -> Any:
        samples = [(torch.rand(1, 8, 8), number % 4) for number in range(8)]
        return DataLoader(samples, batch_size=8)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def fit_folder() -> None:
    write_folder(Path("images"))
    main(["fit", *FOLDER, "--data.image_size=8", *SHORT])


def fit_blobs(name: str, data: LightningDataModule | None = None) -> ClassificationModule:
    model, trainer = make_model(), make_trainer()
    trainer.fit(model, data or BlobsDataModule())
    trainer.save_checkpoint(name)
    return model


@pytest.mark.parametrize("is_full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_command_line_rejects_other_data(is_full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Try every command with one change and every change with one command, or all combinations."""
    fit_folder()
    renamed = Path("renamed")
    write_folder(renamed)
    for part in ("train", "test"):
        (renamed / part / "blue").rename(renamed / part / "violet")
    write_folder(Path("more"))
    for part in ("train", "test"):
        write_image(Path("more", part, "green", "0.png"), (0, 250, 0))
    changes = {
        "--data.root=renamed": "class 0 'red' instead of 'blue' and 1 more class names;",
        "--data.root=more": "3 classes instead of 2, class 1 'green' instead of 'red';",
        "--data.image_size=[8,9]": "image_shape (3, 8, 9) instead of (3, 8, 8);",
        "--data.mean=[0.5,0.5,0.5]": "mean (0.5, 0.5, 0.5) instead of (0.485, 0.456, 0.406);",
        "--data.std=[0.5,0.5,0.5]": "std (0.5, 0.5, 0.5) instead of",
    }
    commands = ["test", "validate", "predict", "fit"]
    for index, (change, message) in enumerate(changes.items()):
        for command in commands if is_full or index == 0 else [commands[index % len(commands)]]:
            more = QUIET if command != "fit" else [*SHORT, "--trainer.max_epochs=2"]
            printed = fails(capsys, command, *FOLDER, "--data.image_size=8", change, *more, f"--ckpt_path={BEST}")
            assert f"error: data: must match the data that the network was trained on, got {message}" in printed
    # the class names of an export are those of the checkpoint
    assert "got mean" in fails(capsys, "export", f"--ckpt_path={BEST}", "--data.mean=[0.5,0.5,0.5]")


@pytest.mark.parametrize("checkpoint", [BEST, "best"])
def test_prediction_of_a_folder_needs_no_dataset(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit_folder()
    args = [*FOLDER, "--data.image_size=8", *QUIET, f"--ckpt_path={checkpoint}", "--predictions.output=out.csv"]
    main(["predict", *args])
    expected = [row.split(",", 2)[2] for row in Path("out.csv").read_text().splitlines()]  # without path and label
    Path("images", "test").rename("photos")
    shutil.rmtree("images")
    main(["predict", *args, "--data.predict_folder=photos"])
    assert [row.partition(",")[2] for row in Path("out.csv").read_text().splitlines()] == expected
    memory = ["--data.memory_gib=0", "--data.device_memory_gib=0", "--data.skip_unreadable=true"]
    predicted = main(["predict", *args, "--data.predict_folder=photos", *memory])
    assert predicted is not None
    assert isinstance(predicted.datamodule.predict_data.images, ImageFiles)
    assert predicted.datamodule.device_memory_gib == 0
    message = fails(capsys, "predict", *args, "--data.predict_folder=photos", "--data.image_size=9")
    assert "image_shape (3, 9, 9) instead of (3, 8, 8)" in message
    assert "images/train: the folder does not exist" in fails(capsys, "predict", *args)


def test_a_prediction_of_a_folder_downloads_nothing() -> None:
    write_mnist(Path("data"))
    mnist = ["--config=mnist_1000.yaml", "--data.batch_size=16", "--data.train_size=100"]
    main(["fit", *mnist, *SHORT])
    shutil.rmtree("data")
    write_folder(Path("photos"))
    output = ["--data.predict_folder=photos", "--predictions.output=out.csv"]
    main(["predict", *mnist, *QUIET, "--ckpt_path=last", *output])
    assert len(Path("out.csv").read_text().splitlines()) == 41
    assert not Path("data").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_export_needs_no_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    fit_folder()
    shutil.rmtree("images")
    main(["export", f"--ckpt_path={BEST}", "--format=torch_export"])
    assert "On random images, it differs from the module by at most" in capsys.readouterr().out
    message = fails(capsys, "export", f"--ckpt_path={BEST}", "--format=state_dict", "--output=.")
    assert "output: must be a file, got the folder ." in message
    assert "--ckpt_path: must be a checkpoint of fit, got last, which is not a file" in fails(
        capsys, "export", "--ckpt_path=last"
    )
    extra = {"metadata.json": ""}
    torch.export.load("model.pt2", extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    assert (metadata["class_names"], metadata["mean"]) == (["blue", "red"], [0.485, 0.456, 0.406])


@pytest.mark.parametrize("data", [Renamed(), Brighter()], ids=lambda data: type(data).__name__)
def test_trainer_rejects_other_data(data: BlobsDataModule) -> None:
    model = fit_blobs("some.ckpt")
    loaded = ClassificationModule.load_from_checkpoint("some.ckpt", weights_only=True)
    for evaluated, path in ((model, None), (loaded, None), (make_model(), "some.ckpt")):
        for name in ("validate", "test", "predict"):
            with pytest.raises(InputError, match="data: must match the data that the network was trained on"):
                getattr(make_trainer(), name)(evaluated, data, ckpt_path=path)
            getattr(make_trainer(), name)(evaluated, BlobsDataModule(), ckpt_path=path)
    with pytest.raises(InputError, match="data: must match"):
        make_trainer(max_epochs=2).fit(make_model(), data, ckpt_path="some.ckpt")
    make_trainer(max_epochs=2).fit(make_model(), BlobsDataModule(), ckpt_path="some.ckpt")
    loaded = ClassificationModule.load_from_checkpoint("some.ckpt", weights_only=True)
    make_trainer().fit(loaded, data)  # a new training may start from any weights
    make_trainer().test(loaded, data)


def test_unspecified_data_is_not_compared() -> None:
    fit_blobs("some.ckpt")
    make_trainer().test(make_model(), Foreign(), ckpt_path="some.ckpt")
    make_trainer().test(make_model(), Foreign().test_dataloader(), ckpt_path="some.ckpt")
    fit_blobs("foreign.ckpt", Foreign())
    assert saved_data_spec(read("foreign.ckpt")) is None
    make_trainer().test(make_model(), BlobsDataModule(), ckpt_path="foreign.ckpt")
    old = torch.load("some.ckpt", weights_only=True)
    del old["lsoftmax_lightning"]["data"]
    torch.save(old, "old.ckpt")
    assert saved_data_spec(read("old.ckpt")) is None
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_model(), Renamed(), ckpt_path="old.ckpt")
    trainer.save_checkpoint("new.ckpt")
    assert saved_data_spec(read("new.ckpt")) == DataSpec.from_datamodule(Renamed())


def test_other_classes_are_accepted_in_verification_but_not_in_training(tmp_path: Path) -> None:
    def fold(test: int, val: int) -> LFWFoldDataModule:
        return LFWFoldDataModule(str(tmp_path), test, val, image_size=8, batch_size=8, num_workers=0)

    write_lfw(tmp_path, folds=4, count=4)
    data, other = fold(4, 3), fold(2, 1)
    model = VerificationModule(data.num_classes, "digits", image_shape=data.image_shape)
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(model, data)
    trainer.save_checkpoint("faces.ckpt")
    make_trainer().test(model, other, ckpt_path="faces.ckpt")
    with pytest.raises(InputError, match="got class 0 'Person_2A' instead of 'Person_0A' and 15 more"):
        make_trainer(max_epochs=2).fit(model, other, ckpt_path="faces.ckpt")


def test_class_names_are_stored_as_one_string() -> None:
    names = tuple(f"identity {number}\n\udc80" for number in range(100_000))
    spec = DataSpec(names, (3, 8, 8), (0.5,), (0.1,), "cover")
    model = make_model()
    model.data_spec = spec
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    assert isinstance(checkpoint["lsoftmax_lightning"]["data"], str)
    assert saved_data_spec(checkpoint) == spec


@pytest.mark.parametrize("text", [3, "", "[1]", "{", "[" * 10_000])
def test_damaged_specification_is_rejected(text: Any) -> None:
    with pytest.raises(InputError, match="the checkpoint is damaged: its data specification is not valid"):
        saved_data_spec({"lsoftmax_lightning": {"data": text}})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("class_names", ["a", 1], ("a", "1")),
        ("class_names", 10, ()),
        ("image_shape", torch.Size([3, 8, 8]), (3, 8, 8)),
        ("mean", torch.tensor([0.5]), (0.5,)),
        ("mean", 0.5, ()),
        ("mean", (127.5,), ()),
        ("std", [[0.5], [0.25]], ()),
        ("std", (0,), ()),
        ("resize", lambda image: image, ""),
    ],
)
def test_attributes_of_any_datamodule_are_read_as_plain_values(name: str, value: Any, expected: Any) -> None:
    datamodule = Foreign()
    setattr(datamodule, name, value)
    assert getattr(DataSpec.from_datamodule(datamodule), name) == expected


def test_means_that_differ_by_rounding_are_equal() -> None:
    DataSpec(mean=(0.1 + 0.2,)).check(DataSpec(mean=(torch.tensor(0.3).item(),)))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"dog": 1, "cat": 0}, ("cat", "dog")),
        ({1: "dog", 0: "cat"}, ("cat", "dog")),
        ([b"cat", b"dog"], ("cat", "dog")),
        (torch.tensor([3, 7]), ("3", "7")),
        (["cat", None], ("cat",)),
        ({1: "dog"}, ()),
        ({"cat", "dog"}, ()),  # unordered
    ],
)
def test_class_names_are_in_the_order_of_the_classes(names: Any, expected: tuple[str, ...]) -> None:
    data = Foreign()
    data.class_names = names
    assert DataSpec.from_datamodule(data).class_names == expected


def test_attributes_that_require_setup_are_skipped_before_it() -> None:
    class Late(Foreign):
        @property
        def class_names(self) -> Any:
            raise RuntimeError("call setup first")

    assert DataSpec.from_datamodule(Late()) == DataSpec.from_datamodule(Foreign())


def test_empty_specification_does_not_replace_another() -> None:
    model = make_model()
    model.data_spec = spec = DataSpec(class_names=("a", "b", "c", "d"))
    make_trainer().fit(model, Foreign())
    assert model.data_spec == spec


def test_a_class_without_a_name_is_its_index() -> None:
    model = make_model()
    model.data_spec = DataSpec(("nw",), (1, 8, 8), (0.5,), (0.25,))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[2] = 1
        model.head.weight[0] = -1
    names, _ = model.classify(torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8))
    assert set(names) <= {"nw", "1", "2", "3"}
    assert set(names) - {"nw"}
