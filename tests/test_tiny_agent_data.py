"""The tiny agent's conversations, template, tokenizer and trainable network."""

import json
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from examples.tiny_agent import checkpoint, words
from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.data import HELD_OUT_SEEDS, TRAINING_SEEDS, arithmetic, generate
from examples.tiny_agent.dataset import batch, example
from examples.tiny_agent.export import CHAT_TEMPLATE, export
from examples.tiny_agent.model import TinyAgent
from examples.tiny_agent.optimizer import build_optimizers, orthogonalise
from examples.tiny_agent.render import Part, render
from examples.tiny_agent.schedule import DECAY_FROM, BatchStream, Clock, learning_rate
from examples.tiny_agent.train import exact_turns, loss_of
from examples.tiny_agent.train_mtp import load_trunk

SHIPPED = Path(__file__).parents[1] / "tokenspeed" / "models" / "tiny_agent"
SEEDS = range(150)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def raise_exception(message):
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(CHAT_TEMPLATE.read_text())


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_of(conversation):
    return "".join(piece.text for piece in render(conversation))


def assistant_messages(conversation):
    return [message for message in conversation.messages() if message["role"] == "assistant"]


# Conversations


def test_a_seed_always_gives_the_same_conversation_and_seeds_differ():
    texts = [text_of(generate(seed, exchanges=4)) for seed in SEEDS]
    assert texts == [text_of(generate(seed, exchanges=4)) for seed in SEEDS]
    assert len(set(texts)) == len(texts)


def test_held_out_conversations_are_not_training_ones():
    assert TRAINING_SEEDS.stop <= HELD_OUT_SEEDS.start
    trained = {text_of(generate(seed, exchanges=4)) for seed in TRAINING_SEEDS[:500]}
    assert not trained & {text_of(generate(seed, exchanges=4)) for seed in HELD_OUT_SEEDS[:100]}


def test_every_recalled_fact_was_told_before():
    recalls = 0
    for seed in SEEDS:
        heard = ""
        for message in generate(seed, exchanges=8).messages():
            fact = re.fullmatch(rf"The ({'|'.join(words.TOLD_PROPERTIES)}) of \w+ is \d+\.", message["content"])
            if message["role"] == "assistant" and fact:
                recalls += 1
                assert fact[0] in heard
            if message["role"] != "assistant":
                heard += message["content"] + "\n"
    assert recalls > 100


def test_a_calculator_call_asks_for_the_result_that_comes_back():
    results = 0
    for seed in SEEDS:
        messages = generate(seed, exchanges=8).messages()
        for message, following in pairwise(messages):
            for call in message.get("tool_calls", ()):
                values = list(call["function"]["arguments"].values())
                if call["function"]["name"] in words.CALCULATOR_NAMES:
                    results += 1
                    assert int(following["content"]) == arithmetic(*values)
    assert results > 50


def test_calls_name_only_the_offered_tools_and_their_parameters():
    for seed in SEEDS:
        conversation = generate(seed, exchanges=8)
        offered = {
            tool["function"]["name"]: set(tool["function"]["parameters"]["properties"]) for tool in conversation.tools
        }
        for message in assistant_messages(conversation):
            for call in message.get("tool_calls", ()):
                assert set(call["function"]["arguments"]) == offered[call["function"]["name"]]


def test_chats_without_tools_and_turns_with_thinking_are_a_minority_that_exists():
    conversations = [generate(seed, exchanges=8) for seed in range(400)]
    without_tools = sum(not conversation.tools for conversation in conversations) / len(conversations)
    turns = [message for conversation in conversations for message in assistant_messages(conversation)]
    with_thinking = sum(bool(turn["reasoning_content"]) for turn in turns) / len(turns)
    assert 0.1 < without_tools < 0.2
    assert 0.04 < with_thinking < 0.25


# Template


def test_the_template_renders_every_conversation_as_the_generator_does(template):
    for seed in SEEDS:
        conversation = generate(seed, exchanges=6)
        assert template.render(messages=conversation.messages(), tools=conversation.tools) == text_of(conversation)


