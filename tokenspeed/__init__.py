"""TokenSpeed: operators and a thin inference engine for the Qwen3.5 family."""

__version__ = "0.1.0"
