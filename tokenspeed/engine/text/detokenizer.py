"""Ids to text, one id at a time."""

import codecs

from .tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding of one sequence: linear time, never half a UTF-8 character.

    The concatenation of all `push` results and `finish` equals `tokenizer.decode` of all the ids, and after each push
    at most the bytes of one unfinished character (three) are held back. `tokenizers.decoders.DecodeStream` is not used
    because it lacks both: it holds back all text that ends in U+FFFD, even where the bytes are truly invalid and no id
    can mend them, has no way to flush what it holds, and decodes all of that again at each step (quadratic).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; "" while a character is unfinished. Truly invalid bytes give U+FFFD."""
        return "" if id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left at the end of the sequence: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)
