"""``python -m lsoftmax_lightning``, and the command ``lsoftmax_lightning``."""

from .cli import main


def run() -> None:
    """Runs the command line; what :func:`main` returns would be taken for an exit code."""
    main()


if __name__ == "__main__":
    run()
