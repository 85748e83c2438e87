"""Text of single tokens: with whole characters, with visible bytes and blanks, and grouped into words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

BLANKS = {"\n": "↵", "\t": "⇥", " ": "␣"}
LOOSE_BYTES = re.compile("[\udc80-\udcff]")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one, with every character whole, on the token that completes it.

    Tokenizers that work on bytes may spread one character over several tokens. Decoded alone, each of these would be a
    replacement character. The last of these tokens gets the whole character. The bytes of the others, and bytes that
    never make a character, are lone surrogates in the text, U+DC80 to U+DCFF, as in Python's `surrogateescape`.

    Args:
        tokenizer: A tokenizer of transformers, or anything with `decode`. Characters that are spread over tokens
            are put together for byte-level tokenizers and for those with byte fallback.
        ids: (T,) token numbers.

    Returns:
        (T,) texts. Joined, and without the lone surrogates of complete characters, they are the text of all tokens.
    """
    to_bytes = _piece_reader(tokenizer)
    pieces = [to_bytes(int(token)) for token in ids]
    owner = [index for index, piece in enumerate(pieces) for _ in piece]
    texts, start = [""] * len(pieces), 0
    for char in b"".join(pieces).decode("utf-8", "surrogateescape"):
        encoded = char.encode("utf-8", "surrogateescape")
        last = owner[start + len(encoded) - 1]
        for place, byte in enumerate(encoded, start):
            if owner[place] != last:
                texts[owner[place]] += chr(0xDC00 + byte)
        texts[last] += char
        start += len(encoded)
    return texts


def _piece_reader(tokenizer: Any) -> Callable[[int], bytes]:
    """Return a function that gives the bytes of a token."""

    def decoded(token: int) -> bytes:
        return tokenizer.decode([token]).encode("utf-8", "surrogatepass")

    # A processor of texts and images has the tokenizer inside.
    backend = getattr(getattr(tokenizer, "tokenizer", tokenizer), "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if backend is None or decoder is None:
        return decoded
    added, kind = backend.get_added_tokens_decoder(), decoder.__getstate__().decode()
    if '"ByteLevel"' in kind:
        # GPT-2's alphabet, in which every byte is a printable character.
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}

        def read(piece: str) -> bytes:
            return b"".join(byte_of.get(char, char.encode()) for char in piece)

    elif '"▁"' in kind:

        def read(piece: str) -> bytes:
            byte = BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    else:
        return decoded

    def looked_up(token: int) -> bytes:
        if token in added:
            return added[token].content.encode()
        return read(backend.id_to_token(token) or "")

    return looked_up


def visible(text: str, keep: str = " ") -> str:
    """Replace every invisible character of a text by a visible sign, except those in `keep`.

    Invisible are blanks, control characters, and characters that reorder or join their neighbours (a right-to-left
    override in a token would scramble the rest of the line).
    """
    return "".join(char if char in keep else _visible_char(char) for char in text)


def _visible_char(char: str) -> str:
    if char in BLANKS:
        return BLANKS[char]
    category = unicodedata.category(char)
    return f"⟨U+{ord(char):04X}⟩" if category[0] in "CZ" else char


def words(texts: Sequence[str]) -> Iterator[range]:
    """Yield the range of the tokens of each word.

    A line of the page may break before a word, and not inside it. A word begins at a blank, after a line break, and
    after a character of a script that is written without blanks, unless punctuation follows.
    """
    start = 0
    for index in range(1, len(texts)):
        if _may_break(texts[index - 1], texts[index]):
            yield range(start, index)
            start = index
    if texts:
        yield range(start, len(texts))


def _may_break(before: str, after: str) -> bool:
    if before.endswith("\n") or (after[:1].isspace() and after[:1] != "\n"):
        return True
    return _is_wide(before[-1:]) and not unicodedata.category(after[:1] or "x").startswith("P")


def _is_wide(char: str) -> bool:
    return char != "" and unicodedata.east_asian_width(char) in "WF"
