"""Sampling defaults and stop ids."""

import json

import pytest

from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.text.generation_config import GenerationDefaults
from tokenspeed.engine.text.tokenizer import Tokenizer


def defaults(directory, generation=None, model=None):
    for name, content in (("generation_config.json", generation), ("config.json", model)):
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return GenerationDefaults.from_directory(directory, Tokenizer.from_directory(directory))


def test_the_checkpoint_stops_at_every_eos_id_and_at_the_end_of_a_turn(checkpoint, tokenizer):
    config = json.loads((checkpoint / "generation_config.json").read_text())
    found = GenerationDefaults.from_directory(checkpoint, tokenizer)
    listed = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert set(found.eos_ids) == {*listed, tokenizer.token_to_id("<|im_end|>")}
    assert found.do_sample == config.get("do_sample", False)


def test_every_field_is_read(copied_checkpoint):
    fields = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1}
    end = Tokenizer.from_directory(copied_checkpoint).eos_id
    found = defaults(copied_checkpoint, fields | {"eos_token_id": [7, 3, 7]})
    assert found == GenerationDefaults(**fields, eos_ids=(3, 7, end))


def test_silence_means_greedy_and_every_filter_off(copied_checkpoint):
    end = Tokenizer.from_directory(copied_checkpoint).eos_id
    assert defaults(copied_checkpoint) == GenerationDefaults(False, 1.0, 0, 1.0, 0.0, 1.0, (end,))
    assert defaults(copied_checkpoint, {"top_k": None}).top_k == 0


@pytest.mark.parametrize("model", [{"eos_token_id": 5}, {"text_config": {"eos_token_id": [5]}}])
def test_config_json_gives_the_eos_id_only_where_generation_config_gives_none(copied_checkpoint, model):
    end = Tokenizer.from_directory(copied_checkpoint).eos_id
    assert defaults(copied_checkpoint, {}, model).eos_ids == (5, end)
    assert defaults(copied_checkpoint, None, model).eos_ids == (5, end)
    assert defaults(copied_checkpoint, {"eos_token_id": 6}, model).eos_ids == (6, end)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1), ("temperature", "hot"), ("temperature", True), ("temperature", float("nan")),
        ("temperature", float("inf")), ("top_k", -1), ("top_k", 2.5), ("top_p", 0), ("top_p", 1.5), ("min_p", -0.1),
        ("min_p", 2), ("repetition_penalty", 0), ("do_sample", 1), ("eos_token_id", -1), ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]), ("eos_token_id", True),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_config_error_that_names_file_field_and_value(copied_checkpoint, name, value):
    with pytest.raises(ConfigError) as error:
        defaults(copied_checkpoint, {name: value})
    assert all(part in str(error.value) for part in ("generation_config.json", name, repr(value)))


@pytest.mark.parametrize("content", ["", '{"top_k": 2', "[]", "7", "[" * 100_000])
def test_a_half_written_file_is_a_config_error_that_names_it(copied_checkpoint, content):
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        defaults(copied_checkpoint, content)
    with pytest.raises(ConfigError, match=r"[/\\]config\.json"):
        defaults(copied_checkpoint, None, content)
