"""Reading a checkpoint's text files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from tokenspeed.engine.errors import ConfigError


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`; raises ConfigError when it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; the checkpoint is incomplete") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises ConfigError when it is missing, half-written or not an object."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON (half-written?): {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """Like `read_json_object`, with {} for a file that is not there."""
    return read_json_object(path) if path.exists() else {}
