"""Log-probabilities as JSON can say them."""

import math

import msgspec
import pytest

from tokenspeed.engine.checkpoint import resolve
from tokenspeed.engine.request import TokenScores, Update
from tokenspeed.engine.server.scores import TextScores, chat_logprob, completion_logprobs, prompt_logprobs
from tokenspeed.engine.text.tokenizer import Tokenizer


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e30])
def test_what_json_cannot_say_is_9999(value):
    tokenizer, scores = Tokenizer.from_directory(resolve(None)), TokenScores((1, 2), (value, value), (1, 2))
    assert chat_logprob(tokenizer, scores)["logprob"] == -9999.0
    assert prompt_logprobs(tokenizer, [scores])[1]["1"]["logprob"] == -9999.0
    found = completion_logprobs(tokenizer, [1], [scores])
    assert found["token_logprobs"] == [-9999.0] and "null" not in msgspec.json.encode(found).decode()


def test_a_part_of_the_text_has_the_tokens_that_say_it():
    tokenizer = Tokenizer.from_directory(resolve(None))
    single = {tokenizer.token_bytes(id): id for id in reversed(range(256)) if len(tokenizer.token_bytes(id)) == 1}
    text = "ab\n\ncé🙂d"
    ids = [single[bytes((byte,))] for byte in text.encode()]
    ids.insert(1, tokenizer.eos_id)  # no text
    scores = TextScores(tokenizer)
    for some in (ids[:7], ids[7:]):  # the second begins inside a character
        scores.add(Update("", 0, ids=some, scores=[TokenScores((id,), (-1.0,), (1,)) for id in some]))

    def said(begin, end):
        return bytes(byte for entry in scores.take(begin, end) for byte in entry["bytes"]).decode()

    assert said(0, 1) == "a" and said(1, 2) == "b"
    assert said(4, 6) == "cé", "what lies between two parts belongs to none"
    assert said(6, 7) == "🙂" and said(6, 7) == ""
    assert said(7, 8) == "d" and said(8, 99) == ""
    whole = TextScores(tokenizer)
    [token] = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b" the"]
    whole.add(Update("", 0, ids=[token], scores=[TokenScores((token,), (-1.0,), (1,))]))
    assert [len(whole.take(*part)) for part in ((0, 2), (2, 4))] == [1, 0], "a token of two parts counts once"
