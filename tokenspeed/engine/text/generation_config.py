"""What a checkpoint says about sampling and stopping."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_optional_json_object
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults and stop ids; a field the checkpoint does not give has the value below, which changes nothing.

    do_sample: False means greedy, whatever the other fields say. top_k: 0 is off. top_p, min_p: probabilities; 1 and 0
    are off. repetition_penalty: 1 is off. eos_ids: every id that ends a generation, ascending.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, path: str | Path, tokenizer: Tokenizer) -> "GenerationDefaults":
        """Reads generation_config.json; a missing file leaves the defaults. Raises ConfigError, which names the file.

        eos_ids are generation_config.json's (config.json's, or its text_config's, when that gives none) and the
        tokenizer's eos_token.
        """
        file = Path(path) / "generation_config.json"
        config = read_optional_json_object(file)
        fields = {}
        for name, (valid, wanted) in _FIELDS.items():
            value = config.get(name)
            if value is None:
                continue
            if not valid(value):
                raise ConfigError(f"{file}: {name} is {value!r}; it must be {wanted}")
            fields[name] = value
        eos = _eos_ids(config, file)
        if not eos:
            model_file = Path(path) / "config.json"
            model = read_optional_json_object(model_file)
            text_config = model.get("text_config")
            eos = _eos_ids(model, model_file) or _eos_ids(text_config or {}, model_file)
        if tokenizer.eos_id is not None:
            eos = eos | {tokenizer.eos_id}
        return cls(**fields, eos_ids=tuple(sorted(eos)))


def _number(low: float, high: float, low_included: bool) -> Callable[[Any], bool]:
    def valid(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (low <= value if low_included else low < value) and value <= high and value < math.inf

    return valid


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_number(0, math.inf, True), "a number >= 0"),
    "top_k": (_count, "an integer >= 0"),
    "top_p": (_number(0, 1, False), "a number in (0, 1]"),
    "min_p": (_number(0, 1, True), "a number in [0, 1]"),
    "repetition_penalty": (_number(0, math.inf, False), "a number > 0"),
}


def _eos_ids(config: Any, file: Path) -> frozenset[int]:
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_count, ids)):
        raise ConfigError(f"{file}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(ids)
