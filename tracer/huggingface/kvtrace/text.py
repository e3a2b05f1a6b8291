"""Token ids of a text, and the text of a token id."""

import codecs
import dataclasses
import functools
import json

from .errors import CaptureError

_SENTENCEPIECE_SPACE = "\u2581"


@dataclasses.dataclass
class Encoding:
    """A tokenized text."""

    text: str
    ids: list
    ranges: list | None  # for each token the characters [start, end) that it stands for; None: cannot be told


def encode(tokenizer, text, templated=False):
    """Tokenizes as the model's own pipelines do: with BOS where the tokenizer adds it, and without any of that where the text
    is a chat that a template has written out."""
    if not text:
        raise CaptureError("the prompt is empty")
    if tokenizer.is_fast:
        result = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
        encoding = Encoding(text, list(result["input_ids"]), [tuple(pair) for pair in result["offset_mapping"]])
        nothing = all(start == end for start, end in encoding.ranges)
    else:
        encoding = Encoding(text, list(tokenizer(text, add_special_tokens=not templated)["input_ids"]), None)
        nothing = not encoding.ids
    if nothing:
        raise CaptureError("the tokenizer finds no token in the prompt")
    return encoding


@functools.cache
def _byte_of():
    """Byte-level tokenizers write each byte as a printable character: itself, or the next free one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return table


def _is_byte_level(tokenizer):
    if not tokenizer.is_fast:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def token_pieces(tokenizer, ids):
    """What each token stands for, as valid text: bytes that are none and unknown ids are named in angle brackets."""
    byte_level = _is_byte_level(tokenizer)
    special = set(tokenizer.added_tokens_decoder)
    pieces = {}
    for token_id in set(ids):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            piece = f"<{token_id}>"
        elif token_id in special:
            piece = token
        elif byte_level and all(character in _byte_of() for character in token):
            piece = _text_of(bytes(_byte_of()[character] for character in token))
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            piece = _text_of(bytes([int(token[3:5], 16)]))
        else:
            piece = token.replace(_SENTENCEPIECE_SPACE, " ")
        pieces[token_id] = piece
    return [pieces[token_id] for token_id in ids]


def _name_bytes(problem):
    return "".join(f"<0x{byte:02X}>" for byte in problem.object[problem.start : problem.end]), problem.end


codecs.register_error("kvtrace-names", _name_bytes)


def _text_of(data):
    # A text with a zero would end there in an HDF5 file.
    return data.decode(errors="kvtrace-names").replace("\0", "<0x00>")
