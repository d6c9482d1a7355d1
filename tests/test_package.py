"""Wheel in an environment without a checkout."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*args: str | Path) -> str:
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


DATA_FILES = {"py.typed", "configs/digits.yaml", "compare/paper_accuracies.yaml"}


def test_data_files_of_the_wheel_exist() -> None:
    package = ROOT / "lsoftmax_lightning"
    assert all((package / name).is_file() or (ROOT / name).is_file() for name in DATA_FILES)
    settings = (ROOT / "pyproject.toml").read_text()
    assert '[tool.hatch.build.targets.wheel.force-include]\nconfigs = "lsoftmax_lightning/configs"' in settings


@pytest.mark.slow
def test_wheel_is_complete_and_passes_docker_without_sh() -> None:
    call(sys.executable, "-m", "build", "-o", "dist", ROOT)
    files = sorted(Path("dist").iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    assert "WARNING" not in call(sys.executable, "-m", "twine", "check", "--strict", *files)
    names = set(zipfile.ZipFile(files[0]).namelist())
    assert {f"lsoftmax_lightning/{name}" for name in DATA_FILES} <= names
    assert not {name for name in names if name.startswith(("tests", "docs", "benchmarks"))}
    with tarfile.open(files[1]) as archive:
        for name in ("/tests/test_package.py", "/lsoftmax_lightning/compare/paper_accuracies.yaml"):
            assert any(path.endswith(name) for path in archive.getnames())

    # an environment with the dependencies of the test environment and without the checkout
    call(sys.executable, "-m", "venv", "venv")
    python = Path("venv/bin/python").absolute()
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", files[0])
    Path("empty").mkdir()
    printed = call("bash", "-c", f"cd empty && {ROOT / 'docker' / 'without.sh'} {python.parent.parent}")
    assert printed.endswith("== all steps succeeded\n")
    assert (site / "lsoftmax_lightning" / "configs").is_dir()
