"""Things worth following through a run, such as a planted needle: asked for by text or by position."""

import json

from .errors import CaptureError


def read_spans(path):
    """A JSON list of {"label": ..., "text": ...} and {"label": ..., "start": ..., "end": ...}, checked."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError:
        raise CaptureError(f"{path}: cannot be read") from None
    except ValueError:
        content = None
    if not isinstance(content, list):
        raise CaptureError(f'{path}: is not a JSON list such as [{{"label": "needle", "text": "..."}}]')
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
        text, at = request["text"], encoding.text.find(request["text"])
        if at < 0:
            raise CaptureError(f"span {name}: its text does not occur in the prompt")
        while at >= 0:
            tokens = [token for token, (start, end) in enumerate(encoding.ranges)
                      if start < end and start < at + len(text) and end > at]
            if not tokens:
                raise CaptureError(f"span {name}: no token stands for its text")
            spans.append((tokens[0], tokens[-1] + 1, request["label"]))
            at = encoding.text.find(text, at + len(text))
    return spans
