"""From a checkpoint directory to parameters: memory-mapped safetensors, streamed slice by slice into place."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ...ops.fp8 import BLOCK, FP8, blocks, dequantise, quantise_blocks
from ..config import ModelConfig
from ..errors import ConfigError
from ..files import read_json_object
from ..quantization import PRODUCTS, products_of
from .parameters import Region, Source
from .qwen3_5 import Qwen3_5

_NOT_TEXT = ("model.visual.", "visual.")
_MTP = "mtp."
_PREFIXES = ("model.language_model.", "model.")
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_FP8, _SCALE = "F8_E4M3", "_scale_inv"
_HEAD = "lm_head.weight"
_MAPPED_BYTES = 256 << 20  # of what was read, that stay mapped
_ROWS = 16384  # of a matrix that are compared or made at once
_FP8_SPREAD = 64.0  # of random e4m3 numbers: hardly one exceeds 448


class _Files:
    """A checkpoint's tensors by name, in files that are opened when first needed, and anew after a while: pages
    that were read count as the process's memory as long as they are mapped."""

    def __init__(self, directory: Path):
        """Raises ConfigError for a directory without readable weights."""
        self.directory, self.where = directory, _tensor_files(directory)
        self._opened: dict[Path, object] = {}
        self._read = 0

    def get(self, name: str):
        """The safetensors slice of a tensor. Raises ConfigError where its file is corrupt or lacks it."""
        path = self.where[name]
        if self._read > _MAPPED_BYTES:
            self._opened.clear()
            self._read = 0
        try:
            if path not in self._opened:
                self._opened[path] = _open(path)
            found = self._opened[path].get_slice(name)
            self._read += prod(found.get_shape()) * _BYTES.get(found.get_dtype(), 1)
            return found
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} has no readable tensor {name!r} ({error}); the checkpoint is incomplete."
            ) from None

    def place(self, name: str) -> str:
        return f"{name} in {self.where[name].name}"


def with_formats(config: ModelConfig, directory: Path, quantization: str) -> ModelConfig:
    """The configuration with the products that are to be held in FP8. quantization: "auto" for those that the
    checkpoint has in FP8, "fp8" for all that can be, "none" for none.

    A product is one of a name in all layers: where some of them are stored in FP8 and others not, none is held in it.
    Raises ConfigError where the tensors contradict config.json, naming one.
    """
    if quantization != "auto":
        return replace(config, fp8=PRODUCTS if quantization == "fp8" else frozenset())
    files = _Files(directory)
    stored: dict[bool, set[str]] = {True: set(), False: set()}
    for name in files.where:
        products = () if name.startswith((*_NOT_TEXT, _MTP)) else products_of(name)
        if not products:
            continue
        fp8 = files.get(name).get_dtype() == _FP8
        _check_listed(config, files, name, fp8)
        stored[fp8].update(products)
    return replace(config, fp8=frozenset(stored[True] - stored[False]))


def with_stored_head(config: ModelConfig, directory: Path) -> ModelConfig:
    """The configuration, untied where it says tied but the checkpoint has an LM head that is not the embedding: the
    stored head counts then, as in transformers. Raises ConfigError for files that cannot be read."""
    if not config.tied:
        return config
    files = _Files(directory)
    embedding = next((p + "embed_tokens.weight" for p in _PREFIXES if p + "embed_tokens.weight" in files.where), None)
    if _HEAD not in files.where or embedding is None:
        return config
    head, embedded = files.get(_HEAD), files.get(embedding)
    rows = head.get_shape()[0]
    same = head.get_shape() == embedded.get_shape() and all(
        torch.equal(head[at : at + _ROWS], embedded[at : at + _ROWS]) for at in range(0, rows, _ROWS)
    )
    return config if same else replace(config, tied=False)


def _check_listed(config: ModelConfig, files: _Files, name: str, fp8: bool) -> None:
    if config.stored is None:
        return
    listed = config.stored.leaves_out(name.removesuffix(".weight"))
    if fp8 == listed:
        kind = files.get(name).get_dtype()
        raise ConfigError(
            f"{files.place(name)} is stored as {kind}, but modules_to_not_convert of config.json "
            f"{'has' if listed else 'does not have'} it: they are of different checkpoints; fetch it again."
        )


def holds_mtp(config: ModelConfig, directory: Path) -> bool:
    """Whether the checkpoint has an MTP head: by its tensors, for one that was saved again may have lost them and name
    a head still. Raises ConfigError for files that cannot be read."""
    return config.mtp_layers > 0 and any(name.startswith(_MTP) for name in _tensor_files(directory))


