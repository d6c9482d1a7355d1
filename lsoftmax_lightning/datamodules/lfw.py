"""Faces: training on folders of identities, verification on the pairs of LFW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from ..errors import DataError, InputError
from ..pairs import Pairs
from .base import Images
from .files import FileDataModule, Files, class_folders, list_files
from .images import special_kind

_SPACED = re.compile(r"([^\t]+?) +(\d+) +(?:([^\t]+?) +)?(\d+)")  # a pair without tabs


class Pair(NamedTuple):
    """Two images as person and number, and the fold they are of, from 1."""

    first: tuple[str, int]
    second: tuple[str, int]
    fold: int

    @property
    def people(self) -> set[str]:
        """One name, or two."""
        return {self.first[0], self.second[0]}


def read_pairs(path: Path) -> list[Pair]:
    """Reads LFW's ``pairs.txt``.

    The first line has the number of folds and that of pairs of either kind in each; then, for each fold, come lines
    ``person n1 n2`` of same pairs and ``person n1 other n2`` of different ones, separated by tabs, or by spaces in
    lines without a tab.

    Raises:
        DataError: If the file is missing or not of this form, or a pair comes twice.
    """
    if not path.is_file():
        raise DataError(f"{path.absolute()} is not there; it is LFW's list of pairs, to lie beside the folder images.")
    try:
        header, *lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    match header.split():
        case [folds_, count_] if folds_.isdecimal() and count_.isdecimal() and int(folds_) and int(count_):
            folds, count = int(folds_), int(count_)
        case _:
            raise DataError(
                f"{path}: the first line must be the number of folds and that of pairs of a kind, such as '10 300', "
                f"got {header!r}."
            )
    pairs: list[Pair] = []
    seen: dict[frozenset[tuple[str, int]], int] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        pair = _pair(line, fold=len(pairs) // (2 * count) + 1, same=len(pairs) % (2 * count) < count)
        if pair is None:
            raise DataError(f"{path}, line {number}: no pair of the kind that belongs here: {line.strip()!r}.")
        key = frozenset(pair[:2])
        if key in seen:
            raise DataError(f"{path}, line {number}: the pair of line {seen[key]} again: {line.strip()!r}.")
        seen[key] = number
        pairs.append(pair)
    if len(pairs) != 2 * folds * count:
        raise DataError(f"{path}: the first line announces {folds} x 2 x {count} pairs, but {len(pairs)} follow.")
    return pairs


def _pair(line: str, fold: int, same: bool) -> Pair | None:
    """The pair of a line, if it is of this kind."""
    spaced = _SPACED.fullmatch(line.strip())
    match [field for field in spaced.groups() if field] if spaced else line.strip().split("\t"):
        case [person, first, second] if same and first.isdecimal() and second.isdecimal() and int(first) != int(second):
            return Pair((person, int(first)), (person, int(second)), fold)
        case [person, first, other, second] if (
            not same and first.isdecimal() and second.isdecimal() and person != other
        ):
            return Pair((person, int(first)), (other, int(second)), fold)
    return None


class PairsDataModule(FileDataModule):
    """What verification on LFW has in common, whoever is trained on; a subclass sets the attributes.

    Validation and test batches are (images, image indices), each image once; the pairs refer to these indices.

    Args:
        root: Folder of LFW: ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg``, or of another image format,
            aligned like the training images.
        image_size: Side of the square images, or height and width. An image is scaled to cover that and its middle cut
            out.
        **kwargs: As :class:`FileDataModule`; pairs need their images, ``skip_unreadable`` or not.

    Attributes:
        train_files: The images to train on; ``val_files`` and ``test_files`` those of the pairs.
        val_pairs: Pairs of the validation images.
        test_pairs: Pairs of the test images. Pairs of fold 0 only fit the threshold and the PCA.

    Raises:
        DataError: If files are missing, or ``pairs.txt`` is damaged.
        InputError: If a setting is out of range.
    """

    train_files: Files
    val_files: Files
    test_files: Files
    val_pairs: Pairs
    test_pairs: Pairs

    def __init__(self, root: str, image_size: int | tuple[int, int] = (112, 96), **kwargs: Any) -> None:
        super().__init__(image_size, **kwargs)
        self.root = Path(root)
        self.pairs = read_pairs(self.root / "pairs.txt")

    def index_images(self, pairs: Sequence[Pair]) -> tuple[Files, Pairs]:
        """Return the images of pairs, each once, and the pairs as indices of these images.

        Raises:
            DataError: If an image is missing, or a FIFO, a socket or a device.
        """
        image_ids: dict[tuple[str, int], int] = {}
        for pair in pairs:
            image_ids.setdefault(pair.first, len(image_ids))
            image_ids.setdefault(pair.second, len(image_ids))
        files = _image_files(self.root / "images", {person for person, _ in image_ids})
        names = [f"{person}/{person}_{number:04d}" for person, number in image_ids]
        paths = [files.get(name, self.root / "images" / f"{name}.jpg") for name in names]
        missing = [path for path in paths if not path.is_file()]
        for path in missing:
            if kind := special_kind(path):
                raise DataError(f"{path} is {kind}, not an image: replace it.")
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} images that pairs.txt names are not there, such as {missing[0]}."
            )
        indexed = Pairs(
            first=torch.tensor([image_ids[pair.first] for pair in pairs]),
            second=torch.tensor([image_ids[pair.second] for pair in pairs]),
            same=torch.tensor([len(pair.people) == 1 for pair in pairs]),
            fold=torch.tensor([pair.fold for pair in pairs]),
        )
        return Files(paths, list(range(len(paths))), needed=True), indexed

    def load_train_val(self) -> tuple[Images, Images]:
        """Reads all parts, the test images too, so that one error before any work names all bad files."""
        self._check_train_size(self.train_files.targets)
        train_data, val_data, self.test_data = self.read(self.train_files, self.val_files, self.test_files)
        return self._checked(train_data), val_data

    def load_test(self) -> Images:
        """Reads the test images."""
        (test_data,) = self.read(self.test_files)
        return test_data


class LFWDataModule(PairsDataModule):
    """Trains on a folder of identities (CASIA-WebFace, say), validates and tests on the 6,000 pairs of LFW.

    All pairs are in both parts: watch the figures of validation, but choose no checkpoint by them. Identities that
    are people of LFW by name are told in a warning; where folders have numbers for names, as CASIA-WebFace's often do,
    its absence means nothing.

    Args:
        train_root: Folder of ``<identity>/*``.
        root: Folder of LFW: ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg``.
        **kwargs: As :class:`PairsDataModule`.
    """

    def __init__(self, train_root: str, root: str = "data/lfw", **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        folders = class_folders(Path(train_root))
        self.class_names = tuple(folder.name for folder in folders)
        self.train_files = list_files(folders)
        self.val_files, self.val_pairs = self.test_files, self.test_pairs = self.index_images(self.pairs)
        people = {_plain(person) for pair in self.pairs for person in pair.people}
        known = [name for name in self.class_names if _plain(name) in people]
        if known:
            rank_zero_warn(
                f"{len(known)} of {len(folders)} identities in {train_root} are people of LFW by name, such as "
                f"{', '.join(known[:3])}: figures on LFW will not be those of unseen people. Take these folders away."
            )


class LFWFoldDataModule(PairsDataModule):
    """Trains on people of LFW itself and tests on the pairs of one fold: no outside data.

    The network trains on all images of the people of the nine other folds, whose pairs also fit threshold and PCA. It
    is validated on these too, people it has seen, which says little. With a ``val_fold`` it trains on those of eight,
    and validation, threshold and PCA are of the pairs of the ninth: people as new to the network as those of the test,
    so a setting or a checkpoint can be chosen by them.

    Args:
        root: Folder of LFW: ``pairs.txt`` and ``images/<Person>/<Person>_<nnnn>.jpg``.
        fold: The fold to test on, from 1.
        val_fold: A fold to hold out from training. In validation its ten parts stand for folds, though they share
            people.
        **kwargs: As :class:`PairsDataModule`.

    Raises:
        DataError: If files are missing, or ``pairs.txt`` is damaged.
        InputError: If a setting is out of range.
    """

    def __init__(self, root: str = "data/lfw", fold: int = 10, val_fold: int | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        folds = self.pairs[-1].fold
        for name, number in (("fold", fold), ("val_fold", val_fold)):
            if number is not None and not 1 <= number <= folds:
                raise InputError(f"{name} must be one of the {folds} of pairs.txt, got {number}.")
        if fold == val_fold or folds < 3:
            raise InputError(f"fold and val_fold must differ and leave some of the {folds}, got {fold} and {val_fold}.")
        test = [pair for pair in self.pairs if pair.fold == fold]
        val = [pair for pair in self.pairs if pair.fold != fold and val_fold in (None, pair.fold)]
        self.test_files, self.test_pairs = self.index_images([*(pair._replace(fold=0) for pair in val), *test])
        if val_fold is not None:
            val = [pair._replace(fold=number % 10 + 1) for number, pair in enumerate(val)]
        self.val_files, self.val_pairs = self.index_images(val)
        held_out = {person for pair in self.pairs if pair.fold in (fold, val_fold) for person in pair.people}
        self.class_names = tuple(sorted({person for pair in self.pairs for person in pair.people} - held_out))
        self.train_files = list_files([self.root / "images" / person for person in self.class_names])


def _image_files(root: Path, people: Iterable[str]) -> dict[str, Path]:
    """Return the files of people by ``<Person>/<name>`` without its extension, of which Pillow must know the format."""
    extensions = Image.registered_extensions()
    folders = [root / person for person in people if (root / person).is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if path.suffix.lower() in extensions]
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(files, reverse=True)}


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")
