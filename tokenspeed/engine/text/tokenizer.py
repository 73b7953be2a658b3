"""The checkpoint's tokenizer: tokenizer.json through the `tokenizers` library. No remote code, nothing unpickled."""

import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from ..errors import ConfigError, RequestError
from ..files import read_optional_json_object, read_text
from .interrupt import check_interrupt
from .literals import LiteralGuard, Rendered, any_of
from .sized_cache import SizedCache

_PIECES_BYTES = 32 << 20  # of encoded text that is remembered, about 80 prompts of 50,000 tokens
_ENTRY_BYTES = 450  # of a piece beside its characters and ids
_PIECE = 1 << 16  # characters that are encoded at once: 30 ms and 30 MiB at most
_LONGEST_PIECE = 1 << 20  # where there is no seam before
# A word ends here and something that words do not go on with follows: no tokenizer of this kind takes both together.
_SEAM = re.compile(r"(?<=[^\W\d_])(?=[ ，。、！？][^\W\d_])|(?<=\n)(?=\w)")  # noqa: RUF001
_SEAM_CHARACTERS = frozenset(" \n，。、！？")  # noqa: RUF001
_AROUND_SEAM = 64  # characters on either side that must encode alike together and apart
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A byte-level BPE tokenizer and its added tokens (`<|im_start|>`, `<think>`, ...), the *control tokens*.

    guard: keeps control-token literals in a conversation's strings text; the chat template uses it.
    special_tokens: {"eos_token": "<|im_end|>", ...} from tokenizer_config.json, as chat templates may ask for them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None):
        """Takes over `backend`. Raises ConfigError for another kind of tokenizer than byte-level BPE."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ConfigError(f"tokenizer.json: the decoder must be ByteLevel, not {type(backend.decoder).__name__}")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.control_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        normalized = backend.normalizer is not None and any(token.normalized for token in added.values())
        self.guard = LiteralGuard(
            [token.content for token in added.values()], backend.normalizer.normalize_str if normalized else None
        )
        # The same pipeline without added tokens: it shares the model, so it costs nothing.
        self._plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        for token in added.values():
            if self.control_ids.intersection(self._plain.encode(token.content, add_special_tokens=False).ids):
                raise ConfigError(f"tokenizer.json: {token.content!r} has no spelling as ordinary text")
        raw = [token for token in added.values() if not token.normalized]
        self._raw = re.compile(any_of([token.content for token in raw]))
        # These take white space before them along, or look at what stands there.
        self._clinging = frozenset(token.content for token in raw if token.lstrip or token.single_word)
        contents = [token.content for token in added.values()]
        adds = backend.encode("a", add_special_tokens=True).ids != backend.encode("a", add_special_tokens=False).ids
        # Whether text may be cut at a seam: no control token has one inside, and nothing is put around a prompt.
        self._seams = not adds and not any(_SEAM_CHARACTERS & {*text} or text[:1].isalnum() for text in contents)
        self._pieces: SizedCache[array] = SizedCache(_PIECES_BYTES)
        self._bytes_of_id: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where present, tokenizer_config.json. Raises ConfigError, which names the file."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        text = read_text(file)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} is not a tokenizer (half-written?): {error}") from None
        config_file = directory / "tokenizer_config.json"
        config = read_optional_json_object(config_file)
        special_tokens = {}
        for name in _SPECIAL_TOKEN_NAMES:
            value = config.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if content is None:
                continue
            if not isinstance(content, str) or backend.token_to_id(content) is None:
                raise ConfigError(f"{config_file}: {name} is {value!r}, which is not a token of {file.name}")
            special_tokens[name] = content
        return cls(backend, special_tokens)

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows, added tokens included; a model's embedding may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token. Generation stops at every id of GenerationDefaults.eos_ids."""
        return self.token_to_id(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a raw prompt, as `transformers`' tokenizer(prompt) gives them.

        Control-token literals in a raw prompt ARE control tokens: who sends one writes the chat format by hand. Text
        that must stay text goes through the chat template. Raises RequestError for text that is not valid Unicode.
        """
        return self._encode(self._backend, prompt, add_special_tokens=True)

    def encode_text(self, text: str) -> list[int]:
        """The ids of text that is nothing but text: literals of control tokens in it are spelled out."""
        return self._encode(self._plain, text, add_special_tokens=False)

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """The ids of a rendered conversation, in time linear in its length.

        The template's control tokens are control tokens; literals in `rendered.protected` are not. A stretch between
        two control tokens that holds such a literal is encoded as by a tokenizer without added tokens; all else takes
        the ordinary path, so without literals the ids are `transformers`' own.
        """
        return self.encode_with_counts(rendered, ())[0]

    def encode_with_counts(
        self, rendered: Rendered, positions: Sequence[int], name_space: str | None = None
    ) -> tuple[list[int], list[int | None]]:
        """The same ids, and for each of the character positions how many of them come before it.

        None where no control token starts: only before one are the ids surely those of the text before it alone.
        name_space: whose conversation it is. What it has encoded lately from one control token to the next is looked up
        instead, and that it is faster so tells nobody else anything; None remembers nothing.
        """
        ids: list[int] = []
        counts: dict[int, int] = {}
        start = 0
        for text, plain in self._stretches(rendered):
            done = 0
            for cut in () if plain else self._cuts(text):
                ids += self._lately(text[done:cut], plain, name_space)
                counts[start + cut] = len(ids)
                done = cut
            ids += self._lately(text[done:], plain, name_space)
            start += len(text)
        return ids, [counts.get(position) for position in positions]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 reads as U+FFFD, ids the tokenizer does not know as nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_long(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; a piece at a time, as `encode` goes through long texts."""
        pieces = []
        for start in range(0, len(ids), _PIECE):
            check_interrupt()
            pieces += map(self.token_bytes, ids[start : start + _PIECE])
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes `id` stands for, possibly part of a UTF-8 character; b"" for an id the tokenizer does not know."""
        found = self._bytes_of_id.get(id)
        if found is None:
            token = self._backend.id_to_token(id) or ""
            try:
                found = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token spelled with characters outside the byte alphabet
                found = token.encode("utf-8")
            self._bytes_of_id[id] = found
        return found

    def _stretches(self, rendered: Rendered) -> Iterator[tuple[str, bool]]:
        """(text, whether it must be encoded without added tokens), in order; together they are the rendered text."""
        text = rendered.text
        done = 0
        if rendered.protected:
            controls, literals = self.guard.find(rendered)
            after = [0, *(end for _, end in controls)]
            before = [*(start for start, _ in controls), len(text)]
            i = 0
            for literal in literals:
                if literal < done:  # in the stretch just given
                    continue
                while before[i] <= literal:
                    i += 1
                if after[i] > done:
                    yield text[done : after[i]], False
                yield text[after[i] : before[i]], True
                done = before[i]
        if done < len(text):
            yield text[done:], False

    def _cuts(self, text: str) -> list[int]:
        """Where control tokens start that the tokenizer takes out before it looks at anything else: the ids of `text`
        are those of the pieces between them."""
        return [match.start() for match in self._raw.finditer(text) if match[0] not in self._clinging]

    def _lately(self, text: str, plain: bool, name_space: str | None) -> Sequence[int]:
        key = (name_space, plain, text)
        found = None if name_space is None else self._pieces.get(key)
        if found is None:
            backend = self._plain if plain else self._backend
            found = array("i", self._encode(backend, text, add_special_tokens=False))
            if name_space is not None:
                self._pieces.put(key, found, len(text) + 4 * len(found) + _ENTRY_BYTES)
        return found

    def _encode(self, backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text. A long one is encoded in pieces, each without the interpreter's lock, so that its memory
        is bounded, other threads run meanwhile, and it ends where nobody waits for it any more.

        Raises RequestError for what is not valid Unicode, or too long without a place to cut it.
        """
        try:
            if len(text) <= _PIECE:
                return backend.encode(text, add_special_tokens=add_special_tokens).ids
            ids: list[int] = []
            for piece in self._cut(backend, text):
                check_interrupt()
                ids += backend.encode_batch_fast([piece], add_special_tokens=add_special_tokens)[0].ids
            return ids
        except TypeError:  # the library's answer to a lone surrogate
            position = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise RequestError(
                f"the text is not valid Unicode: lone surrogate U+{ord(text[position]):04X} at character {position}"
            ) from None

    def _cut(self, backend: tokenizers.Tokenizer, text: str) -> Iterator[str]:
        """Pieces of a text whose ids, one after the other, are the text's."""
        start = 0
        while len(text) - start > _PIECE:
            limit = start + _LONGEST_PIECE
            seams = _SEAM.finditer(text, start + _PIECE, limit) if self._seams else ()
            end = next((seam.start() for seam in seams if self._holds(backend, text, seam.start())), None)
            if end is None:
                if len(text) > limit:
                    raise RequestError(
                        f"the text has {_LONGEST_PIECE} characters without the end of a word or a line, from character "
                        f"{start} on; it cannot be encoded in pieces of that size."
                    )
                break
            yield text[start:end]
            start = end
        yield text[start:]

    @staticmethod
    def _holds(backend: tokenizers.Tokenizer, text: str, seam: int) -> bool:
        before, after = text[max(seam - _AROUND_SEAM, 0) : seam], text[seam : seam + _AROUND_SEAM]
        both, one, other = backend.encode_batch_fast([before + after, before, after], add_special_tokens=False)
        return both.ids == one.ids + other.ids


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