def load_weights(model: Qwen3_5, directory: Path, progress: bool) -> None:
    """Fill every parameter of the model from DIRECTORY/*.safetensors; vision tensors are skipped by name, and those of
    the MTP head where the model is without.

    Either key prefix and either expert layout; only what the model's rank holds is read, each slice is cast, quantised
    or dequantised to its parameter's format on the way, and no second copy of the weights is ever held. Raises
    ConfigError for a corrupt file and for a missing, unknown, mis-shaped or doubled tensor, naming it. Mutates the
    model's parameters.
    """
    files = _Files(directory)
    skipped = _NOT_TEXT if model.mtp else (*_NOT_TEXT, _MTP)
    names = [name for name in files.where if not name.startswith(skipped)]
    prefix = next((p for p in _PREFIXES if any(name.startswith(p + "layers.") for name in names)), _PREFIXES[-1])
    sources = {source.key: source for source in model.sources(prefix)}
    if model.config.tied and _HEAD in names:
        names.remove(_HEAD)  # some writers store the tied matrix twice; see `with_stored_head`
    scales = {name for name in names if name.endswith(_SCALE) and name.removesuffix(_SCALE) in sources}
    unknown = sorted(set(names) - set(sources) - scales)
    if unknown:
        raise ConfigError(_listing(f"{directory} holds tensors that this model has no place for", unknown))
    names = sorted(set(names) - scales, key=lambda name: (files.where[name].name, name))
    filled: dict[int, int] = {}
    for name in tqdm(names, desc="loading weights", unit="tensor", disable=not progress, leave=False):
        _fill(sources[name], files)
        scales.discard(name + _SCALE)
        for region in sources[name].regions:
            for part in (region.part, region.scale):
                if part is not None:
                    storage = part.untyped_storage().data_ptr()
                    filled[storage] = filled.get(storage, 0) + part.numel()
    if scales:
        raise ConfigError(_listing(f"{directory} holds scales of tensors that are not there", sorted(scales)))
    _check_complete(model, sources, names, filled, directory)


