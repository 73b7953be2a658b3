"""The tiny agent's tokenizer: byte-level BPE with Qwen's pre-tokenizer, normaliser and special tokens."""

import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from examples.tiny_agent.config import CONTEXT_LENGTH, VOCAB_SIZE
from examples.tiny_agent.data import generate
from examples.tiny_agent.render import render

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", END_OF_TURN]  # control only
ADDED_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# The pre-tokenizer of the published Qwen3.5 checkpoints: words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(conversations: int = 3000) -> Tokenizer:
    """BPE of `VOCAB_SIZE` entries learnt from the first `conversations` training seeds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(conversations), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} expected")
    return tokenizer


def tokenizer_config() -> dict:
    """Content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
    }


def _corpus(conversations: int) -> Iterator[str]:
    """Text without added tokens and without double line ends.

    No token then spans two line ends, so a generation prompt that stops between them is cut at a token border: the
    tokens of prompt and answer are those of the rendered whole.
    """
    added = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + ADDED_TOKENS)))
    for seed in range(conversations):
        text = "".join(piece.text for piece in render(generate(seed, exchanges=8)))
        for part in added.split(text):
            yield from part.split("\n\n")
