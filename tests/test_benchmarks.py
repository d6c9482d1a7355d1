"""Benchmarks run; what they measure is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_measurements_of_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    parts = ["ceilings", "waits", "exactness", "determinism", "steps", "fit", "head", "chunks"]
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *parts, "--dry", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found.keys() == {"machine", *parts}
    assert [row[1] for row in found["waits"]["rows"]] == ["no"] * 5
    assert all(len(row) == len(found["fit"]["header"]) and float(row[1]) > 0 for row in found["fit"]["rows"])
