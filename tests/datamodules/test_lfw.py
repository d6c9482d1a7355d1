"""Pairs of LFW: parsing, people to train on, and errors for damaged files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lsoftmax_lightning.datamodules import LFWDataModule, LFWFoldDataModule
from lsoftmax_lightning.datamodules.lfw import PairsDataModule, read_pairs
from lsoftmax_lightning.errors import DataError, InputError

from ..helpers.formats import pairs_text, write_image, write_lfw

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}


def named_pairs(data: PairsDataModule, part: str) -> list[tuple[str, str, bool, int]]:
    """Return pairs with the names of their images."""
    files, pairs = {"val": (data.val_files, data.val_pairs), "test": (data.test_files, data.test_pairs)}[part]
    rows = zip(*(column.tolist() for column in (pairs.first, pairs.second, pairs.same, pairs.fold)), strict=True)
    return [(files.paths[a].stem, files.paths[b].stem, same, fold) for a, b, same, fold in rows]


def test_pairs_equal_those_of_the_file(tmp_path: Path) -> None:
    write_lfw(tmp_path / "lfw", folds=2)
    for number in range(5):
        write_image(tmp_path / "faces" / f"identity {number % 2}" / f"{number}.jpg")
    data = LFWDataModule(str(tmp_path / "faces"), str(tmp_path / "lfw"), **SMALL)
    assert data.class_names == ("identity 0", "identity 1")
    expected = [
        ("Person_0A_0001", "Person_0A_0002", True, 1),
        ("Person_0B_0001", "Person_0B_0002", True, 1),
        ("Person_0A_0001", "Person_0B_0002", False, 1),
        ("Person_0C_0001", "Person_0D_0002", False, 1),
        ("Person_1A_0001", "Person_1A_0002", True, 2),
        ("Person_1B_0001", "Person_1B_0002", True, 2),
        ("Person_1A_0001", "Person_1B_0002", False, 2),
        ("Person_1C_0001", "Person_1D_0002", False, 2),
    ]
    assert named_pairs(data, "test") == named_pairs(data, "val") == expected
    data.setup("fit")
    assert data.train_data.targets.tolist() == [0, 0, 0, 1, 1]
    assert data.val_data.targets.tolist() == list(range(12))  # the pairs name 12 distinct images
    assert torch.equal(torch.cat([numbers for _, numbers in data.test_dataloader()]), torch.arange(12))


@pytest.mark.parametrize(("fold", "val_fold"), [(1, None), (4, None), (2, 1), (4, 2)])
def test_people_of_a_fold_are_held_out(fold: int, val_fold: int | None, tmp_path: Path) -> None:
    write_lfw(tmp_path, folds=4, count=3)
    write_image(tmp_path / "images" / "Person_2A" / "Person_2A_0003.jpg")  # in no pair, and still used for training
    write_image(tmp_path / "images" / "Nobody" / "Nobody_0001.jpg")  # of no known fold, and not used for training
    data = LFWFoldDataModule(str(tmp_path), fold, val_fold, **SMALL)
    trained_on = {number for name in data.class_names for number in (int(name[7]) + 1,)}
    assert trained_on == {1, 2, 3, 4} - {fold, val_fold}
    paths = {path for person in data.class_names for path in (tmp_path / "images" / person).iterdir()}
    assert set(data.train_files.paths) == paths

    # the name of a person contains the index of their fold
    for first, second, _, number in named_pairs(data, "test"):
        assert int(first[7]) + 1 == int(second[7]) + 1 == (number or int(first[7]) + 1)
        assert (number == 0) == (int(first[7]) + 1 != fold)
        assert number or val_fold in (None, int(first[7]) + 1)
    validated = {(int(name[7]) + 1, number) for *pair, _, number in named_pairs(data, "val") for name in pair}
    if val_fold is None:
        assert validated == {(number, number) for number in trained_on}
    else:
        assert validated == {(val_fold, part) for part in range(1, 7)}  # of its six pairs

    data.setup("fit")
    assert len(data.val_data.targets) == len(data.val_files.paths)
    assert len(data.test_data.targets) == len(data.test_files.paths)
    # the parts share one store of images
    assert data.train_data.images.store is data.val_data.images.store is data.test_data.images.store
    assert len(data.train_data.images.store) == len(paths | set(data.test_files.paths))


def test_test_pairs_keep_their_fold(tmp_path: Path) -> None:
    write_lfw(tmp_path, folds=4)
    for val_fold, fitted in ((None, 12), (3, 4)):
        folds = LFWFoldDataModule(str(tmp_path), 2, val_fold, **SMALL).test_pairs.fold
        assert ((folds == 0).sum(), (folds == 2).sum(), len(folds)) == (fitted, 4, fitted + 4)


def test_person_of_two_folds_is_not_used_for_training(tmp_path: Path) -> None:
    write_lfw(tmp_path, folds=4)
    text = (tmp_path / "pairs.txt").read_text()
    (tmp_path / "pairs.txt").write_text(text.replace("Person_0A\t1\tPerson_0B\t2", "Person_3A\t1\tPerson_0B\t2"))
    assert "Person_3A" not in LFWFoldDataModule(str(tmp_path), 4, **SMALL).class_names


@pytest.mark.parametrize("fold", [0, 4, -1])
def test_invalid_folds_are_rejected(fold: int, tmp_path: Path) -> None:
    write_lfw(tmp_path)
    with pytest.raises(InputError, match=f"^fold: must be one of the 3 folds of pairs.txt, got {fold}"):
        LFWFoldDataModule(str(tmp_path), fold, **SMALL)
    with pytest.raises(InputError, match=f"^val_fold: must be one of the 3 folds of pairs.txt, got {fold}"):
        LFWFoldDataModule(str(tmp_path), 1, fold, **SMALL)
    with pytest.raises(InputError, match=r"^fold and val_fold: must differ, .*, got 2, 2 and 3 folds"):
        LFWFoldDataModule(str(tmp_path), 2, 2, **SMALL)


def test_training_identities_that_are_in_lfw_are_reported(tmp_path: Path) -> None:
    write_lfw(tmp_path / "lfw")
    for name in ("person 1a", "Person_2B", "Somebody"):
        write_image(tmp_path / "faces" / name / "0.jpg")
    with pytest.warns(UserWarning, match=r"2 of 3 identities in .*faces are people of LFW by name, such as P"):
        LFWDataModule(str(tmp_path / "faces"), str(tmp_path / "lfw"), **SMALL)


def test_crlf_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(pairs_text())
    expected = read_pairs(path)
    assert len(expected) == 12
    path.write_bytes(pairs_text().replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert read_pairs(path) == expected


def test_pairs_may_be_separated_by_spaces(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(pairs_text())
    expected = read_pairs(path)
    path.write_text(pairs_text().replace("\t", "  "))
    assert read_pairs(path) == expected
    for separator in ("\t", " "):  # names may contain spaces
        path.write_text(pairs_text().replace("Person_", "A Person ").replace("\t", separator))
        assert [pair[:2] for pair in read_pairs(path)] == [
            tuple((name.replace("Person_", "A Person "), image) for name, image in pair[:2]) for pair in expected
        ]


@pytest.mark.parametrize("extension", [".png", ".JPG", ".jpeg"])
def test_images_may_be_of_any_format(extension: str, tmp_path: Path) -> None:
    write_lfw(tmp_path)
    for path in list(tmp_path.rglob("*.jpg")):
        if extension == ".png":
            write_image(path.with_suffix(extension), size=(96, 112))
            path.unlink()
        else:
            path.rename(path.with_suffix(extension))
    data = LFWFoldDataModule(str(tmp_path), 1, **SMALL)
    data.setup("fit")
    assert {path.suffix for path in data.test_files.paths + data.train_files.paths} == {extension}


def test_an_image_with_two_extensions_is_an_error(tmp_path: Path) -> None:
    write_lfw(tmp_path)
    write_image(tmp_path / "images" / "Person_0A" / "Person_0A_0001.png", size=(96, 112))
    with pytest.raises(
        DataError, match=r"/Person_0A: .* got Person_0A_0001.jpg and Person_0A_0001.png; remove all but"
    ):
        LFWFoldDataModule(str(tmp_path), 1, **SMALL)


def test_byte_order_mark_is_ignored_and_other_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(pairs_text(), encoding="utf-8-sig")
    assert len(read_pairs(path)) == 12
    path.write_text(pairs_text(), encoding="utf-16")
    with pytest.raises(DataError, match="is not text in UTF-8"):
        read_pairs(path)


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "the first line must be the number of folds"),
        (replace("3\t2\n", ""), r"the first line must be .* got 'Person_0A\\t1\\t2'"),
        (replace("3\t2", "300"), "the first line must be .* got '300'"),
        (replace("3\t2", "4\t2"), "must have 4 x 2 x 2 pairs by its first line, got 12"),
        (replace("3\t2", "-3\t2"), "the first line must be"),
        (replace("3\t2", "3\t0"), "the first line must be"),
        (lambda text: "0\t300\n", "the first line must be"),
        (replace("3\t2", "3\t3"), r"line 4: must be a pair 'person n1 n2', got 'Person_0A\\t1\\tPerson_0B\\t2'"),
        (replace("Person_0B\t1\t2", "Person_0B\t1\ttwo"), "line 3: must be a pair 'person n1 n2'"),
        (replace("Person_0B\t1\t2", "Person_0B\t1\t1"), "line 3: must be a pair 'person n1 n2'"),
        (replace("Person_0B\t1\t2", "Person_0B 1"), "line 3: must be a pair 'person n1 n2'"),
        (replace("Person_0B\t1\t2", "Person_0B 1\t2"), "line 3: must be a pair 'person n1 n2'"),
        (replace("\t1\tPerson_0B", "\t1\tPerson_0A"), "line 4: must be a pair 'person n1 other n2'"),
        (replace("Person_0B\t1\t2", "Person_0A\t2\t1"), "line 3: repeats the pair of line 2"),
        (replace("Person_0C\t1\tPerson_0D\t2", "Person_0B\t2\tPerson_0A\t1"), "line 5: repeats the pair of line 4"),
        (lambda text: text + "Person_0A\t1\t2\n", "line 14: repeats the pair of line 2"),
        (lambda text: text[:-30], r"line 12: must be a pair 'person n1 other n2', got 'Person_2A\\t1\\tPerson'"),
        (lambda text: text.rsplit("\n", 2)[0], "must have 3 x 2 x 2 pairs by its first line, got 11"),
    ],
)
def test_damaged_pairs_txt_raises_data_error(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    write_lfw(tmp_path)
    (tmp_path / "pairs.txt").write_text(change(pairs_text()))
    with pytest.raises(DataError, match=message):
        LFWFoldDataModule(str(tmp_path), 1, **SMALL)


def test_missing_and_unreadable_images_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lfw/pairs.txt: the file does not exist"):
        LFWFoldDataModule(str(tmp_path / "lfw"), 1, **SMALL)
    write_lfw(tmp_path)
    image = tmp_path / "images" / "Person_0A" / "Person_0A_0002.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:300])
    with pytest.raises(DataError, match=r"Person_0A_0002.jpg: .*\nReplace them; pairs.txt requires them"):
        LFWFoldDataModule(str(tmp_path), 1, skip_unreadable=True, **SMALL).setup("fit")
    image.unlink()
    with pytest.raises(DataError, match=r"1 of \d+ images in pairs.txt .* such as .*Person_0A_0002.jpg"):
        LFWFoldDataModule(str(tmp_path), 1, **SMALL)
    image.write_bytes(content)
    unused = tmp_path / "images" / "Person_1A" / "Person_1A_0003.jpg"
    unused.write_bytes(b"")
    with pytest.warns(UserWarning, match="Skipping 1 of"):
        LFWFoldDataModule(str(tmp_path), 1, skip_unreadable=True, **SMALL).setup("fit")
