"""The wheel, as somebody has it who has no checkout."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def call(*args: str | Path) -> str:
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_is_whole_and_does_what_the_images_do() -> None:
    call(sys.executable, "-m", "build", "-o", "dist", ROOT)
    files = sorted(Path("dist").iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    assert "WARNING" not in call(sys.executable, "-m", "twine", "check", "--strict", *files)
    names = set(zipfile.ZipFile(files[0]).namelist())
    data_files = {"py.typed", "configs/digits.yaml", "compare/paper_accuracies.yaml"}
    assert {f"lsoftmax_lightning/{name}" for name in data_files} <= names
    assert not {name for name in names if name.startswith(("tests", "docs", "benchmarks"))}
    with tarfile.open(files[1]) as archive:
        for name in ("/tests/test_package.py", "/lsoftmax_lightning/compare/paper_accuracies.yaml"):
            assert any(path.endswith(name) for path in archive.getnames())

    # an environment that has what it depends on, from the one that runs the tests, and no checkout
    call(sys.executable, "-m", "venv", "venv")
    python = Path("venv/bin/python").absolute()
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", files[0])
    Path("empty").mkdir()
    printed = call("bash", "-c", f"cd empty && {ROOT / 'docker' / 'without.sh'} {python.parent.parent}")
    assert printed.endswith("== all of it works\n")
    assert (site / "lsoftmax_lightning" / "configs").is_dir()
