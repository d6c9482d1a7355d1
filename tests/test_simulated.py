"""A training step on a simulated accelerator: what waits for it, and how many kernels it starts."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch.utils.backend_registration as registration

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch cannot simulate a device"
)


@pytest.fixture(scope="module")
def found() -> Any:
    done = subprocess.run([sys.executable, "-m", "tests.simulated_fit"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["dense", "chunked"])
def test_no_training_step_waits_for_the_device(kind: str, precision: str, found: Any) -> None:
    run = found["runs"][f"{kind} {precision}"]
    assert run["steps"] == 9
    assert run["waits"] == {}


def test_a_wait_is_found(found: Any) -> None:
    (wait,) = found["planted"]["waits"]
    assert wait.startswith("_local_scalar_dense at ")


def test_the_chunked_loss_starts_few_kernels(found: Any) -> None:
    for number, count in enumerate(found["kernels"], start=1):
        assert count <= 65 + 13 * number
