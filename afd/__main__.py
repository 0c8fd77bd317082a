"""`afd`, and `python -m afd`, which is the same."""

import sys


def main() -> None:
    """The SDK comes without what the command line needs."""
    try:
        from afd.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"afd: the command line needs {error.name}, which is not installed: pip install 'afd[cli]', or 'afd[mesh]' "
            "to run a mesh on this machine"
        )
    run()


if __name__ == "__main__":
    main()
