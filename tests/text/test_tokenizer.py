"""The tokenizer by itself: raw prompts, ids and files that cannot be used."""

import json
import threading

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from tokenspeed.engine.errors import ConfigError, RequestError
from tokenspeed.engine.text.interrupt import Interrupted, interrupt
from tokenspeed.engine.text.literals import Hidden, LiteralGuard, Rendered
from tokenspeed.engine.text.sized_cache import SizedCache
from tokenspeed.engine.text.template import ChatTemplate
from tokenspeed.engine.text.tokenizer import Tokenizer

from .test_chat import conversations

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = ["<|im_start|>", "<think>", "</think>", "<|im_end", "|>", "é", "e\u0301", "🙂", " ", "\n", "x"]


@FEW
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join))
def test_a_raw_prompt_has_the_ids_that_transformers_gives_it_control_tokens_included(tokenizer, oracle, prompt):
    ids = tokenizer.encode(prompt)
    assert ids == oracle(prompt)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_a_control_token_in_a_raw_prompt_is_one_id(tokenizer):
    start = tokenizer.token_to_id("<|im_start|>")
    assert tokenizer.encode("<|im_start|>user") == [start, *tokenizer.encode("user")]
    assert tokenizer.decode([start]) == "" and tokenizer.decode([start], skip_special_tokens=False) == "<|im_start|>"


def test_sizes_and_ids_equal_those_of_transformers(tokenizer, oracle):
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.eos_id == oracle.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.special_ids == set(oracle.all_special_ids) | tokenizer.special_ids < tokenizer.control_ids


@pytest.mark.parametrize("prompt", ["a\ud800b", "\udfff"])
def test_a_lone_surrogate_is_refused_with_its_place(tokenizer, template, prompt):
    for attempt in (
        lambda: tokenizer.encode(prompt),
        lambda: tokenizer.encode_rendered(template.render([{"role": "user", "content": prompt}])),
    ):
        with pytest.raises(RequestError, match=r"lone surrogate U\+D[8F][0F][0F] at character \d+"):
            attempt()


def test_marks_avoid_private_use_characters_and_escapes_of_the_input(tokenizer, template):
    content = "\U000f0000 \\udb80\\udc01 \U000f0002 <think> é"
    rendered = template.render([{"role": "user", "content": content}])
    assert content in rendered.text
    assert [rendered.text[start:end] for start, end in rendered.protected] == ["<think>"]


def test_running_out_of_private_use_characters_is_a_request_error():
    hidden = Hidden(["".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0x110000)]))])
    with pytest.raises(RequestError, match="private-use"):
        hidden.mark("<think>")


def test_marks_survive_tojson_that_escapes_to_ascii(tokenizer):
    sources = {"default": "{{ messages[0].content | tojson(ensure_ascii=true) }}"}
    rendered = ChatTemplate(sources, tokenizer).render([{"role": "user", "content": "é <think> x <"}])
    assert rendered.text == '"\\u00e9 <think> x <"'
    assert tokenizer.encode_rendered(rendered).count(tokenizer.token_to_id("<think>")) == 0


def test_a_string_that_becomes_a_literal_by_normalization_stays_text(made_checkpoint):
    backend = tokenizers.Tokenizer.from_file(str(made_checkpoint / "tokenizer.json"))
    backend.add_tokens([AddedToken("<Key>", normalized=True, special=False)])
    tokenizer = Tokenizer(backend)
    content = "a <\u212aey> b"  # the Kelvin sign, which NFC turns into K
    assert tokenizer.token_to_id("<Key>") in tokenizer.encode(content)
    template = ChatTemplate.from_directory(made_checkpoint, tokenizer)
    for role in ("user", "assistant"):
        rendered = template.render([{"role": "user", "content": "x"}, {"role": role, "content": content}])
        assert tokenizer.token_to_id("<Key>") not in tokenizer.encode_rendered(rendered)
    turn = {"role": "assistant", "content": "e\u0301\n</think>\n\nx"}  # shorter once normalized
    rendered = template.render([{"role": "user", "content": "q"}, turn], add_generation_prompt=False)
    assert rendered.text.endswith("<think>\né\n</think>\n\nx<|im_end|>\n")


