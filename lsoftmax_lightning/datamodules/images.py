"""Where images are kept: in memory, or in files of any kind and size."""

from __future__ import annotations

import os
import stat
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..errors import DataError

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""


class ImageStore(Protocol):
    """What images may be kept in: a tensor, or anything that an index tensor makes into one."""

    def __len__(self) -> int:
        """How many images there are."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images [N, C, H, W] for an index [N]."""


class ImageSubset:
    """Some images of a store, without a copy of them.

    Args:
        store: All images, ``(M, ...)``.
        rows: Indices of the subset's images in the store, ``(N,)``.
        paths: File of each image of the subset, where there are files.
    """

    def __init__(self, store: ImageStore, rows: Tensor, paths: Sequence[str | Path] = ()) -> None:
        self.store, self.rows, self.paths = store, rows, paths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.store[self.rows[index]]


def read_image(path: str | Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Reads a file, turned as its EXIF data say, scaled to cover ``size`` and cropped to its middle.

    Grey images and palettes become colours, or all become grey; what is transparent loses its transparency; an
    animation gives its first frame. Damaged EXIF data are ignored.

    Args:
        path: A file of any format that Pillow reads.
        size: Height and width.
        channels: 3 for colours, 1 for grey.

    Returns:
        uint8 [channels, height, width].

    Raises:
        ValueError: If a pixel has more than 8 bits a channel, of which Pillow would keep the wrong ones; or if the path
            is a FIFO, a socket or a device.
        Exception: Whatever the decoder raises on a damaged file.
    """
    if kind := special_kind(path):
        raise ValueError(f"it is {kind}")
    with _without_metadata_warnings(), Image.open(path) as image:
        image.draft("RGB", (2 * max(size),) * 2)  # a JPEG much larger than that is decoded at a fraction of its size
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
        upright = _upright(image)
        if "transparency" in upright.info:  # of a palette, which Pillow converts in two steps
            upright = upright.convert("RGBA")
        pixels: Tensor = pil_to_tensor(ImageOps.fit(upright.convert("RGB" if channels == 3 else "L"), size[::-1]))
    return pixels


@contextmanager
def _without_metadata_warnings() -> Iterator[None]:
    """Ignore what Pillow warns of in EXIF data, of which only the orientation matters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as the orientation in its EXIF data says; damaged EXIF data leave it as it is stored."""
    image.load()  # a TIFF is turned here, and its orientation removed
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the parser raises whatever it meets
        return image
    return image if turn is None else image.transpose(turn)


class ImageFiles:
    """Images read from their files whenever a batch asks for them.

    Args:
        paths: The files.
        image_shape: Channels, height and width of the images, as :func:`read_image` makes them.
    """

    def __init__(self, paths: Sequence[str | Path], image_shape: tuple[int, int, int]) -> None:
        self.paths, self.image_shape = paths, image_shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._read(self.paths[i]) for i in index.tolist()])

    def _read(self, path: str | Path) -> Tensor:
        channels, *size = self.image_shape
        try:
            return read_image(path, (size[0], size[1]), channels)
        except Exception as error:  # decoders raise whatever they meet in a damaged file
            raise DataError(f"{path} is no readable image: {error or type(error).__name__}") from error


def select(images: ImageStore, index: Tensor) -> ImageStore:
    """Return the images at ``index``; only images in a plain tensor are copied.

    Args:
        images: Images, ``(M, ...)``.
        index: Indices of the images to select, ``(N,)``.
    """
    if isinstance(images, Tensor):
        return images[index]
    if isinstance(images, ImageFiles):
        return ImageFiles([images.paths[i] for i in index.tolist()], images.image_shape)
    if isinstance(images, ImageSubset):
        paths = [images.paths[i] for i in index.tolist()] if images.paths else ()
        return ImageSubset(images.store, images.rows[index], paths)
    return ImageSubset(images, index)


def files_in(folder: str | Path) -> list[str]:
    """List the files in a folder and in the folders below it, sorted; hidden ones are left out.

    Links to folders are followed. Each folder is visited once, under its own path if it is not reached by links alone.

    Raises:
        DataError: If there are no files, a folder cannot be read, an entry is not a file, or a name is not UTF-8.
    """
    files: list[str] = []
    folders, links = [os.fspath(folder)], deque[str]()
    visited: set[tuple[int, int]] = set()
    while folders or links:
        place = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for entry in visible_entries(place):
                if not entry.is_dir():
                    files.append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    folders.append(entry.path)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    if not files:
        raise DataError(f"there is no image in {Path(folder).absolute()}, nor in a folder in it.")
    return sorted(files)


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List the files, folders and links in a folder, sorted by name; hidden ones are left out.

    Raises:
        DataError: If a name is not UTF-8, or an entry is a FIFO, a socket or a device.
        OSError: If the folder cannot be read.
    """
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        try:
            entry.path.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the name of {entry.path!a} is not UTF-8: rename it.") from error
        if not entry.is_dir() and not entry.is_file() and (kind := special_kind(entry.path)):
            raise DataError(f"{entry.path} is {kind}, not an image: remove it.")
    return entries


_SPECIAL_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def special_kind(path: str | Path) -> str | None:
    """Return what ``path`` is if it is neither a file nor a folder; opening it could block forever."""
    try:
        return _SPECIAL_KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:  # a broken link, which opening reports
        return None
