"""Shipped configs: their length, and the defaults that they omit."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lsoftmax_lightning.cli import CONFIGS, main
from lsoftmax_lightning.config_files import flat

PATHS = sorted(CONFIGS.glob("*.yaml"))
OMITTED_DEFAULTS = {
    "seed_everything": 0,
    "model.lambda_schedule.class_path": "lsoftmax_lightning.schedules.AccuracyFeedback",
    "model.lambda_schedule.gain": 1000.0,
    "model.lambda_schedule.lambda_min": 0.0,
    "data.root": "data",
    "trainer.logger.class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "trainer.logger.save_dir": "runs",
    "trainer.logger.default_hp_metric": False,
}


def settings_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    return flat(yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_is_short_and_omits_only_defaults(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 20
    stated, found = flat(yaml.safe_load(path.read_text())), settings_of(capsys, f"--config={path.name}")
    expected = OMITTED_DEFAULTS | {"trainer.logger.name": path.stem}
    for name in expected.keys() - stated.keys():
        if name in found:  # another schedule has no gain, the digits have no folder
            assert found[name] == expected[name], name
    assert stated.keys() <= found.keys()


def test_run_is_named_after_its_first_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, logger = tmp_path / "mine.yaml", tmp_path / "logger.yaml"
    mine.write_text("trainer: {max_epochs: 3}\n")
    logger.write_text("trainer: {logger: {init_args: {name: chosen}}}\n")
    configs = [f"--config={path}" for path in ("digits", mine, logger)]
    assert settings_of(capsys, *configs[:2])["trainer.logger.name"] == "digits"
    assert settings_of(capsys, *configs)["trainer.logger.name"] == "chosen"
    assert settings_of(capsys, *configs, "--trainer.logger.name=other")["trainer.logger.name"] == "other"
    assert settings_of(capsys)["trainer.logger.name"] == ""
