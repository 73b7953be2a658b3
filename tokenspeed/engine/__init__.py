"""The engine: model, memory, generation, text, and the command line (`python -m tokenspeed.engine --help`)."""