@torch.no_grad()
def fill_with_noise(model: Qwen3_5) -> None:
    """Random numbers for every parameter, made on its device, of sizes that keep what goes through the model finite: to
    measure without a checkpoint. They follow from the parameter's name, so ranks that share one agree. Mutates the
    model's parameters."""
    for name, parameter in model.named_parameters():
        rows = parameter[: len(parameter) - parameter.padding]
        generator = torch.Generator(rows.device).manual_seed(crc32(name.encode()))
        if name.endswith(("a_log", "dt_bias")):
            rows.uniform_(-4, 0, generator=generator)
        elif rows.dtype == FP8:
            for part in rows.flatten(0, -2).split(_ROWS):
                part.copy_(torch.randn(part.shape, device=part.device, generator=generator) * _FP8_SPREAD)
        elif name.endswith(".scale"):
            rows.fill_((BLOCK * rows.shape[-1]) ** -0.5 / _FP8_SPREAD)
        else:
            rows.normal_(0, 0.1 if rows.dim() == 1 else rows.shape[-1] ** -0.5, generator=generator)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, by the headers of the files that the index names, or of all without one.

    Raises ConfigError where the index contradicts the headers, and for a tensor in two files, naming the files.
    """
    index = directory / "model.safetensors.index.json"
    indexed = _index(index) if index.exists() else {}
    files = sorted(set(indexed.values()) or directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory} holds no .safetensors file; other weight formats are not read.")
    where: dict[str, Path] = {}
    for path in files:
        for name in _open(path).keys():  # noqa: SIM118 - not a dict
            if name in where:
                raise ConfigError(
                    f"{where[name].name} and {path.name} in {directory} both hold {name!r}; one of them is left over "
                    "from another download: remove it, or fetch the checkpoint again."
                )
            where[name] = path
    for name, path in indexed.items():
        if where.get(name) != path:
            held = f"{where[name].name} does" if name in where else "nor does another file"
            raise ConfigError(
                f"{index} says that {path.name} holds {name!r}, but it does not; {held}: the index is of another "
                "download; fetch the checkpoint again."
            )
    return where


def _index(path: Path) -> dict[str, Path]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConfigError(f"{path} has no 'weight_map' from tensor names to file names.")
    # The file name only: an index must not lead out of its directory.
    indexed = {name: path.parent / Path(file).name for name, file in weight_map.items()}
    for file in sorted(set(indexed.values())):
        if not file.exists():
            raise ConfigError(f"{path} names {file.name}, which does not exist: the checkpoint is incomplete.")
    return indexed


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None


def _fill(source: Source, files: _Files) -> None:
    """Bring a checkpoint tensor into the parameters that it fills, in their formats."""
    name = source.key
    stored = files.get(name)
    shape, kind, scale = tuple(stored.get_shape()), stored.get_dtype(), None
    if shape != source.shape:
        raise ConfigError(f"{files.place(name)} has shape {list(shape)}; this model needs {list(source.shape)}.")
    if kind == _FP8 and len(shape) > 1 and name + _SCALE in files.where:
        scale = _scale_of(source, files)
    elif kind not in _BYTES:
        missing = f"; FP8 needs its scale {name + _SCALE}, which is not there" if kind == _FP8 else ""
        raise ConfigError(f"{files.place(name)} is stored as {kind}; {', '.join(_BYTES)} are read{missing}.")
    elif name + _SCALE in files.where:
        raise ConfigError(f"{files.place(name)} is stored as {kind}, but has a scale, {name + _SCALE}.")
    try:
        with torch.no_grad():
            for region in source.regions:
                _fill_region(region, stored, scale, name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{files.where[name]} has no readable tensor {name!r} ({error}); the checkpoint is incomplete."
        ) from None


def _scale_of(source: Source, files: _Files):
    name = source.key + _SCALE
    scale = files.get(name)
    *experts, rows, columns = source.shape
    needed = [*experts, blocks(rows), blocks(columns)]
    if list(scale.get_shape()) != needed:
        raise ConfigError(
            f"{files.place(name)} has shape {scale.get_shape()}; {source.key} of {list(source.shape)} in blocks of "
            f"{BLOCK} x {BLOCK} needs {needed}."
        )
    if scale.get_dtype() not in _BYTES:
        raise ConfigError(f"{files.place(name)} is stored as {scale.get_dtype()}; {', '.join(_BYTES)} are read.")
    return scale


def _fill_region(region: Region, stored, scale, name: str) -> None:
    """stored, scale: slices of the checkpoint's tensor and of its scale, None where it is not in FP8."""
    values, part = stored[region.slices], region.part
    if scale is None and region.scale is None:
        part.copy_(values)
        return
    if scale is None:
        for each in _matrices(values, part, region.scale):
            _quantise(*each)
        return
    *experts, rows, columns = region.slices
    scales = scale[(*experts, *(slice(each.start // BLOCK, blocks(each.stop)) for each in (rows, columns)))].float()
    first = rows.start % BLOCK, columns.start % BLOCK  # within its block, where the part's first element stands
    if region.scale is None:
        for each, held, by_block in _matrices(values, part, scales):
            held.copy_(dequantise(each.to(held.device), by_block.to(held.device), *first))
        return
    if any(first):
        raise ConfigError(
            f"{name} is in FP8 and held in parts that cut its blocks of {BLOCK}: use --quantization none."
        )
    part.copy_(values)
    region.scale.copy_(scales)


def _matrices(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """One expert at a time: what is made on the way is as large as one, not as all of them."""
    return zip(*tensors, strict=True) if tensors[0].dim() > 2 else [tensors]


def _quantise(values: Tensor, part: Tensor, scale: Tensor) -> None:
    data, by_block = quantise_blocks(values.to(part.device))
    part.copy_(data)
    scale.copy_(by_block)


def _check_complete(
    model: Qwen3_5, sources: dict[str, Source], names: list[str], filled: dict[int, int], directory: Path
) -> None:
    for parameter in model.parameters():
        storage = parameter.untyped_storage().data_ptr()
        got, needed = filled.get(storage, 0), parameter[: len(parameter) - parameter.padding].numel()
        if got == needed:
            continue
        keys = [
            key for key, source in sources.items() if any(storage in _storages(region) for region in source.regions)
        ]
        if got < needed:
            missing = [key for key in keys if key not in names]
            raise ConfigError(_listing(f"{directory} lacks tensors; one of each set of these is needed", missing))
        raise ConfigError(_listing(f"{directory} holds both layouts of the same weights", keys))


def _storages(region: Region) -> list[int]:
    return [part.untyped_storage().data_ptr() for part in (region.part, region.scale) if part is not None]


def _listing(what: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}."
