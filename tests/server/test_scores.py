"""Log-probabilities as JSON can say them."""

import math

import msgspec
import pytest

from tokenspeed.engine.checkpoint import resolve
from tokenspeed.engine.request import TokenScores
from tokenspeed.engine.server.scores import chat_logprob, completion_logprobs, prompt_logprobs
from tokenspeed.engine.text.tokenizer import Tokenizer


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e30])
def test_what_json_cannot_say_is_9999(value):
    tokenizer, scores = Tokenizer.from_directory(resolve(None)), TokenScores((1, 2), (value, value), (1, 2))
    assert chat_logprob(tokenizer, scores)["logprob"] == -9999.0
    assert prompt_logprobs(tokenizer, [scores])[1]["1"]["logprob"] == -9999.0
    found = completion_logprobs(tokenizer, [1], [scores])
    assert found["token_logprobs"] == [-9999.0] and "null" not in msgspec.json.encode(found).decode()
