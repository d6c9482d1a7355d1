"""Files with random damage are read or raise a DataError that names them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from lsoftmax_lightning.datamodules import CIFAR10DataModule, ImageFolderDataModule, MNISTDataModule
from lsoftmax_lightning.datamodules.lfw import read_pairs
from lsoftmax_lightning.errors import DataError

from ..helpers.formats import pairs_text, write_cifar, write_folder, write_mnist

FORMATS = ["bmp", "gif", "jpg", "png", "ppm", "tga", "tiff", "webp"]


@st.composite
def mess(draw: st.DrawFn, whole: bytes) -> bytes:
    """Change, remove or insert some bytes of a file, more often at its beginning."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, 40), st.integers(0, len(whole))))
        lost = draw(st.sampled_from([0, 1, 1, 1, 4, 100, len(whole)]))
        new = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\xff\xff\xff\xff", b"\x00", b"\x7f", b"\t", b"\n"]))
        )
        content = content[:at] + new + content[at + lost :]
    return content


def message(read: Callable[[], object]) -> str:
    """Return the message of a DataError, empty if there is none."""
    try:
        read()
    except DataError as error:
        return str(error)
    return ""


def examples(test: Callable[..., None]) -> Callable[..., None]:
    return settings(
        max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(test)


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow about files that it reads
@examples
@given(data=st.data())
def test_damaged_images_raise_data_error(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "train" / "red"
    if not folder.exists():
        write_folder(tmp_path / "images", ("train", "val", "test"), count=1)
    for previous in folder.glob("damaged.*"):
        previous.unlink()
    kind = data.draw(st.sampled_from(FORMATS))
    path = folder / f"damaged.{kind}"
    Image.linear_gradient("L").resize((12, 10)).convert("RGB").save(path)
    path.write_bytes(data.draw(mess(path.read_bytes())))
    module = ImageFolderDataModule(str(tmp_path / "images"), image_size=8, batch_size=2, num_workers=0)
    problem = message(lambda: module.setup("fit"))
    assert str(path) in problem if problem else len(module.train_data.images) == 3


@examples
@given(data=st.data())
def test_damaged_lists_of_pairs_raise_data_error(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes(data.draw(mess(pairs_text().encode())))
    problem = message(lambda: read_pairs(path))
    if problem:
        assert str(path) in problem
        return
    folds, count = map(int, path.read_text().split("\n")[0].split())
    pairs = read_pairs(path)
    assert [pair.fold for pair in pairs] == [fold for fold in range(1, folds + 1) for _ in range(2 * count)]
    assert all(person in path.read_text() for pair in pairs for person in pair.people)


def rejects(module: Any, path: Path, content: bytes) -> bool:
    """Return whether a datamodule rejects a file with this content; the file is restored afterwards."""
    whole = path.read_bytes()
    path.write_bytes(content)
    problem = message(lambda: module.setup("fit")) or message(lambda: module.setup("test"))
    path.write_bytes(whole)
    assert not problem or problem.startswith(("cannot read", f"{type(module).__name__}: "))
    return bool(problem)


@examples
@given(data=st.data())
def test_damaged_mnist_files_raise_data_error(data: st.DataObject, tmp_path: Path) -> None:
    if not (tmp_path / "MNIST").exists():
        write_mnist(tmp_path, train=100, test=10)
    path = data.draw(st.sampled_from(sorted((tmp_path / "MNIST" / "raw").iterdir())))
    module = MNISTDataModule(str(tmp_path), batch_size=4)
    if not rejects(module, path, data.draw(mess(path.read_bytes()))):
        assert (len(module.train_data.images), len(module.val_data.images), len(module.test_data.images)) == (
            90,
            10,
            10,
        )


@examples
@given(data=st.data())
def test_damaged_cifar_files_raise_data_error(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / CIFAR10.base_folder
    if not folder.exists():
        write_cifar(tmp_path, monkeypatch)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = data.draw(mess(path.read_bytes()))
    changed = content != path.read_bytes()
    assert rejects(CIFAR10DataModule(str(tmp_path), batch_size=4), path, content) == changed  # detected by the checksum