def test_a_generation_prompt_is_the_rendered_conversation_up_to_the_answer(template):
    for seed in SEEDS:
        conversation = generate(seed, exchanges=3)
        messages, so_far, prompts = conversation.messages(), "", []
        for piece in render(conversation):
            if piece.part is Part.ANSWER:
                prompts.append(so_far)
            so_far += piece.text
        query = max(i for i, message in enumerate(messages) if message["role"] == "user")
        cuts = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > query]
        for prompt, cut in zip(prompts, cuts, strict=True):
            options = {} if conversation.thinking else {"enable_thinking": False}
            rendered = template.render(
                messages=messages[:cut], tools=conversation.tools, add_generation_prompt=True, **options
            )
            assert rendered == prompt


def test_the_shipped_template_is_the_one_tested_here():
    assert (SHIPPED / "chat_template.jinja").read_text() == CHAT_TEMPLATE.read_text()


def test_reasoning_lasts_through_its_tool_loop_and_is_dropped_at_the_next_query(template):
    call = {"type": "function", "function": {"name": "find", "arguments": {"name": "onyx"}}}
    loop = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "", "reasoning_content": "Look first.", "tool_calls": [call]},
        {"role": "tool", "content": "fern"},
        {"role": "assistant", "content": "<think>\nNow I know.\n</think>\n\nFern."},
    ]
    during = template.render(messages=loop)
    assert "<think>\nLook first.\n</think>\n\n<tool_call>" in during
    assert "<think>\nNow I know.\n</think>\n\nFern.<|im_end|>" in during
    wrapped = {"role": "user", "content": "<tool_response>\nfern\n</tool_response>"}
    assert "Look first." in template.render(messages=[*loop, wrapped])  # a wrapped tool response is not a query
    after = template.render(messages=[*loop, {"role": "user", "content": "Thanks!"}])
    assert "think" not in after and "<|im_start|>assistant\nFern.<|im_end|>" in after


def test_text_parts_render_as_their_text_and_other_parts_are_refused(template):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    plain = template.render(messages=[{"role": "user", "content": "Hello!"}])
    assert template.render(messages=[{"role": "user", "content": parts}]) == plain
    with pytest.raises(TemplateError, match="only text"):
        template.render(messages=[{"role": "user", "content": [{"type": "image", "image": "x.png"}]}])


def test_a_tool_call_parses_back_to_its_arguments():
    calls = 0
    for seed in SEEDS:
        conversation = generate(seed, exchanges=8)
        schemas = {
            tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in conversation.tools
        }
        given = [c["function"] for message in assistant_messages(conversation) for c in message.get("tool_calls", ())]
        shown = re.findall(
            r"<tool_call>\n<function=(\w+)>\n(.*?)</function>\n</tool_call>", text_of(conversation), re.S
        )
        assert len(shown) == len(given)
        for (name, body), function in zip(shown, given, strict=True):
            values = dict(re.findall(r"<parameter=(\w+)>\n(.*?)\n</parameter>\n", body, re.S))
            for key, text in values.items():
                if schemas[name][key]["type"] != "string":
                    values[key] = json.loads(text)
            assert {"name": name, "arguments": values} == function
            calls += 1
    assert calls > 200


# Tokenizer


def test_text_survives_the_tokenizer(tokenizer):
    samples = [text_of(generate(seed, exchanges=5)) for seed in range(30)]
    for text in [*samples, "naïve 日本語 🦜 \t\r\n x  y", "a\n\n\nb", "'s 1234 ...\n\n"]:
        assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


def test_text_is_normalised_to_nfc(tokenizer):
    assert encode(tokenizer, "e\u0301") == encode(tokenizer, "\u00e9")


def test_only_control_tokens_are_special(tokenizer):
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    assert special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    for text in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"):
        assert len(encode(tokenizer, text)) == 1