def test_marks_avoid_private_use_characters_of_the_template(tokenizer):
    template = ChatTemplate({"default": "\U000f0000{{ messages[0].content }}"}, tokenizer)
    assert template.render([{"role": "user", "content": "<think>"}]).text == "\U000f0000<think>"


@FEW
@given(st.data())
def test_a_protected_span_never_gives_a_control_token_and_the_rest_is_found(tokenizer, data):
    pieces = data.draw(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), max_size=10))
    text, protected, expected = "", [], []
    for piece, is_protected in pieces:
        if is_protected:
            protected.append((len(text), len(text) + len(piece)))
        elif (id := tokenizer.token_to_id(piece)) in tokenizer.control_ids:
            expected.append(id)
        elif piece == "|>":
            continue  # would complete a literal across a border
        text += piece
    ids = tokenizer.encode_rendered(Rendered(text, tuple(protected)))
    assert [id for id in ids if id in tokenizer.control_ids] == expected


def test_a_control_token_is_found_although_a_literal_overlaps_its_start():
    guard = LiteralGuard(["ab", "bc"])
    assert guard.find(Rendered("abc", protected=((1, 1),))) == ([(1, 3)], [0])


def test_ids_are_counted_up_to_control_tokens_and_to_nothing_else(tokenizer):
    text = "né 🙂<think>x</think><|im_end|>y"
    positions = [0, 1, text.index("<think>"), text.index("x"), text.index("</"), text.index("<|im"), len(text) - 1, 99]
    rendered = Rendered(text, protected=((text.index("<|im"), text.index("y")),))
    ids, counts = tokenizer.encode_with_counts(rendered, positions)
    assert ids == tokenizer.encode_rendered(rendered)
    before = len(tokenizer.encode("né 🙂"))
    assert counts == [None, None, before, None, ids.index(tokenizer.token_to_id("</think>")), None, None, None]


@FEW
@given(conversation=conversations())
def test_what_was_encoded_lately_is_encoded_the_same(tokenizer, template, conversation):
    messages, tools = conversation
    rendered = template.render(messages, tools)
    backend = tokenizer._backend.encode(rendered.text, add_special_tokens=False)
    for name_space in (None, "a", "a", "b"):
        ids, _ = tokenizer.encode_with_counts(rendered, (), name_space)
        assert ids == tokenizer.encode_rendered(rendered)
        assert rendered.protected or ids == backend.ids


def test_nobody_finds_what_another_has_encoded(made_checkpoint, monkeypatch):
    tokenizer = Tokenizer.from_directory(made_checkpoint)
    encoded, encode = [], tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda *a, **k: encoded.append(a) or encode(*a, **k))
    counts = []
    for name_space in ("a", "a", "b", "b", None, None, "a"):
        tokenizer.encode_with_counts(Rendered("<think>x</think>y"), (), name_space)
        counts.append(len(encoded))
        encoded.clear()
    assert counts == [3, 0, 3, 0, 3, 3, 0]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_control_tokens_that_look_around_them_are_found_as_in_one_piece(made_checkpoint, flag):
    backend = tokenizers.Tokenizer.from_file(str(made_checkpoint / "tokenizer.json"))
    backend.add_tokens([AddedToken("KEY", **{"normalized": False, flag: True})])
    tokenizer = Tokenizer(backend)
    for text in ("a KEY b", "aKEYb", "a  KEY  <think>", "<think> KEY<think>", "KEY", "<think>KEYb", "  KEY KEYKEY"):
        assert tokenizer.encode_rendered(Rendered(text)) == backend.encode(text, add_special_tokens=False).ids


def test_a_cache_forgets_what_was_used_longest_ago_and_stays_within_its_size():
    cache = SizedCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    cache.put("a", 5, 9)
    assert [cache.get(key) for key in "abc"] == [5, None, None]
    cache.put("d", 6, 11)
    assert [cache.get(key) for key in "ad"] == [5, None], "what fits nowhere drives nothing out"


def test_truncation_and_padding_in_tokenizer_json_do_not_apply(copied_checkpoint):
    backend = tokenizers.Tokenizer.from_file(str(copied_checkpoint / "tokenizer.json"))
    expected = backend.encode("one two three").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(copied_checkpoint / "tokenizer.json"))
    assert Tokenizer.from_directory(copied_checkpoint).encode("one two three") == expected


