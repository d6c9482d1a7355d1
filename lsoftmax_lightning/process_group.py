"""Destruction of the default process group."""

import sys
import time


def leave_process_group() -> None:
    """Destroy a gloo process group, whose threads may otherwise abort the process at its exit.

    Lightning destroys only NCCL process groups.
    """
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        # torch 2.6 holds the GIL while it joins the threads, which may need the GIL to free the last tensors
        time.sleep(0.1)
        dist.destroy_process_group()
