"""Constrained decoding: what the masks let through is what was asked for, and there is always a way on."""

import json
import re

import numpy as np
import pytest

from tokenspeed.engine.errors import ConfigError, RequestError
from tokenspeed.engine.text.constraints import Format
from tokenspeed.engine.text.grammar import (
    GrammarCompiler,
    GrammarSpec,
    Matcher,
    choice,
    json_object,
    json_schema,
    regex,
    response_format,
)
from tokenspeed.engine.text.reasoning import ReasoningSplitter

from .grammar_sampling import PADDING, admitted, after, violation


def drawn(compiler, sampler, spec, seeds=6):
    """The texts of complete random answers."""
    grammar = compiler.compile(spec)
    ids = [sampler.draw(grammar.copy(), seed) for seed in range(seeds)]
    texts = [sampler.tokenizer.decode(answer, skip_special_tokens=False) for answer in ids if answer is not None]
    assert texts, "no sample came to an end"
    return texts


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "größe", 3, None]}, "minItems": 1, "maxItems": 3},
        "pet": {"anyOf": [{"$ref": "#/$defs/pet"}, {"type": "null"}]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "tame": {"type": "boolean"}},
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = [
    PERSON,
    {"type": "integer", "minimum": -5, "maximum": 20},
    {"type": ["boolean", "null"]},
    {"enum": ["<|im_end|>", "e\u0301", "</think>", 1.5]},
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "maxItems": 2},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_whatever_is_drawn_under_a_schema_is_valid(compiler, sampler, schema):
    for text in drawn(compiler, sampler, json_schema(schema)):
        assert violation(json.loads(text), schema) is None


def test_after_reasoning_the_answer_is_valid(compiler, sampler):
    for text in drawn(compiler, sampler, json_schema(PERSON, reasoning=True)):
        splitter = ReasoningSplitter(opened=True)
        content = splitter.push(text).content + splitter.finish().content
        assert violation(json.loads(content), PERSON) is None


def test_json_object_mode_gives_an_object(compiler, sampler):
    assert all(isinstance(json.loads(text), dict) for text in drawn(compiler, sampler, json_object()))


@pytest.mark.parametrize("pattern", [r"[a-c]{2,4}/\d", r"(yes|no)(, \w{1,3})?", "^ab|c$", "é+🙂?\n"])
def test_a_regular_expression_holds_for_the_whole_answer(compiler, sampler, pattern):
    for text in drawn(compiler, sampler, regex(pattern)):
        assert re.fullmatch(pattern.strip("^$"), text)


CHOICES = ["yes", "yes, please", "", 'quoted "\\\n', "größe", "e\u0301", "<|im_end|>", "<think>", "\x01\u2028"]


def test_a_choice_gives_one_of_the_texts_and_each_can_be_given(compiler, sampler, tokenizer):
    assert set(drawn(compiler, sampler, choice(CHOICES), seeds=20)) <= set(CHOICES)
    single = {
        tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(id)) == 1
    }
    for text in CHOICES:
        matcher = after(compiler.compile(choice(CHOICES)), [single[bytes((byte,))] for byte in text.encode()])
        assert matcher.accept(tokenizer.eos_id) and matcher.finished


def test_a_forced_text_that_the_tokenizer_would_normalize_comes_out_as_it_was_asked_for(compiler, sampler):
    assert set(drawn(compiler, sampler, choice(["an e\u0301 and <|im_end|>"]))) == {"an e\u0301 and <|im_end|>"}


@pytest.mark.parametrize(
    ("blanks", "taken"),
    [
        ([" "] * 70, 1),
        (["\n"] * 70, 1),
        (["\t"] * 70, 0),
        ([" ", "\n"] * 35, 3),
        (["\r", "\n"] * 35, 2),
        (["\n", *[" "] * 70], 1 + 64),
        (["\n", *["\t"] * 70], 1 + 16),
    ],
)
def test_white_space_in_json_is_a_space_or_a_line_break_with_its_indentation(compiler, tokenizer, blanks, taken):
    text = '{"a": 1,'
    matcher = after(compiler.compile(json_object()), tokenizer.encode_text(text))
    count = 0
    for [blank] in map(tokenizer.encode_text, blanks):
        if not matcher.accept(blank):
            break
        count += 1
    assert count == taken
    rest = tokenizer.encode_text('"b": 2}')
    assert all(map(matcher.accept, rest)) and matcher.finished, "there is a way on behind it"


