"""Entry point of ``python -m lsoftmax_lightning`` and of the command ``lsoftmax_lightning``."""

import os
import sys

from .cli import main


def run() -> None:
    """Run the command line, and discard the result of :func:`main`, which would become the exit code.

    Modules in the working directory can be imported, as with ``python -m``.
    """
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    main()


if __name__ == "__main__":
    run()
