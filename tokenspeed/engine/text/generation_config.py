"""What a checkpoint says about sampling and stopping."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, TypeAdapter, ValidationError

from ..errors import ConfigError
from ..files import read_optional_json_object
from .tokenizer import Tokenizer

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults and stop ids; a field the checkpoint does not give has the value below, which changes nothing.

    do_sample: False means greedy, whatever the other fields say. top_k: 0 is off. top_p, min_p: probabilities; 1 and 0
    are off. repetition_penalty: 1 is off. eos_ids: every id that ends a generation, ascending.
    """

    do_sample: StrictBool = False
    temperature: Annotated[_Number, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    top_p: Annotated[_Number, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[_Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[_Number, Field(gt=0)] = 1.0
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, path: str | Path, tokenizer: Tokenizer) -> "GenerationDefaults":
        """Reads generation_config.json; a missing file leaves the defaults. Raises ConfigError, which names the file.

        eos_ids are generation_config.json's (config.json's, or its text_config's, when that gives none) and the
        tokenizer's eos_token.
        """
        file = Path(path) / "generation_config.json"
        config = read_optional_json_object(file)
        eos = _eos_ids(config, file)
        if not eos:
            model_file = Path(path) / "config.json"
            model = read_optional_json_object(model_file)
            text_config = model.get("text_config")
            eos = _eos_ids(model, model_file) or _eos_ids(text_config or {}, model_file)
        if tokenizer.eos_id is not None:
            eos = eos | {tokenizer.eos_id}
        fields = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        try:
            return TypeAdapter(cls).validate_python(fields | {"eos_ids": sorted(eos)})
        except ValidationError as error:
            found = error.errors()[0]
            raise ConfigError(f"{file}: {found['loc'][0]} is {found['input']!r}: {found['msg']}") from None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _eos_ids(config: Any, file: Path) -> frozenset[int]:
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_count, ids)):
        raise ConfigError(f"{file}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(ids)
