"""What a conversation becomes on its way to the engine."""

from tokenspeed.engine.checkpoint import resolve
from tokenspeed.engine.frontend import Frontend
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.server.turns import Conversation, prepare
from tokenspeed.engine.text.tool_grammar import ToolGrammars

MESSAGES = [{"role": "user", "content": "How many boxes are left?"}]


def test_both_ways_in_tell_the_engine_which_answers_come_back():
    frontend = Frontend.from_directory(resolve(None))
    opens_call = frontend.tokenizer.token_to_id("<tool_call>")
    asked = Conversation(MESSAGES, None, "auto", {})
    served = prepare(frontend, ToolGrammars(), None, "a", asked, 100).request
    offline = frontend.chat_request("a", MESSAGES, SamplingParams())
    assert served.kept_with == offline.kept_with == opens_call is not None
    assert frontend.request("a", served.prompt, SamplingParams()).kept_with is None, "nobody knows what follows ids"