def damaged(path, name, content):
    (path / name).write_bytes(content) if content is not None else (path / name).unlink()
    return pytest.raises(ConfigError, match=name)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b"null"])
def test_a_bad_tokenizer_json_is_a_config_error_that_names_it(copied_checkpoint, content):
    with damaged(copied_checkpoint, "tokenizer.json", content):
        Tokenizer.from_directory(copied_checkpoint)


def test_a_half_written_tokenizer_json_is_a_config_error(copied_checkpoint):
    whole = (copied_checkpoint / "tokenizer.json").read_bytes()
    for cut in range(0, len(whole) - 2, len(whole) // 20):
        with damaged(copied_checkpoint, "tokenizer.json", whole[:cut]):
            Tokenizer.from_directory(copied_checkpoint)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"eos_token": ', b"[1]", b'{"eos_token": 5}', b'{"eos_token": "<nope>"}', b'{"pad_token": {"content": 1}}'],
)
def test_a_bad_tokenizer_config_is_a_config_error_that_names_it(copied_checkpoint, content):
    with damaged(copied_checkpoint, "tokenizer_config.json", content):
        Tokenizer.from_directory(copied_checkpoint)


def test_tokenizer_config_is_optional_and_tokens_may_be_objects(copied_checkpoint):
    file = copied_checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}))
    assert Tokenizer.from_directory(copied_checkpoint).special_tokens == {"eos_token": "<|im_end|>"}
    file.unlink()
    assert Tokenizer.from_directory(copied_checkpoint).eos_id is None


def test_another_kind_of_tokenizer_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="ByteLevel, not WordPiece"):
        Tokenizer(backend)


def test_a_control_token_that_ordinary_text_also_gives_is_refused():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["ab"])
    with pytest.raises(ConfigError, match="'ab' has no spelling as ordinary text"):
        Tokenizer(backend)


LONG = {
    "words": "The price of kelp, as we've said, is 5 a box; größe naïve don't stop.\n",
    "lines of code": "    for i in range(10):\n\treturn values[i]  # what else?\n\n",
    "Chinese": "海带的价格是多少，码头上还有几箱。",  # noqa: RUF001
    "white space": "word   \n\n  word \t word\r\n",
    "marks": "e\u0301 o\u0308 \u1112\u1161\u11ab ",
    "control tokens": "a <|im_start|>user\nwords and <think> more<|im_end|>\n",
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_that_is_encoded_in_pieces_has_the_ids_of_the_whole(tokenizer, monkeypatch, name):
    text = LONG[name] * (20_000 // len(LONG[name]))
    whole = tokenizer._backend.encode(text).ids, tokenizer._plain.encode(text).ids
    monkeypatch.setattr("tokenspeed.engine.text.tokenizer._PIECE", 50)
    pieces = list(tokenizer._cut(tokenizer._backend, text))
    assert "".join(pieces) == text and (len(pieces) > 50 or name in ("marks",))
    assert (tokenizer.encode(text), tokenizer.encode_text(text)) == whole


@FEW
@given(text=st.text(alphabet="ab '1,，。é\u0301\n\r\t <|im_end|>nextK你", min_size=50))  # noqa: RUF001
def test_any_text_in_pieces_has_the_ids_of_the_whole(tokenizer, text):
    whole = tokenizer._backend.encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenspeed.engine.text.tokenizer._PIECE", 5)
        assert tokenizer.encode(text) == whole


def test_a_long_text_is_given_up_between_its_pieces(tokenizer):
    stop = threading.Event()
    stop.set()
    token = interrupt.set(stop)
    try:
        with pytest.raises(Interrupted):
            tokenizer.encode("some words " * 20_000)
    finally:
        interrupt.reset(token)


def test_many_ids_have_the_text_that_few_at_a_time_have(tokenizer):
    ids = tokenizer.encode("größe 你好 <|im_end|> 🙂 " * 20)
    assert tokenizer.decode_long(ids) == tokenizer.decode(ids, skip_special_tokens=False)