NESTED = {"a": [], "b": {}, "c": [1, {"d": [True, None, {"e": "x  y"}]}]}
for _ in range(9):
    NESTED = {"a": NESTED}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(NESTED),
        json.dumps(NESTED, separators=(",", ":")),
        *(json.dumps(NESTED, indent=indent) for indent in (0, 1, 2, 3, 4, "\t")),
        json.dumps(NESTED, indent=4).replace(",\n", ", \n"),  # as Python 2 wrote it
        json.dumps(NESTED, indent=4).replace("\n", "\r\n"),
        json.dumps(NESTED, separators=(" , ", " : ")).replace("{", "{ ").replace("]", " ]"),
    ],
)
def test_json_may_be_laid_out_as_it_usually_is(compiler, tokenizer, text):
    assert max(len(line) - len(line.lstrip()) for line in json.dumps(NESTED, indent=4).split("\n")) > 40
    matcher = after(compiler.compile(json_object()), tokenizer.encode_text(text))
    assert matcher.finished


def test_an_end_is_admitted_exactly_where_the_answer_is_complete(compiler, tokenizer, sampler):
    matcher = compiler.compile(regex("ab?")).copy()
    a, b = tokenizer.encode_text("a")[0], tokenizer.encode_text("b")[0]
    assert not matcher.accept(tokenizer.eos_id) and not matcher.finished
    assert not set(sampler.eos_ids) & set(admitted(matcher.mask()))
    assert matcher.accept(a)
    assert set(sampler.eos_ids) | {b} == set(admitted(matcher.mask()))
    done = matcher.copy()
    assert done.accept(tokenizer.eos_id) and done.finished and not matcher.finished
    assert matcher.accept(b) and matcher.finished, "nothing but an end can follow"
    for ended in (done, matcher):
        assert set(admitted(ended.mask())) == set(sampler.eos_ids)
        assert not ended.accept(a) and ended.accept(tokenizer.eos_id) and ended.finished


def test_reasoning_is_free_text_that_ends_with_the_closing_token_and_not_before(compiler, tokenizer, sampler):
    matcher = compiler.compile(choice(["ok"], reasoning=True)).copy()
    closing = tokenizer.token_to_id("</think>")
    text = set(range(tokenizer.vocab_size)) - tokenizer.control_ids
    assert set(admitted(matcher.mask())) >= {id for id in text if tokenizer.token_bytes(id).isascii()} | {closing}
    assert not (set(admitted(matcher.mask())) & tokenizer.control_ids) - {closing}
    for id in tokenizer.encode_text("hm {<think>"):
        assert matcher.accept(id)
    spelled = tokenizer.encode_text("</think>")
    fork = matcher.copy()
    assert [fork.accept(id) for id in spelled].count(False) >= 1, "the tag as text would end the reasoning unnoticed"
    for gap in ("", "\n", "\n\n"):
        fork = matcher.copy()
        assert all(map(fork.accept, [closing, *tokenizer.encode_text(gap + "ok")])) and fork.finished
    assert matcher.accept(closing) and not matcher.accept(closing)


