"""Two checkpoints' text files: one made here, with all of Qwen's kinds of added tokens, and the shipped model's."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import tokenspeed.models
from tokenspeed.engine.text.grammar import GrammarCompiler
from tokenspeed.engine.text.template import ChatTemplate
from tokenspeed.engine.text.tokenizer import Tokenizer

from .grammar_sampling import PADDING, Sampler

HERE = Path(__file__).parent
SHIPPED = Path(next(iter(tokenspeed.models.__path__))) / "tiny_agent"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|fim_prefix|>"]


def train_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # Whole literals in the corpus teach merges across their characters, the hard case for text that looks like one.
    corpus = [(HERE / "chat_template.jinja").read_text(), Path(__file__).read_text(), "größe 你好 🙂 naïve\n" * 20]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return backend


@pytest.fixture(scope="session")
def made_checkpoint(tmp_path_factory):
    """A directory with tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    directory = tmp_path_factory.mktemp("made")
    backend = train_backend()
    backend.save(str(directory / "tokenizer.json"))
    shutil.copy(HERE / "chat_template.jinja", directory)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    generation["eos_token_id"] = [backend.token_to_id("<|endoftext|>")]
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="session", params=["made", "shipped"])
def checkpoint(request, made_checkpoint):
    return made_checkpoint if request.param == "made" else SHIPPED


@pytest.fixture
def copied_checkpoint(made_checkpoint, tmp_path):
    """A copy of the made checkpoint that a test may damage."""
    return Path(shutil.copytree(made_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return Tokenizer.from_directory(checkpoint)


@pytest.fixture(scope="session")
def template(checkpoint, tokenizer):
    return ChatTemplate.from_directory(checkpoint, tokenizer)


@pytest.fixture(scope="session")
def oracle(checkpoint):
    """transformers' tokenizer on the same files."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def sampler(tokenizer):
    return Sampler(tokenizer, [tokenizer.eos_id, tokenizer.token_to_id("<|endoftext|>")])


@pytest.fixture(scope="session")
def compiler(tokenizer, sampler):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, sampler.eos_ids)
