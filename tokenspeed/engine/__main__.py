"""The command line: `tokenspeed`, or `python -m tokenspeed.engine`."""

import argparse
import os
import sys

from .. import __version__
from .bench import engine as bench
from .checkpoint import resolve
from .commands import chat, generate, info, route, serve
from .commands.options import engine_settings
from .config import EngineConfig
from .errors import TokenSpeedError
from .executor.ranks import follow


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenspeed", description="Qwen3.5 inference for agents.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, chat, bench, serve, route, info):
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 for an error that is explained, 130 for Ctrl-C."""
    options = build_parser().parse_args(arguments, argparse.Namespace(environment=os.environ))
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started the ranks, and brings them together
            options.rendezvous, rank = "env://", int(os.environ["RANK"])
            if rank > 0:
                follow(resolve(options.model, options.load_format), EngineConfig(**engine_settings(options)), rank)
                return 0
        return options.run(options)
    except TokenSpeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `generate | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
