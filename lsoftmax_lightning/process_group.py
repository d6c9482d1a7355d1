"""The end of the default process group."""

import sys
import time


def leave_process_group() -> None:
    """Destroy the process group if it is one of gloo, whose threads sometimes abort a process that ends with them.

    Lightning destroys only groups of NCCL.
    """
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        # torch 2.6 holds Python's lock while it joins the threads, which may need it to free the last tensors
        time.sleep(0.1)
        dist.destroy_process_group()
