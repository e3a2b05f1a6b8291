"""The text of tokens, and spans of texts."""

import re

import pytest
import tokenizers
import transformers
from conftest import ROOT

import kvtrace
from kvtrace.spans import locate_spans, locate_turns, read_spans, read_turns
from kvtrace.text import encode, token_pieces

TEXT = "The café's cat says “hello”.\n\n\tA needle: 12345 🙂 and  two spaces. A needle again."


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer, as Llama 3's and Qwen's, with a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="module")
def sentencepiece():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "traces/demo-model")


def test_pieces_of_byte_level_tokens_make_up_the_text(byte_level):
    pieces = token_pieces(byte_level, encode(byte_level, TEXT).ids)
    # Of a character that several tokens share, each token has bytes.
    data = re.sub(rb"<0x([0-9A-F]{2})>", lambda match: bytes([int(match[1], 16)]), "".join(pieces).encode())
    assert data.decode() == TEXT
    assert any("needle" in piece or "need" in piece for piece in pieces)


def test_pieces_of_sentencepiece_tokens_make_up_the_text(sentencepiece):
    text = "The needle: 12345 and  two spaces.\nA needle again."
    pieces = token_pieces(sentencepiece, encode(sentencepiece, text).ids)
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]) == " " + text


def test_special_and_unknown_tokens_are_named(byte_level):
    assert token_pieces(byte_level, [byte_level.eos_token_id, 99999]) == ["<|end|>", "<99999>"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_every_occurrence_of_a_text_is_a_span(kind, request):
    tokenizer = request.getfixturevalue(kind)
    encoding = encode(tokenizer, TEXT)
    spans = locate_spans([{"label": "n", "text": "needle"}, {"label": "all", "text": TEXT}], encoding, len(encoding.ids))
    assert [label for _, _, label in spans] == ["n", "n", "all"]
    pieces = token_pieces(tokenizer, encoding.ids)
    for start, end, _ in spans[:2]:
        covered = "".join(pieces[start:end])
        assert "needle" in covered and len(covered) < 20
    assert spans[2][1] == len(encoding.ids)


@pytest.mark.parametrize(("request_", "message"), [
    ({"label": "x", "text": "nowhere"}, "does not occur"),
    ({"label": "x", "start": 0, "end": 99999}, "is not a range"),
    ({"label": "x", "start": 3, "end": 3}, "is not a range"),
    ({"label": "x"}, 'needs either a "text"'),
    ({"label": "x", "text": ""}, "not empty"),
    ({"label": "x", "text": "a", "start": 1, "end": 2}, 'needs either a "text"'),
    ({"label": "x", "start": 1}, "must be token positions"),
    ({"text": "a"}, 'needs a "label"'),
])
def test_wrong_spans_are_refused(request_, message, sentencepiece):
    encoding = encode(sentencepiece, TEXT)
    with pytest.raises(kvtrace.CaptureError, match=message):
        locate_spans([request_], encoding, len(encoding.ids))


def test_wrong_span_files_are_refused(tmp_path):
    path = tmp_path / "spans.json"
    for content, message in (("{", "is not a JSON list"), ("{}", "is not a JSON list"), ('[{"label": 3}]', "entry 1")):
        path.write_text(content)
        with pytest.raises(kvtrace.CaptureError, match=message):
            read_spans(path)
    with pytest.raises(kvtrace.CaptureError, match="cannot be read"):
        read_spans(tmp_path / "missing.json")


def test_nothing_is_added_to_a_chat_that_a_template_wrote(sentencepiece):
    plain = encode(sentencepiece, TEXT)
    assert plain.ids[0] == sentencepiece.bos_token_id
    assert encode(sentencepiece, TEXT, templated=True).ids == plain.ids[1:]
    assert encode(sentencepiece, f"{sentencepiece.bos_token}{TEXT}", templated=True).ids[0] == sentencepiece.bos_token_id


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_turns_begin_where_their_text_does(kind, request):
    tokenizer = request.getfixturevalue(kind)
    encoding = encode(tokenizer, TEXT)
    turns = locate_turns([{"character": TEXT.index("and  two")}, 0, {"text": "needle"}], encoding, len(encoding.ids))
    starts = [start for start, role in turns if role is None]
    assert len(starts) == 4 and starts == sorted(starts) and starts[0] == 0
    assert [start for start, _, _ in locate_spans([{"label": "", "text": "needle"}], encoding, len(encoding.ids))] == [
        starts[1], starts[3]]
    begin, end = encoding.ranges[starts[2]]
    assert begin <= TEXT.index("and  two") < end


@pytest.mark.parametrize(("request_", "message"), [
    ({"text": "nowhere"}, 'turn "nowhere": does not occur'),
    ({"character": 99999}, "turn at character 99999: does not occur"),
    (99999, "turn at 99999: is not one of the"),
    ({"text": ""}, "must be a token position"),
    ({"character": -1}, "must be a token position"),
    ({"text": "a", "character": 1}, "must be a token position"),
    (-1, "must be a token position"),
    (True, "must be a token position"),
    ({"position": "1"}, "must be a token position"),
    ({"role": "user"}, "must be a token position"),
    ({"position": 1, "role": ""}, "must be a token position"),
    ({"position": 99999, "role": "user"}, "turn at 99999: is not one of the"),
    ("needle", "must be a token position"),
])
def test_wrong_turns_are_refused(request_, message, sentencepiece):
    encoding = encode(sentencepiece, TEXT)
    with pytest.raises(kvtrace.CaptureError, match=message):
        locate_turns([request_], encoding, len(encoding.ids))


def test_turns_that_begin_at_one_token_are_refused():
    with pytest.raises(kvtrace.CaptureError, match="two turns begin at token 4"):
        locate_turns([4, 2, 4], None, 9)
    with pytest.raises(kvtrace.CaptureError, match="can only be found in a text prompt"):
        locate_turns([{"text": "a"}], None, 9)
    with pytest.raises(kvtrace.CaptureError, match='turn 2: has no "role", though others have'):
        locate_turns([{"position": 4, "role": "user"}, 2], None, 9)
    turns = locate_turns([{"position": 4, "role": "user"}, {"position": 2, "role": "system"}], None, 9)
    assert turns == [(2, "system"), (4, "user")]


def test_wrong_turn_files_are_refused(tmp_path):
    path = tmp_path / "turns.json"
    for content, message in (("{", "is not a JSON list"), ("[]", "names no turns"), ("[0, {}]", "entry 2: must be a token"),
                             ('[{"position": 0, "role": "user"}, 4]', 'entry 2: has no "role"')):
        path.write_text(content)
        with pytest.raises(kvtrace.CaptureError, match=message):
            read_turns(path)


def test_text_that_was_not_run_is_refused(sentencepiece, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "traces/demo-model", dtype="float32").eval()
    ids = sentencepiece("Another text.", return_tensors="pt")["input_ids"]
    with pytest.raises(kvtrace.CaptureError, match="does not give the token ids"):
        with kvtrace.capture(model, tmp_path / "run.h5", tokenizer=sentencepiece, prompt="One text.",
                             prompt_length=ids.shape[1]):
            model(ids)