def test_a_mask_has_a_bit_for_each_logit(compiler, tokenizer):
    size = -(-(tokenizer.vocab_size + PADDING) // 32)
    matcher = compiler.compile(json_object()).copy()
    mask = matcher.mask()
    assert mask.dtype == np.int32 and mask.shape == (size,)


def test_a_fork_goes_its_own_way_and_a_rebuilt_matcher_stands_where_the_old_one_stood(compiler, sampler):
    grammar = compiler.compile(json_schema(PERSON))
    ids = next(ids for seed in range(20) if (ids := sampler.draw(grammar.copy(), seed)))
    matcher = grammar.copy()
    for position, id in enumerate(ids):
        fork, rebuilt = matcher.copy(), after(grammar, ids[:position])
        assert (fork.mask() == matcher.mask()).all() and (rebuilt.mask() == matcher.mask()).all()
        other = next((int(other) for other in admitted(fork.mask()) if other != id), id)
        assert fork.accept(other)
        assert matcher.accept(id)
    assert after(grammar, ids).accept(sampler.eos_ids[0])


def nested(depth):
    return json.loads('{"items":' * depth + "{}" + "}" * depth)


LOOP = {}
LOOP["items"] = LOOP
BAD = [
    (lambda: json_schema(5), "the JSON schema must be a JSON object, not 5"),
    (lambda: json_schema(False), "the JSON schema must be a JSON object, not False"),
    (lambda: json_schema({"enum": [b"x"]}), "is no JSON"),
    (lambda: json_schema({"const": float("nan")}), "is no JSON"),
    (lambda: json_schema(LOOP), "is no JSON"),
    (lambda: json_schema({"description": "x" * 200_000}), r"has \d+ characters; at most 65536"),
    (lambda: json_schema(nested(40)), "nested 41 levels deep; at most 32"),
    (lambda: json_schema({"not": {}}), 'cannot be enforced: .*Unimplemented keys: \\["not"\\]'),
    (lambda: json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (lambda: json_schema({"type": "string", "format": "telepathy"}), "telepathy"),
    (lambda: json_schema({"type": "string", "pattern": "("}), "cannot be enforced"),
    (lambda: json_schema({"$ref": "https://example.com"}), "cannot be enforced"),
    (lambda: json_schema({"type": "strin"}), "cannot be enforced"),
    (lambda: json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "cannot be enforced"),
    (lambda: regex(5), "must be a string, not 5"),
    (lambda: regex("("), "unclosed group"),
    (lambda: regex("a(?=b)"), "look-ahead"),
    (lambda: choice([]), "at least one string"),
    (lambda: choice("ab"), "at least one string, not 'ab'"),
    (lambda: choice(["a", 5]), "at least one string"),
    (lambda: choice(["a\ud800"]), "a text is not valid Unicode: surrogates not allowed at character 1"),
    (lambda: regex("\ud800"), "the regular expression is not valid Unicode"),
    (lambda: json_schema({"const": "\ud800"}), "the JSON schema is not valid Unicode"),
    (lambda: choice(["x" * 300_000]), "the grammar has 300010 characters"),
    (lambda: GrammarSpec("answer: <|no_such_token|>"), "cannot be enforced: unknown special token"),
    (lambda: response_format("json"), "response_format is 'json'; its type must be text, json_object or json_schema"),
    (lambda: response_format({"type": "xml"}), "response_format is {'type': 'xml'}"),
    (lambda: response_format({"type": "json_schema"}), "must be an object with a schema, not None"),
    (lambda: response_format({"type": "json_schema", "json_schema": {"name": "x"}}), "with a schema"),
]


@pytest.mark.parametrize(("make", "expected"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_enforced_is_a_request_error_with_the_reason(compiler, make, expected):
    with pytest.raises(RequestError, match=expected) as caught:
        compiler.compile(make())
    assert len(str(caught.value)) < 500


def test_a_grammar_that_becomes_too_much_work_fails_its_own_request(compiler, tokenizer):
    matcher = compiler.compile(regex("((a{1,100}){1,100}){1,100}")).copy()
    with pytest.raises(RequestError, match=r"became too much work: .*too many expressions"):
        for id in tokenizer.encode_text("a" * 100):
            matcher.mask()
            assert matcher.accept(id)
    assert not matcher.finished
    with pytest.raises(RequestError, match=r"became too much work"):
        matcher.mask()


def test_looking_ahead_over_drafts_gives_the_masks_that_come_and_stops_where_a_draft_may_not(compiler, tokenizer):
    grammar = compiler.compile(json_schema({"type": "object", "properties": {"city": {"type": "string"}}}))
    ids = tokenizer.encode('{"city": "Oslo"}')
    rule, masks = Format(grammar.copy()), []
    for place, id in enumerate(ids):
        masks.append(rule.verdicts(ids[:place])[0].allowed)
        wrong = int(np.flatnonzero(np.unpackbits(masks[-1].view(np.uint8), bitorder="little") == 0)[0])
        assert len(rule.verdicts(ids[:place], [wrong, *ids])) == 1, "nothing follows on an id that is not admitted"
        assert len(rule.verdicts(ids[:place], [id, wrong])) <= 3
        rule.accept(id)
    fresh = Format(grammar.copy()).verdicts((), ids)
    assert len(fresh) == 1 + len(ids)
    assert all(np.array_equal(a.allowed, b) for a, b in zip(fresh, masks, strict=False))
    assert np.array_equal(fresh[-1].allowed, rule.verdicts(ids)[0].allowed)


def test_looking_ahead_into_too_much_work_harms_nobody(compiler, tokenizer, monkeypatch):
    rule = Format(compiler.compile(json_object()).copy())
    ids = tokenizer.encode('{"a": 1}')
    mask, calls = Matcher.mask, []

    def failing(matcher, *rest):
        calls.append(matcher)
        if len(calls) == 3:
            raise RequestError("too much work")
        return mask(matcher, *rest)

    monkeypatch.setattr(Matcher, "mask", failing)
    assert len(rule.verdicts((), ids)) == 2
    assert len(rule.verdicts((), ids)) == 1 + len(ids)


def test_response_format_means_what_it_says():
    assert response_format({"type": "text"}) is None
    assert response_format({"type": "json_object"}, reasoning=True) == json_object(reasoning=True)
    schema = {"type": "integer"}
    assert response_format({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}) == json_schema(
        schema
    )


def test_compiled_grammars_are_kept_up_to_their_size_and_for_their_owner_alone(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    first, second = compiler.compile(choice(["first"])), compiler.compile(choice(["second"]))
    assert compiler.compile(choice(["first"]), "mine") is not first, "that it is there tells nobody else"
    assert compiler.compile(choice(["first"])) is first
    compiler.compile(choice(["large"]), size=500 << 20)
    assert compiler.compile(choice(["first"])) is first
    assert compiler.compile(choice(["second"])) is not second


@pytest.mark.parametrize("eos_ids", [[], [-1], [10**6]])
def test_an_answer_needs_an_end_token(tokenizer, eos_ids):
    with pytest.raises(ConfigError, match="eos_ids are"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, eos_ids)
