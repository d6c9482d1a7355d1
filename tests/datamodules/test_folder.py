"""Folders of images: reading, errors, and equality of images in memory and in files."""

import io
import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from lsoftmax_lightning.datamodules import ImageFolderDataModule, LFWDataModule, LFWFoldDataModule
from lsoftmax_lightning.datamodules.images import ImageSubset, files_in, read_image
from lsoftmax_lightning.errors import DataError, InputError

from ..helpers.formats import write_folder, write_image, write_lfw
from ..helpers.training import make_model, make_trainer


def make(root: Path, **settings: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(**{"root": str(root), "image_size": 8, "batch_size": 4, "num_workers": 0} | settings)


def test_folders_define_classes_and_splits(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = make(tmp_path, val_size=4)
    assert (data.class_names, data.num_classes, data.image_shape) == (("blue", "red"), 2, (3, 8, 8))
    data.setup("fit")
    parts = (data.train_data, data.val_data, data.test_data)
    assert [part.targets.bincount().tolist() for part in parts] == [[8, 8], [2, 2], [10, 10]]
    for stored, targets in parts:
        images = stored[torch.arange(len(stored))]
        assert images.dtype == torch.uint8
        assert (images[targets == 1].amin(dim=(0, 2, 3)) == torch.tensor([250, 0, 0])).all()
        assert (images[targets == 0].amax(dim=(0, 2, 3)) == torch.tensor([0, 0, 250])).all()


def test_val_folder_is_used(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train", "test"))
    write_folder(tmp_path, ("val",), count=3)
    data = make(tmp_path)
    data.setup("fit")
    assert [len(part.targets) for part in (data.train_data, data.val_data, data.test_data)] == [20, 6, 20]


def test_training_on_a_folder_learns(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = make(tmp_path, crop_padding=1, flip=True)
    trainer = make_trainer(max_epochs=3)
    model = make_model(num_classes=2, image_shape=data.image_shape)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_and_memory_give_the_same_batches(num_workers: int, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        write_image(path, (number * 10, 5, 5))
    found = []
    for memory_gib in (1, 0):
        data = make(tmp_path, crop_padding=2, flip=True, memory_gib=memory_gib, num_workers=num_workers)
        data.setup("fit")
        assert isinstance(data.train_data.images, ImageSubset) == bool(memory_gib)
        found.append([data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()])
    assert len(found[0]) == 4
    for (images, targets), (same_images, same_targets) in zip(*found, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_memory_budget_counts_all_images(tmp_path: Path) -> None:
    write_folder(tmp_path)
    size = 40 * 3 * 8 * 8 / 2**30
    for memory_gib, in_memory in ((size, True), (size * 0.999, False)):
        data = make(tmp_path, memory_gib=memory_gib)
        data.setup("fit")
        assert isinstance(data.test_data.images, ImageSubset) == in_memory


def test_augmentation_is_reproducible_and_new_each_epoch(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = make(tmp_path, crop_padding=2, flip=True)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 0, 1):
        loader.sampler.set_epoch(epoch)
        torch.rand(1)  # the draws do not come from the global generator
        epochs.append(torch.cat([draws for _, _, draws in loader]))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_loading_does_not_change_the_random_state(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = make(tmp_path, crop_padding=2)
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    make(tmp_path).setup("fit")
    assert torch.equal(torch.get_rng_state(), before)


def saved(path: Path, image: Image.Image, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


def test_every_image_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = Image.new("RGB", (12, 10), (200, 100, 50))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    for path in (
        saved(tmp_path / "rgb.bmp", colour),
        saved(tmp_path / "rgb.webp", colour, lossless=True),
        saved(tmp_path / "rgba.png", Image.new("RGBA", (12, 10), (200, 100, 50, 0))),
        saved(tmp_path / "palette.png", palette),
        saved(tmp_path / "see-through.png", palette, transparency=b"\x00" * 3),
    ):
        image = read_image(path, (8, 6))
        assert (image.dtype, image.shape) == (torch.uint8, (3, 8, 6))
        assert image[:, 4, 3].tolist() == [200, 100, 50], path
    for mode, values in (("L", [90] * 3), ("1", [255] * 3), ("LA", [90] * 3)):
        fill: Any = {"L": 90, "1": 1, "LA": (90, 10)}[mode]
        path = saved(tmp_path / f"{mode}.png", Image.new(mode, (12, 10), fill))
        assert read_image(path, (8, 6))[:, 4, 3].tolist() == values
    cmyk = saved(tmp_path / "cmyk.jpg", colour.convert("CMYK"), quality=100)
    assert (read_image(cmyk, (8, 6))[:, 4, 3] - torch.tensor([200, 100, 50])).abs().max() < 5


def test_image_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 255  # the middle square
    path = saved(tmp_path / "wide.png", Image.fromarray(wide))
    assert read_image(path, (20, 20))[:, 5:15, 5:15].min() > 200
    assert torch.equal(read_image(path, (10, 40)), torch.from_numpy(wide).permute(2, 0, 1))


def test_large_photograph_is_read_as_if_fully_decoded(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:900, :1200]
    scene = np.stack([rows % 256, columns // 5, (rows + columns) // 9], axis=2).astype(np.uint8)
    path = saved(tmp_path / "large.jpg", Image.fromarray(scene), quality=95)
    with Image.open(path) as image:
        whole = pil_to_tensor(ImageOps.fit(image, (60, 40)))
    assert (read_image(path, (40, 60)).float() - whole).abs().mean() < 2


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    sideways = np.zeros((8, 8, 3), dtype=np.uint8)
    sideways[:, :4] = 255  # left of the file, top of the scene
    path = saved(tmp_path / "photo.png", Image.fromarray(sideways), exif=exif)
    upright = read_image(path, (8, 8))
    assert upright[:, :4].min() == 255
    assert upright[:, 4:].max() == 0


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_every_exif_orientation_equals_pillow(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene = np.zeros((16, 16, 3), dtype=np.uint8)
    scene[:8, :8], scene[8:, :8] = (250, 0, 0), (0, 0, 250)
    settings = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path / f"photo.{suffix}", Image.fromarray(scene), exif=exif, **settings)
    with Image.open(path) as image:
        expected = pil_to_tensor(ImageOps.exif_transpose(image))
    assert torch.equal(read_image(path, (16, 16)), expected)


def exif_data(*tags: bytes, end: bytes = b"") -> bytes:
    """Return little-endian EXIF data with tags of 12 bytes each, followed by ``end``."""
    return b"Exif\x00\x00II*\x00" + struct.pack("<LH", 8, len(tags)) + b"".join(tags) + end


TURNED = struct.pack("<HHLL", 0x0112, 3, 1, 6)  # an orientation that swaps the sides


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"Exif\x00\x00" + b"garbage" * 5, False),
        (b"no EXIF data", False),
        (b"Exif\x00\x00", False),
        (exif_data(struct.pack("<HHLL", 0x0112, 99, 1, 6)), False),
        (exif_data(struct.pack("<HHLL", 0x0112, 3, 1, 77)), False),
        (exif_data(TURNED, struct.pack("<HHLL", 0x010F, 2, 4000, 99999)), True),
        (exif_data(TURNED, struct.pack("<HHLL", 0x927C, 7, 10**6, 50)), True),
        (exif_data(TURNED, struct.pack("<HHLL", 0x8769, 4, 1, 2**30)), True),
        (exif_data(TURNED, struct.pack("<HHLL", 0x8769, 4, 1, 8)), True),  # a directory that contains itself
        (exif_data(TURNED, struct.pack("<HHLL", 0x011A, 5, 1, 60), end=b"\x00" * 9), True),
        (exif_data(TURNED, b"\x10\x01\x02"), True),
        (exif_data(struct.pack("<HHLHH", 0x0112, 3, 2, 6, 6)), True),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_data_are_ignored(exif: bytes, turned: bool, suffix: str, tmp_path: Path) -> None:
    scene = np.zeros((16, 16, 3), dtype=np.uint8)
    scene[:, :8] = 255
    path = saved(tmp_path / f"photo.{suffix}", Image.fromarray(scene), exif=exif)
    image = read_image(path, (16, 16))  # warnings are errors here
    bright = image[:, :7] if turned else image[:, :, :7]
    assert bright.min() > 240


def test_the_first_of_several_images_in_a_file_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 100, 50)), Image.new("RGB", (8, 8), (0, 0, 255))
    for suffix in ("mpo", "gif", "webp", "png"):
        path = saved(tmp_path / f"several.{suffix}", first, save_all=True, append_images=[second])
        assert (read_image(path, (8, 8))[:, 4, 4] - torch.tensor([200, 100, 50])).abs().max() < 9, suffix
    path = saved(tmp_path / "profile.jpg", first, icc_profile=b"garbage", quality=100)
    assert (read_image(path, (8, 8))[:, 4, 4] - torch.tensor([200, 100, 50])).abs().max() < 5


def damaged(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    if kind == "deep":
        Image.fromarray(noise[..., 0].astype(np.uint16)).save(buffer, "PNG")
        return buffer.getvalue()
    Image.fromarray(noise).save(buffer, "PNG" if kind == "broken" else "JPEG")
    data = buffer.getvalue()
    return {
        "truncated": data[: len(data) // 2],
        "broken": data[:60] + b"\x00" * 40 + data[100:],
        "text": b"notes",
        "empty": b"",
    }[kind]


DAMAGES = ("truncated", "broken", "text", "empty", "deep")


@pytest.mark.parametrize("memory_gib", [1, 0])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_of_all_parts_are_reported_in_one_error(
    memory_gib: float, num_workers: int, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    for part in ("train", "test"):
        for kind in DAMAGES:
            (tmp_path / part / "red" / f"{kind}.jpg").write_bytes(damaged(kind))
    (tmp_path / "test" / "blue" / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match="11 of 51 files are not readable images") as caught:
        make(tmp_path, memory_gib=memory_gib, num_workers=num_workers).setup("fit")
    for part in (str(tmp_path / "train" / "red" / "deep.jpg"), "more than 8 bits", "...", "skip_unreadable"):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


def test_workers_end_after_a_reading_error(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "red" / "bad.jpg").write_bytes(b"")
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="1 of 41 files") as caught:
        make(tmp_path, num_workers=2).setup("fit")
    assert caught.tb  # refers to the iterator of the workers
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("memory_gib", [1, 0])
def test_skip_unreadable_skips_files_with_a_warning(memory_gib: float, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for kind in DAMAGES:
        (tmp_path / "train" / "red" / f"{kind}.jpg").write_bytes(damaged(kind))
    (tmp_path / "test" / "blue" / "00.png").write_bytes(b"")
    data = make(tmp_path, memory_gib=memory_gib, skip_unreadable=True)
    with pytest.warns(UserWarning, match="Skipping 6 of 46 files that are not readable images"):
        data.setup("fit")
    assert len(data.train_data.targets) + len(data.val_data.targets) == 20
    images, targets = data.test_data
    assert len(images) == len(targets) == 20
    everything = images[torch.arange(20)]
    assert (everything[targets == 0].amax(dim=(0, 2, 3)) == torch.tensor([0, 0, 250])).all()
    for batch in data.train_dataloader():
        assert len(batch[0]) == 4


def test_folder_layout_is_checked_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone/train: the folder does not exist"):
        make(tmp_path / "gone")
    write_folder(tmp_path, ("train",))
    with pytest.raises(DataError, match="test: the folder does not exist"):
        make(tmp_path)
    write_folder(tmp_path, ("test",))
    write_image(tmp_path / "test" / "green" / "0.png")
    with pytest.raises(DataError, match=r"missing: \[\], too many: \['green'\]"):
        make(tmp_path)
    (tmp_path / "test" / "green").rename(tmp_path / "train" / "green")
    with pytest.raises(DataError, match=r"missing: \['green'\], too many: \[\]"):
        make(tmp_path)
    (tmp_path / "train" / "green" / "0.png").rename(tmp_path / "stray.png")
    (tmp_path / "test" / "green").mkdir()
    with pytest.raises(DataError, match=r"these are empty: .*train/green"):
        make(tmp_path)
    (tmp_path / "train" / "red" / "inner").mkdir()
    for part in ("train", "test"):
        (tmp_path / part / "green").rmdir()
    with pytest.raises(DataError, match=r"must contain only images, got the folders .*red/inner; remove them"):
        make(tmp_path)
    (tmp_path / "train" / "red" / "inner").rmdir()
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "red" / ".DS_Store").touch()
    make(tmp_path).setup("fit")
    (tmp_path / "stray.png").rename(tmp_path / "train" / "stray.png")
    with pytest.raises(DataError, match=r"train: must contain only class folders, got stray.png; remove"):
        make(tmp_path)


def test_single_class_is_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "red" / "0.png")
    with pytest.raises(DataError, match="must contain at least two class folders"):
        make(tmp_path)


def test_skipping_must_leave_an_image_of_each_class(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in (tmp_path / "test" / "red").iterdir():
        path.write_bytes(b"")
    data = make(tmp_path, skip_unreadable=True)
    with (
        pytest.warns(UserWarning, match="Skipping 10"),
        pytest.raises(DataError, match=r"got 1 without, as .*test/red"),
    ):
        data.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": (8, -1)}, "image_size"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"mean": (124.0, 116.0, 104.0)}, "mean"),
        ({"val_size": float("inf")}, "val_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"memory_gib": -1}, "memory_gib"),
        ({"memory_gib": float("nan")}, "memory_gib"),
        ({"crop_padding": -1}, "crop_padding: must be from 0 to 7 pixels, below the shorter side of the image, got -1"),
        ({"batch_size": 0}, "batch_size"),
        ({"image_size": 10**9}, "image_size: must have at most"),
        ({"image_size": (1, 10**9)}, "image_size: must have at most"),
        ({"num_workers": 10**6}, "num_workers: must be at most 1024"),
        ({"crop_padding": 10**9}, "crop_padding: must be from 0 to 7 pixels"),
        ({"crop_padding": 4, "image_size": (64, 4)}, "crop_padding: must be from 0 to 3 pixels"),
        ({"val_size": 0}, "val_size"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match=message):
        make(tmp_path, **settings)


def test_linked_folders_are_visited_once() -> None:
    write_folder(Path("photos"), ("a", "b"), count=2)
    write_image(Path("other/o.png"))
    expected = sorted([*map(str, Path("photos").rglob("*.png")), "photos/first/o.png"])
    for link, folder in (
        ("a/0", "../b"),
        ("a/up", ".."),
        ("b/up", ".."),
        ("first", "../other"),
        ("second", "../other"),
    ):
        Path("photos", link).symlink_to(folder)
    Path("other/back").symlink_to("../photos")
    start = time.monotonic()
    assert files_in("photos") == expected
    assert time.monotonic() - start < 5
    assert len(files_in("photos/a/up")) == len(expected)


def bind_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def link_device(path: str) -> None:
    os.symlink("/dev/zero", path)


@pytest.mark.parametrize(
    ("kind", "create"), [("a FIFO", os.mkfifo), ("a device", link_device), ("a socket", bind_socket)]
)
def test_special_files_are_rejected_before_reading(kind: str, create: Callable[[str], None]) -> None:
    write_folder(Path("images"))
    write_lfw(Path("lfw"))
    person = "Person_0A"
    reads: list[tuple[str, Callable[[], object]]] = [
        ("images/train/red/x.png", lambda: make(Path("images"), skip_unreadable=True)),
        ("images/train/x", lambda: make(Path("images"))),
        ("images/test/blue/x.png", lambda: files_in("images")),
        (f"lfw/images/{person}/x.jpg", lambda: LFWFoldDataModule("lfw", 2, image_size=8)),
        ("lfw/images/x", lambda: LFWDataModule("lfw/images", "lfw")),
    ]
    for path, read in reads:
        create(path)
        with pytest.raises(DataError, match=f"^{path} is {kind}, not an image: remove it"):
            read()
        with pytest.raises(ValueError, match=f"it is {kind}"):
            read_image(path, (8, 8))
        Path(path).unlink()
    pair = Path(f"lfw/images/{person}/{person}_0001.jpg")
    pair.unlink()
    os.mkfifo(pair)
    with pytest.raises(DataError, match=f"^{pair} is a FIFO, not an image"):
        LFWDataModule("images/train", "lfw")


@pytest.mark.parametrize("path", [b"train/caf\xe9", b"train/red/caf\xe9.png", b"test/blue/caf\xe9.png"])
def test_names_that_are_not_utf8_are_rejected_before_reading(path: bytes) -> None:
    write_folder(Path("images"))
    Path("images", os.fsdecode(path)).mkdir()
    with pytest.raises(DataError, match=r"^the name of 'images/.*caf\\udce9.*' is not UTF-8: rename it\.$"):
        make(Path("images"))


def test_link_to_itself_is_rejected() -> None:
    write_folder(Path("images"))
    Path("images/train/red/loop").symlink_to("loop")
    for read in (lambda: make(Path("images")), lambda: files_in("images")):
        with pytest.raises(
            DataError, match=r"^images/train/red/loop cannot be read: Too many levels of symbolic links"
        ):
            read()
