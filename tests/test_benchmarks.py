"""Benchmarks run; their measurements are not checked."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from .helpers.forked import run_on
from .helpers.formats import write_image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_benchmarks_run_on_a_cpu(tmp_path: Path) -> None:
    parts = ["ceilings", "waits", "exactness", "determinism", "steps", "fit", "head", "chunks", "commands", "training"]
    for part in ("train", "test"):
        for label in range(10):
            for index in range(10):
                write_image(
                    tmp_path / "cifar10" / part / str(label) / f"{index}.png", (20 * label, 100, index), (32, 32)
                )

    def measure() -> None:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        sys.argv = ["gpu.py", "--dry", f"--out={tmp_path}", f"--cifar10={tmp_path / 'cifar10'}"]
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")

    done = run_on(1, measure, lambda rank, count, port: {})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found.keys() == {"machine", *parts}
    assert [row[1] for row in found["waits"]["rows"]] == ["no"] * 5
    assert all(len(row) == len(found["fit"]["header"]) and float(row[1]) > 0 for row in found["fit"]["rows"])
    whole, resumed, comparison = found["commands"]["rows"]
    assert whole[1] == resumed[1]
    assert comparison[1] == "same bits"
    [training] = found["training"]["rows"]
    assert training[1].endswith("%")
