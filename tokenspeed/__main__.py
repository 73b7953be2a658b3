"""`tokenspeed`, `python -m tokenspeed`: the engine's command line, or a sentence about what it lacks."""

import sys

from . import missing_package


def main() -> int:
    try:
        from .engine.__main__ import main as run

        return run()
    except ModuleNotFoundError as error:
        if (error.name or "tokenspeed").partition(".")[0] == "tokenspeed":
            raise
        print(f"error: this command is the engine's: {missing_package(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
