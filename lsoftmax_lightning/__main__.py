"""``python -m lsoftmax_lightning``, and the command ``lsoftmax_lightning``."""

import os
import sys

from .cli import main


def run() -> None:
    """Runs the command line; what :func:`main` returns would be taken for an exit code.

    The command finds modules in the working directory, as ``python -m`` does.
    """
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    main()


if __name__ == "__main__":
    run()
