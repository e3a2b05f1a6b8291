"""What a user wants marked in a run, by text or by position: things worth following, such as a planted needle, and where
the turns of a conversation begin."""

import json

from .errors import CaptureError


def _read_list(path, example):
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError:
        raise CaptureError(f"{path}: cannot be read") from None
    except ValueError:
        content = None
    if not isinstance(content, list):
        raise CaptureError(f"{path}: is not a JSON list such as {example}")
    return content


def read_spans(path):
    """A JSON list of {"label": ..., "text": ...} and {"label": ..., "start": ..., "end": ...}, checked."""
    content = _read_list(path, '[{"label": "needle", "text": "..."}]')
    for number, entry in enumerate(content, 1):
        reason = _fault(entry)
        if reason:
            raise CaptureError(f"{path}: entry {number}: {reason}")
    return content


def _fault(entry):
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        return 'needs a "label" that is a text'
    has_positions = "start" in entry or "end" in entry
    if ("text" in entry) == has_positions:
        return 'needs either a "text" that occurs in the prompt or a "start" and an "end" in token positions'
    if not has_positions and not (isinstance(entry["text"], str) and entry["text"]):
        return '"text" must be a text that is not empty'
    if has_positions and not all(type(entry.get(key)) is int and 0 <= entry[key] < 2**31 for key in ("start", "end")):
        return '"start" and "end" must be token positions'
    return None


def locate_spans(requests, encoding, prompt_length):
    """Spans (start, end, label) of what is asked for: every occurrence of a text, from the first to the last token that
    stands for a character of it. `encoding` is the tokenized prompt, or None where only its ids are known."""
    spans = []
    for number, request in enumerate(requests, 1):
        reason = _fault(request)
        if reason:
            raise CaptureError(f"span {number}: {reason}")
        name = json.dumps(request["label"], ensure_ascii=False)
        if "text" not in request:
            start, end = request["start"], request["end"]
            if not 0 <= start < end <= prompt_length:
                raise CaptureError(f"span {name}: [{start}, {end}) is not a range of the prompt's {prompt_length} tokens")
            spans.append((start, end, request["label"]))
            continue
        if encoding is None or encoding.ranges is None:
            raise CaptureError(
                f'span {name}: a text can only be found in a text prompt and with a fast tokenizer; give its "start" and '
                '"end" in token positions')
        places = _occurrences(encoding.text, request["text"])
        if not places:
            raise CaptureError(f"span {name}: its text does not occur in the prompt")
        for at in places:
            tokens = _tokens_of(encoding, at, at + len(request["text"]))
            if not tokens:
                raise CaptureError(f"span {name}: no token stands for its text")
            spans.append((tokens[0], tokens[-1] + 1, request["label"]))
    return spans


def _occurrences(text, part):
    """Where it begins, one behind the other."""
    places, at = [], text.find(part)
    while at >= 0:
        places.append(at)
        at = text.find(part, at + len(part))
    return places


def _tokens_of(encoding, begin, end):
    """The tokens that stand for one of the characters [begin, end)."""
    return [token for token, (start, stop) in enumerate(encoding.ranges) if start < stop and start < end and stop > begin]


def read_turns(path):
    """A JSON list of token positions, {"position": ...}, {"text": ...} and {"character": ...}, with a "role" in every entry or
    in none, checked."""
    content = _read_list(path, '[0, 45] or [{"text": "<|im_start|>"}]')
    for number, entry in enumerate(content, 1):
        if not _begins_turns(entry):
            raise CaptureError(f"{path}: entry {number}: {_TURN}")
    if not content:
        raise CaptureError(f"{path}: names no turns")
    number = _first_without_role(content)
    if number is not None:
        raise CaptureError(f"{path}: entry {number}: {_NO_ROLE}")
    return content


_TURN = ('must be a token position, {"text": ...} that begins turns, or {"character": ...}, an offset into the prompt\'s '
         'text; a "role" may stand beside it, and the position is then a "position"')

_NO_ROLE = 'has no "role", though others have; give it to all or to none'


def _begins_turns(entry):
    if not isinstance(entry, dict):
        return _is_position(entry)
    if "role" in entry and not _is_text(entry["role"]):
        return False
    keys = entry.keys() - {"role"}
    if keys == {"text"}:
        return _is_text(entry["text"])
    return (keys == {"character"} or keys == {"position"}) and _is_position(*(entry[key] for key in keys))


def _role(entry):
    return entry.get("role") if isinstance(entry, dict) else None


def _first_without_role(entries):
    """The number of the first that has none where others have; None where all are alike."""
    without = [number for number, entry in enumerate(entries, 1) if _role(entry) is None]
    return without[0] if without and len(without) < len(entries) else None


def _is_text(value):
    return isinstance(value, str) and value != ""


def _is_position(value):
    return type(value) is int and 0 <= value < 2**31


def locate_turns(requests, encoding, length):
    """Where turns begin among `length` tokens, and who speaks (None where nobody is named), in their order. `encoding` is the
    tokenized prompt, or None where only its ids are known."""
    turns = []
    for number, request in enumerate(requests, 1):
        if not _begins_turns(request):
            raise CaptureError(f"turn {number}: {_TURN}")
        position = request.get("position") if isinstance(request, dict) else request
        if position is not None:
            if position >= length:
                raise CaptureError(f"turn at {position}: is not one of the {length} tokens")
            turns.append((position, _role(request)))
            continue
        text, character = request.get("text"), request.get("character")
        name = f"turn at character {character}" if text is None else f"turn {json.dumps(text, ensure_ascii=False)}"
        if encoding is None or encoding.ranges is None:
            raise CaptureError(f"{name}: can only be found in a text prompt and with a fast tokenizer; give its token "
                               "position")
        if text is not None:
            places = [(at, at + len(text)) for at in _occurrences(encoding.text, text)]
        else:
            places = [(character, character + 1)] if character < len(encoding.text) else []
        if not places:
            raise CaptureError(f"{name}: does not occur in the prompt")
        for begin, end in places:
            tokens = _tokens_of(encoding, begin, end)
            if not tokens:
                raise CaptureError(f"{name}: no token stands for its text")
            turns.append((tokens[0], _role(request)))
    number = _first_without_role(requests)
    if number is not None:
        raise CaptureError(f"turn {number}: {_NO_ROLE}")
    turns.sort(key=lambda turn: turn[0])
    for (one, _), (other, _) in zip(turns, turns[1:]):
        if one == other:
            raise CaptureError(f"two turns begin at token {one}")
    return turns


def leaves_turn_open(turns, ids, ends):
    """Whether the last of `turns` in the prompt `ids` is one that the model goes on with: a chat whose other turns all have
    one of the tokens `ends`, as templates write them, and that leaves the last one open."""
    starts = [start for start, _ in turns]
    *others, last = [any(token in ends for token in ids[begin:end]) for begin, end in zip(starts, [*starts[1:], len(ids)])]
    return bool(others) and all(others) and not last
