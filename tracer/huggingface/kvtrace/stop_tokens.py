"""After which tokens a model has written all that it was to write."""

import json
import pathlib

from transformers.utils import cached_file

from .errors import CaptureError
from .text import token_pieces

# What models are trained to end their turns with, where that is not the end of the sequence. Only a template that writes
# one of them says that this model does.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
                 "<end_of_utterance>", "<|endofturn|>", "[|endofturn|]")

# Between the parts of an answer where there are answers of several, whose end then has another name.
_END_OF_PART, _END_OF_ANSWER = "<|end|>", "<|return|>"


def model_stop_ids(model, tokenizer):
    """What the model itself stops after, ascending: the ids that its files name, eos_token of its tokenizer (None: it has
    none), and what ends a turn in its chat template."""
    decoder = model.config.get_text_config(decoder=True)
    ids = set()
    for said in _eos_of_files(model, decoder):
        ids.update(said if isinstance(said, (list, tuple)) else [said] if said is not None else [])
    names = _names(tokenizer) if tokenizer is not None else set()
    if names:
        vocabulary = tokenizer.get_vocab()
        ids.update(vocabulary[name] for name in names if name in vocabulary)
    return sorted(token_id for token_id in ids if 0 <= token_id < decoder.vocab_size)


def named_stop_ids(stops, vocab_size, tokenizer):
    """Those that a user names, ascending: ids in decimal, or texts that are exactly a token, all tokens of which are meant."""
    ids, texts = set(), set()
    for stop in stops:
        if not (stop.isascii() and stop.isdigit()):
            texts.add(stop)
        elif int(stop) < vocab_size:
            ids.add(int(stop))
        else:
            raise CaptureError(f"--stop {stop}: is not in the model's vocabulary of {vocab_size}")
    if not texts:
        return sorted(ids)
    if tokenizer is None:
        raise CaptureError(f"--stop {_shown(min(texts))}: the model has no tokenizer that could read it; give the token's "
                           "id")
    known = range(min(vocab_size, len(tokenizer)))
    pieces = token_pieces(tokenizer, known)
    for text in sorted(texts):
        found = [token_id for token_id, piece in zip(known, pieces) if piece == text]
        if not found:
            parts = token_pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
            raise CaptureError(f"--stop {_shown(text)}: is no single token of the model, but "
                               f"{' '.join(chr(34) + _shown(part) + chr(34) for part in parts)}; give one that it is, or its id")
        ids.update(found)
    return sorted(ids)


def _shown(text):
    return text.replace("\n", "\\n")


def _eos_of_files(model, decoder):
    """What stands in the model's files: its configuration has ids of its class besides, where a file names none."""
    name = model.config._name_or_path
    content = _content(name, "config.json")
    if content is None:  # a model of no file
        return model.generation_config.eos_token_id, model.config.eos_token_id, decoder.eos_token_id
    generation = _content(name, "generation_config.json") or {}
    text = content.get("text_config") or {}
    return generation.get("eos_token_id"), content.get("eos_token_id"), text.get("eos_token_id")


def _content(name, file):
    """Of a file of the model, which is here: it was loaded. None where there is none."""
    try:
        path = cached_file(name, file, local_files_only=True) if name else None
    except OSError:
        path = None
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8")) if path else None


def _names(tokenizer):
    names = {tokenizer.eos_token} if tokenizer.eos_token is not None else set()
    templates = tokenizer.chat_template or ""
    templates = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    names.update(name for name in _ENDS_OF_TURN if name in templates)
    if _END_OF_ANSWER in templates:
        names.add(_END_OF_ANSWER)
    elif _END_OF_PART in templates:
        names.add(_END_OF_PART)
    return names
