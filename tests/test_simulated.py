"""Training steps on a simulated accelerator: waits, and number of kernels."""

import json
import subprocess
import sys

import pytest
import torch.utils.backend_registration as registration

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch cannot simulate a device"
)


def test_training_steps_do_not_wait_and_the_chunked_loss_starts_few_kernels() -> None:
    """One test for all, because each process trains again."""
    done = subprocess.run([sys.executable, "-m", "tests.helpers.simulated_fit"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"].keys() == {f"{k} {p}" for k in ("dense", "chunked") for p in ("32-true", "bf16-mixed")}
    for run in found["runs"].values():
        assert run == {"steps": 9, "waits": {}}
    (planted,) = found["planted"]["waits"]
    assert planted.startswith("_local_scalar_dense at ")
    for chunks, kernels in enumerate(found["kernels"], start=1):
        assert kernels <= 90 + 15 * chunks
