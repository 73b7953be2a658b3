"""From a checkpoint directory to parameters: memory-mapped safetensors, streamed slice by slice into place."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..config import ModelConfig
from ..errors import ConfigError
from ..files import read_json_object
from .parameters import Source
from .qwen3_5 import Qwen3_5

_NOT_TEXT = ("model.visual.", "visual.")
_MTP = "mtp."
_PREFIXES = ("model.language_model.", "model.")
_DTYPES = ("BF16", "F16", "F32")


def holds_mtp(config: ModelConfig, directory: Path) -> bool:
    """Whether the checkpoint has an MTP head: by its tensors, for one that was saved again may have lost them and name
    a head still. Raises ConfigError for files that cannot be read."""
    return config.mtp_layers > 0 and any(name.startswith(_MTP) for name in _tensor_files(directory))


def load_weights(model: Qwen3_5, directory: Path, progress: bool) -> None:
    """Fill every parameter of the model from DIRECTORY/*.safetensors; vision tensors are skipped by name, and those of
    the MTP head where the model is without.

    Either key prefix and either expert layout; only what the model's rank holds is read, each slice is cast to its
    parameter's dtype on the way, and no second copy of the weights is ever held. Raises ConfigError for a corrupt file
    and for a missing, unknown, mis-shaped or doubled tensor, naming it. Mutates the model's parameters.
    """
    where = _tensor_files(directory)
    skipped = _NOT_TEXT if model.mtp else (*_NOT_TEXT, _MTP)
    names = [name for name in where if not name.startswith(skipped)]
    prefix = next((p for p in _PREFIXES if any(name.startswith(p + "layers.") for name in names)), _PREFIXES[-1])
    sources = {source.key: source for source in model.sources(prefix)}
    if model.config.tied and "lm_head.weight" in names:
        names.remove("lm_head.weight")  # some writers store the tied matrix twice
    unknown = sorted(set(names) - set(sources))
    if unknown:
        raise ConfigError(_listing(f"{directory} holds tensors that this model has no place for", unknown))
    names.sort(key=lambda name: (where[name].name, name))
    filled: dict[int, int] = {}
    bar = tqdm(names, desc="loading weights", unit="tensor", disable=not progress, leave=False)
    opened: tuple[Path, object] | None = None
    for name in bar:
        if opened is None or opened[0] != where[name]:
            opened = where[name], _open(where[name])
        _fill(sources[name], opened[1], where[name])
        for region in sources[name].regions:
            storage = region.part.untyped_storage().data_ptr()
            filled[storage] = filled.get(storage, 0) + region.part.numel()
    _check_complete(model, sources, names, filled, directory)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, by the index where there is one, else by the files' own headers."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ConfigError(f"{index} has no 'weight_map' from tensor names to file names.")
        # The file name only: an index must not lead out of its directory.
        where = {name: directory / Path(file).name for name, file in weight_map.items()}
        for path in sorted(set(where.values())):
            if not path.exists():
                raise ConfigError(f"{index} names {path.name}, which does not exist: the checkpoint is incomplete.")
        return where
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory} holds no .safetensors file; other weight formats are not read.")
    return {name: path for path in files for name in _open(path).keys()}  # noqa: SIM118 - not a dict


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None


def _fill(source: Source, file, path: Path) -> None:
    name = source.key
    try:
        stored = file.get_slice(name)
        shape = tuple(stored.get_shape())
        if shape != source.shape:
            raise ConfigError(f"{name} in {path.name} has shape {list(shape)}; this model needs {list(source.shape)}.")
        if stored.get_dtype() not in _DTYPES:
            raise ConfigError(
                f"{name} in {path.name} is stored as {stored.get_dtype()}; {', '.join(_DTYPES)} are read."
            )
        with torch.no_grad():
            for slices, part in source.regions:
                part.copy_(stored[slices])
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} has no readable tensor {name!r} ({error}); the checkpoint is incomplete.") from None


def _check_complete(
    model: Qwen3_5, sources: dict[str, Source], names: list[str], filled: dict[int, int], directory: Path
) -> None:
    for parameter in model.parameters():
        storage = parameter.untyped_storage().data_ptr()
        got, needed = filled.get(storage, 0), parameter[: len(parameter) - parameter.padding].numel()
        if got == needed:
            continue
        keys = [
            key
            for key, source in sources.items()
            if any(region.part.untyped_storage().data_ptr() == storage for region in source.regions)
        ]
        if got < needed:
            missing = [key for key in keys if key not in names]
            raise ConfigError(_listing(f"{directory} lacks tensors; one of each set of these is needed", missing))
        raise ConfigError(_listing(f"{directory} holds both layouts of the same weights", keys))


def _listing(what: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}."
