"""Where a model is: a directory, a hub id, or the shipped one."""

from pathlib import Path

from .errors import ConfigError
from .quantization import refusal

SHIPPED = Path(__file__).parent.parent / "models" / "tiny_agent"
_TEXT_FILES, _WEIGHTS = ["*.json", "*.jinja"], ["*.safetensors"]


def resolve(model: str | Path | None, load_format: str = "auto") -> Path:
    """The checkpoint's directory. None means the shipped model; a name that is no directory is a hub id, fetched with
    its progress shown, without its weights where load_format is "dummy". Nothing in it is executed. Raises ConfigError
    where there is no such model."""
    if model is None:
        return SHIPPED
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise refusal("GGUF", str(path))
    name = str(model)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ConfigError(f"{name!r} is neither a directory nor a hub id of the form owner/name.")
    # Imported here: it is slow to import, and only a hub id needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = _TEXT_FILES + (_WEIGHTS if load_format == "auto" else [])
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name!r} is not a local directory and could not be fetched from the hub: {reason}"
        ) from None
