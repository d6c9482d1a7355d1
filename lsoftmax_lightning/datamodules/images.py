"""Storage of images: in memory, or in files of any format and size."""

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

_TRANSPOSES: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by its EXIF orientation."""


class ImageStore(Protocol):
    """Interface of image storage: a tensor, or an object that returns a tensor for indices."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images ``(N, C, H, W)`` at indices ``(N,)``."""


class ImageSubset:
    """Subset of a store, without a copy of the images.

    Args:
        store: All images, ``(M, ...)``.
        rows: Indices of the subset's images in the store, ``(N,)``.
        paths: File of each image of the subset; empty if the images are not from files.
    """

    def __init__(self, store: ImageStore, rows: Tensor, paths: Sequence[str | Path] = ()) -> None:
        self.store = store
        self.rows = rows
        self.paths = paths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.store[self.rows[index]]


def read_image(path: str | Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Read an image, turn it upright by its EXIF orientation, scale it to cover ``size`` and crop its centre.

    All images are converted to RGB, or to grey if ``channels`` is 1. Transparency is removed. Only the first frame of
    an animation is read. Damaged EXIF data are ignored.

    Args:
        path: A file of any format that Pillow reads.
        size: Height and width.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8, ``(channels, height, width)``.

    Raises:
        ValueError: If the image has more than 8 bits per channel, which Pillow would convert wrongly, or the path is a
            FIFO, a socket or a device.
        Exception: If the decoder fails on a damaged file; the type depends on the decoder.
    """
    if kind := special_kind(path):
        raise ValueError(f"it is {kind}")
    with _without_metadata_warnings(), Image.open(path) as image:
        image.draft("RGB", (2 * max(size),) * 2)  # decodes a much larger JPEG at reduced size
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
        upright = _upright(image)
        if "transparency" in upright.info:  # a palette, which Pillow must convert in two steps
            upright = upright.convert("RGBA")
        pixels: Tensor = pil_to_tensor(ImageOps.fit(upright.convert("RGB" if channels == 3 else "L"), size[::-1]))
    return pixels


@contextmanager
def _without_metadata_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings about EXIF data, since only the orientation is used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF orientation; return it unchanged if the EXIF data are damaged."""
    image.load()  # turns a TIFF and removes its orientation
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the parser may raise any error
        return image
    return image if transpose is None else image.transpose(transpose)


class ImageFiles:
    """Images that are read from their files each time they are indexed.

    Args:
        paths: File of each image.
        image_shape: Channels, height and width to which :func:`read_image` converts the images.
    """

    def __init__(self, paths: Sequence[str | Path], image_shape: tuple[int, int, int]) -> None:
        self.paths = paths
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._read(self.paths[i]) for i in index.tolist()])

    def _read(self, path: str | Path) -> Tensor:
        channels, height, width = self.image_shape
        try:
            return read_image(path, (height, width), channels)
        except Exception as error:  # decoders may raise any error on a damaged file
            raise DataError(f"{path} is not a readable image: {error or type(error).__name__}") from error


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
    """List the files in a folder and its subfolders, sorted, without hidden ones.

    Links to folders are followed. Each folder is visited once, under its direct path unless only links lead to it.

    Raises:
        DataError: If there are no files, a folder cannot be read, an entry is not a file, or a name is not UTF-8.
    """
    files: list[str] = []
    folders, links = [os.fspath(folder)], deque[str]()
    visited: set[tuple[int, int]] = set()
    while folders or links:
        path = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for entry in visible_entries(path):
                if not entry.is_dir():
                    files.append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    folders.append(entry.path)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    if not files:
        raise DataError(f"{Path(folder).absolute()}: must contain images, also in subfolders, got none; add images.")
    return sorted(files)


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List the files, folders and links in a folder, sorted by name, without hidden ones.

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
    """Return the kind of a path that could block forever when opened, such as a FIFO.

    Returns:
        "a FIFO", "a socket" or "a device"; None for a file, a folder or a broken link.
    """
    try:
        return _SPECIAL_KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:  # a broken link: opening it raises the error
        return None
