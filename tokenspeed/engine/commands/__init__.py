"""The subcommands of `python -m tokenspeed.engine`."""
