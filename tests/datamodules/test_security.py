"""Downloads and pickles are checked before they are opened."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import CIFAR10

from lsoftmax_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule, MNISTDataModule
from lsoftmax_lightning.errors import DataError

from ..helpers.formats import Call, write_cifar


@pytest.mark.parametrize("kind", [CIFAR10DataModule, CIFAR100DataModule, MNISTDataModule])
def test_download_with_a_wrong_checksum_is_not_opened(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(url: str, filename: str, *args: Any) -> None:
        fetched.append(Path(filename))
        with tarfile.open(filename, "w:gz") as archive:
            for name in ("inside", "../outside"):
                archive.add(__file__, name)

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    with pytest.raises(DataError, match="cannot read"):
        kind(str(tmp_path / "data")).prepare_data()
    assert fetched
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= set(fetched)


def test_pickle_with_a_wrong_checksum_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    payload = pickle.dumps(Call())
    (tmp_path / CIFAR10.base_folder / "data_batch_1").write_bytes(payload)
    with pytest.raises(DataError, match="cannot read"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")
    assert not Path("called").exists()
    pickle.loads(payload)
    assert Path("called").exists()
