"""TokenSpeed: operators and a thin inference engine for the Qwen3.5 family.

`tokenspeed.ops` needs torch alone; the names below are the engine's, imported when first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from .engine.llm import LLM, AsyncLLM
    from .engine.request import SamplingParams

_ENGINE = {"LLM": "llm", "AsyncLLM": "llm", "SamplingParams": "request"}


def __getattr__(name: str) -> Any:
    if name not in _ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f".engine.{_ENGINE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} is the engine's: {missing_package(error)}") from error


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install, in a sentence."""
    extra = (
        "server"
        if error.name in ("fastapi", "starlette", "uvicorn", "uvloop", "zmq", "prometheus_client")
        else "engine"
    )
    return f"it needs {error.name}, which is not installed; `pip install 'qwen-tokenspeed[{extra}]'` brings it."
