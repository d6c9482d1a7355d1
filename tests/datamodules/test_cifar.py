"""CIFAR10 and CIFAR100 in their original format, and errors for damaged files."""

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.functional import pil_to_tensor

from lsoftmax_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from lsoftmax_lightning.errors import DataError

from ..helpers.formats import write_cifar
from ..helpers.training import make_model, make_trainer


@pytest.mark.parametrize(
    ("kind", "reader", "classes", "sizes"),
    [(CIFAR10DataModule, CIFAR10, 10, (180, 20, 40)), (CIFAR100DataModule, CIFAR100, 100, (900, 100, 1000))],
)
def test_cifar_reads_its_format(
    kind: Any, reader: Any, classes: int, sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch, reader)
    data = kind(str(tmp_path))
    assert (data.num_classes, data.image_shape, len(set(data.class_names))) == (classes, (3, 32, 32), classes)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    parts = (data.train_data, data.val_data, data.test_data)
    assert tuple(len(part.targets) for part in parts) == sizes
    raw = reader(tmp_path, train=False)
    image, target = raw[7]
    assert target == data.test_data.targets[7]
    assert torch.equal(data.test_data.images[7], pil_to_tensor(image))


def test_class_names_are_in_label_order() -> None:
    # both datasets index their classes alphabetically
    assert list(CIFAR10DataModule.class_names) == sorted(CIFAR10DataModule.class_names)
    assert list(CIFAR100DataModule.class_names) == sorted(CIFAR100DataModule.class_names)


def test_cifar10plus_augments_only_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    data = CIFAR10DataModule(str(tmp_path), batch_size=20, crop_padding=4, flip=True)
    seen: dict[str, list[torch.Tensor]] = {"train": [], "other": []}
    normalised = data.normalize

    def spy(images: torch.Tensor) -> torch.Tensor:
        seen["train" if data.trainer and data.trainer.training else "other"].append(images)
        return normalised(images)

    data.normalize = spy
    make_trainer(max_epochs=2, num_sanity_val_steps=0).fit(
        make_model(num_classes=10, image_shape=data.image_shape), data
    )
    assert (len(seen["train"]), len(seen["other"])) == (18, 2)
    assert torch.equal(seen["other"][0], data.val_data.images)
    originals = {image.numpy().tobytes() for image in data.train_data.images}
    left_alone = sum(image.numpy().tobytes() in originals for batch in seen["train"] for image in batch)
    assert left_alone < 18 * 20 / 20  # one in 162 is neither moved nor mirrored


@pytest.mark.parametrize("damage", ["wrong checksum", "truncated", "missing", "no folder"])
def test_damaged_or_missing_cifar10_raises_data_error(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    write_cifar(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    if damage == "wrong checksum":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    data = CIFAR10DataModule(str(tmp_path / "elsewhere" if damage == "no folder" else tmp_path))
    for read in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(DataError, match="cannot read CIFAR10") as caught:
            read()
        for part in (data.root, "cifar-10-batches-py", "--data.root"):
            assert part in str(caught.value)


def test_other_content_with_the_right_checksum_raises_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "train_list", CIFAR10.test_list * 2 + [["batches.meta", CIFAR10.meta["md5"]]])
    with pytest.raises(DataError, match="cannot read CIFAR10"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")