def test_prompt_and_answer_have_the_tokens_of_the_rendered_whole(tokenizer):
    for seed in SEEDS:
        pieces = render(generate(seed, exchanges=4))
        apart = [token for piece in pieces for token in encode(tokenizer, piece.text)]
        assert apart == encode(tokenizer, "".join(piece.text for piece in pieces))


@pytest.mark.parametrize("length", [512, 2048])
def test_an_example_fills_its_length_and_its_turns_end_with_the_end_of_turn(tokenizer, length):
    for seed in range(20):
        one = example(seed, tokenizer, length)
        assert length // 2 < len(one.ids) <= length and len(one.weights) == len(one.ids) and one.turns
        for turn in one.turns:
            assert one.ids[turn.stop - 1] == tokenizer.token_to_id("<|im_end|>")
            before = tokenizer.decode(one.ids[: turn.start], skip_special_tokens=False)
            assert before.endswith(("<|im_start|>assistant\n<think>\n", "<think>\n\n</think>\n\n"))


# Network


def test_the_exported_network_gives_the_logits_of_transformers(tokenizer, tmp_path):
    from transformers import Qwen3_5MoeForCausalLM

    torch.manual_seed(0)
    model = TinyAgent(ModelConfig())
    with torch.no_grad():
        for parameter in model.parameters():  # norms and embeddings away from their start, everything exact in bf16
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else None
            parameter.copy_(parameter.bfloat16())
    checkpoint.save(tmp_path / "checkpoint.pt", model, [], checkpoint.Progress())
    (tmp_path / "model").mkdir()
    export(tmp_path / "checkpoint.pt", tokenizer, tmp_path / "model")
    oracle = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 97))
    with torch.no_grad():
        assert (model(ids) - oracle(ids, use_cache=False).logits).abs().max() < 1e-3


def test_the_shipped_model_answers_held_out_conversations_exactly(tokenizer):
    model = load_trunk(SHIPPED)
    batches = [batch(HELD_OUT_SEEDS[i : i + 4], tokenizer, 512, padding=0) for i in range(0, 16, 4)]
    assert exact_turns(model, batches) >= 0.95


def test_two_training_steps_lower_the_loss_of_their_batch(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = TinyAgent(ModelConfig(hidden_size=32, num_hidden_layers=4))
    optimizers = build_optimizers(model, lr=3e-3)
    data = batch(TRAINING_SEEDS[:2], tokenizer, 256, padding=0)
    losses = []
    for _ in range(3):
        loss, _ = loss_of(model, data)
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]

    checkpoint.save(tmp_path / "checkpoint.pt", model, optimizers, checkpoint.Progress(step=3))
    other = TinyAgent(model.config)
    progress = checkpoint.load(tmp_path / "checkpoint.pt", other, build_optimizers(other, lr=3e-3))
    assert progress.step == 3
    assert torch.equal(other(data.ids), model(data.ids))


def test_every_parameter_has_exactly_one_optimizer():
    model = TinyAgent(ModelConfig(num_hidden_layers=4))
    held = [
        p for optimizer in build_optimizers(model, 1e-3) for group in optimizer.param_groups for p in group["params"]
    ]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


def test_muon_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 64, 128)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_worker_processes_give_the_batches_of_one_process(tokenizer):
    stream = BatchStream(tokenizer, Clock(1e9, 0.0, time.monotonic()), 0, 0, tokens_per_step=512, padding=0)
    alone, shared = (iter(DataLoader(stream, batch_size=None, num_workers=workers)) for workers in (0, 2))
    batches = [next(alone).ids for _ in range(4)]
    assert all(torch.equal(ids, next(shared).ids) for ids in batches)
    assert not torch.equal(batches[0], batches[1])


def test_the_learning_rate_rises_by_steps_and_falls_by_time():
    assert learning_rate(0.0, 0, 1.0) < 0.05
    assert learning_rate(DECAY_FROM, 10_000, 1.0) == 1.0
    assert learning_rate(0.99, 10_000, 1.0) < 0.05
