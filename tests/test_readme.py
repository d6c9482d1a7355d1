"""The README's programs run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lsoftmax_lightning.cli import main
from lsoftmax_lightning.compare.plan import Run

README = (Path(__file__).parent.parent / "README.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)```", README, flags=re.DOTALL))


@pytest.mark.parametrize(
    "command",
    [
        ["train.py"],
        ["bare.py"],
        ["-m", "lsoftmax_lightning", "fit", "--config", "my.yaml"],
    ],
    ids=lambda command: command[-1],
)
def test_the_programs_run(command: list[str]) -> None:
    assert set(FILES) == {"my_project.py", "train.py", "my.yaml", "bare.py"}
    for name, text in FILES.items():
        Path(name).write_text(text)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    if command != ["bare.py"]:
        accuracy = re.search(r"test/acc\D*([\d.]+)", done.stdout)
        assert accuracy is not None
        assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize(
    "command",
    re.findall(r"^python -m lsoftmax_lightning (fit .*?)(?: *#.*)?$", README, flags=re.MULTILINE),
)
def test_the_settings_of_the_commands_are_there(command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--print_config"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    "command", re.findall(r"^python -m lsoftmax_lightning (compare --config .*)$", README, re.MULTILINE)
)
def test_the_comparisons_can_be_planned(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Run] = []
    monkeypatch.setattr("lsoftmax_lightning.compare.train", lambda runs, *rest: planned.extend(runs) or {})
    monkeypatch.setattr("lsoftmax_lightning.datamodules.MNISTDataModule.prepare_data", lambda self: None)
    main(command.split())
    assert len(planned) > 4


def test_the_configs_and_files_named_are_there() -> None:
    configs = Path(__file__).parent.parent / "configs"
    for name in re.findall(r"--config (\w+\.yaml)", README):
        assert (configs / name).is_file() or name == "my.yaml"
    for path in re.findall(r"\]\(((?:docs|configs)/[^)]+)\)", README):
        assert (configs.parent / path).is_file()
