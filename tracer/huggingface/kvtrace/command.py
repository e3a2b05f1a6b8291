"""kvtrace-capture: runs a Hugging Face model once and records what its attention saw into a trace."""

import json
import math
import os
import pathlib
import sys
import time

from .console import (Parser, add_model_options, check_model_name, check_model_options, counted, first_line, load_model, run,
                      say, size_text)
from .errors import CaptureError, UsageError


def _parser():
    parser = Parser("kvtrace-capture", "Run a Hugging Face model once and record what its attention saw into a trace.")
    add_model_options(parser, "what the model runs in and the trace holds", "what the weights are")
    add = parser.add_argument
    add("-p", "--prompt-file", "--prompt", dest="prompt", metavar="FILE",
        help="text file to run the model on; - reads standard input")
    add("--tokens", metavar="FILE",
        help="instead of a text: a file of decimal token ids, taken as given; - reads standard input")
    add("--templated", action="store_true",
        help="the prompt is a chat as the model's template writes it, its special tokens included: none is added")
    add("-n", "--max-new-tokens", "--generate", dest="generate", type=int, default=0, metavar="N",
        help="tokens to generate after the prompt (default: 0)")
    add("--temperature", type=float, default=0.0, metavar="T",
        help="draw the tokens that are generated, at this temperature (default: 0, the most likely ones)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens alone (default: from all)")
    add("--top-p", type=float, metavar="P",
        help="draw from the fewest most likely tokens whose probabilities come to P (default: 1, from all)")
    add("--seed", type=int, metavar="N",
        help="seed of what is drawn, by PyTorch's generator; the same one gives the same tokens (default: 0)")
    add("--stop", action="append", default=[], metavar="ID|TEXT",
        help="a further token to stop after, by id or by text that is a single token; may be repeated")
    add("--ignore-stop", action="store_true", help="go on where the model would end its text")
    add("--queries", default="all", metavar="all|window:N",
        help="queries to record: window:N for the last N of the prompt and all after it (default: all)")
    add("--attention-mass", action="store_true",
        help="also record how much attention each key received from all prompt queries; takes time quadratic in the prompt")
    add("--no-projection", action="store_true", help="leave out the layers' output projections")
    add("--spans", metavar="FILE",
        help='JSON list of things to follow: {"label": ..., "text": ...}, every occurrence in the prompt, or '
        '{"label": ..., "start": ..., "end": ...} in token positions')
    add("--turns", metavar="FILE",
        help='JSON list of where turns of the conversation begin: token positions, {"text": ...}, every occurrence in the '
        'prompt, or {"character": ...}, an offset into its text; a "role" beside it says who speaks')
    add("--prefill-chunk", type=int, metavar="N", help="run the prompt in pieces of N tokens (default: in one)")
    add("-o", "--output", default="run.h5", metavar="FILE", help="trace to write, replaced if it exists (default: run.h5)")
    return parser


def _read(path):
    try:
        if path == "-":
            return sys.stdin.buffer.read()
        return pathlib.Path(path).read_bytes()
    except OSError as problem:
        raise CaptureError(f"{path}: cannot be read: {problem.strerror}") from None


def _name(path):
    return "standard input" if path == "-" else pathlib.Path(path).name


def _read_prompt(path):
    data = _read(path)
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        # What is not UTF-8 would reach the model as something else than what stands in the file.
        raise CaptureError(f"{_name(path)}: byte {problem.start} is not UTF-8 text; convert it, or give token ids with "
                           "--tokens") from None
    if not text:
        raise CaptureError(f"{_name(path)}: the prompt is empty")
    return text


def _read_ids(path):
    ids = []
    for word in _read(path).split():
        if not (word.isdigit() and int(word) < 2**31):
            shown = json.dumps(word[:40].decode(errors="replace"), ensure_ascii=False)
            raise CaptureError(f"{_name(path)}: {shown} is not a token id")
        ids.append(int(word))
    if not ids:
        raise CaptureError(f"{_name(path)}: holds no token ids")
    return ids


def _check(arguments):
    """What can be known to be wrong before anything is read."""
    from .capture import parse_queries

    if (arguments.prompt is None) == (arguments.tokens is None):
        raise UsageError("capture needs a prompt: either --prompt-file FILE or --tokens FILE (- reads standard input)")
    for name in ("model", "prompt", "tokens", "spans", "turns", "output"):
        if getattr(arguments, name) == "":
            raise UsageError(f"--{name}: the file's name is empty")
    if arguments.generate < 0:
        raise UsageError(f"--max-new-tokens {arguments.generate}: must not be negative")
    if arguments.templated and arguments.prompt is None:
        raise UsageError("--templated says how a --prompt-file is written; --tokens are taken as given")
    _check_generation(arguments)
    if arguments.prefill_chunk is not None and arguments.prefill_chunk < 1:
        raise UsageError(f"--prefill-chunk {arguments.prefill_chunk}: must be at least 1")
    check_model_options(arguments)
    parse_queries(arguments.queries)
    output = pathlib.Path(arguments.output)
    if output.exists():
        for path in (arguments.prompt, arguments.tokens, arguments.spans, arguments.turns):
            if path is not None and os.path.exists(path) and os.path.samefile(output, path):
                raise UsageError(f"{output}: the trace would overwrite what it is made from; name another file with -o")
        folder = output.absolute().parent
        if os.path.isdir(arguments.model) and os.path.samefile(folder, arguments.model):
            raise UsageError(f"{output}: the trace would overwrite a file of the model; name another file with -o")


def _check_generation(arguments):
    """What is said of the tokens that are generated."""
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise UsageError(f"--temperature {arguments.temperature}: must be a number, at least 0")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UsageError(f"--top-k {arguments.top_k}: must be at least 1")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p {arguments.top_p}: must be above 0 and at most 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        raise UsageError(f"--seed {arguments.seed}: must be from 0 to {2**31 - 1}")
    if "" in arguments.stop:
        raise UsageError("--stop: an empty text is no token")
    drawing = [name for name in ("top_k", "top_p", "seed") if getattr(arguments, name) is not None]
    said = [*(["temperature"] if arguments.temperature > 0 else []), *drawing, *(["stop"] if arguments.stop else []),
            *(["ignore_stop"] if arguments.ignore_stop else [])]
    if said and arguments.generate == 0:
        raise UsageError(f"--{said[0].replace('_', '-')} is of what the model generates: ask for that with --generate N")
    if drawing and arguments.temperature == 0:
        raise UsageError(f"--{drawing[0].replace('_', '-')} is of tokens that are drawn: ask for that with --temperature, as "
                         "in --temperature 0.7")


def _how(arguments):
    """How tokens are chosen, in words."""
    text = "greedy decoding"
    if arguments.temperature > 0:
        text = f"sampling at temperature {arguments.temperature:g}"
        if arguments.top_k is not None:
            text += f", top-k {arguments.top_k}"
        if arguments.top_p is not None and arguments.top_p < 1:
            text += f", top-p {arguments.top_p:g}"
        text += f", seed {arguments.seed or 0}"
    return text + (", the model's stop tokens ignored" if arguments.ignore_stop else "")


def _load_tokenizer(model, needed):
    import transformers

    check_model_name(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        # Where its files are missing, some classes make one that knows special tokens alone.
        if set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder):
            return tokenizer
        reason = "there are no files of one; give token ids with --tokens"
    except Exception as problem:  # of many kinds, with every file that may be missing or wrong
        reason = first_line(problem)
    if needed:
        raise CaptureError(f"{model}: its tokenizer cannot be loaded: {reason}") from None
    return None


def _generate(model, ids, ends, arguments):
    """Runs the model up to one of the tokens `ends`, without what its generation_config.json may ask for besides. The
    generated ids, and the seconds until the first and the last."""
    import torch
    import transformers

    start = time.monotonic()
    times = []
    prompt = torch.tensor([ids], device=model.get_input_embeddings().weight.device)

    def note(*_, **__):
        times.append(time.monotonic() - start)
        return torch.zeros(1, dtype=torch.bool, device=prompt.device)

    drawing = {}
    if arguments.temperature > 0:
        # None would stand for 50 most likely tokens.
        drawing = {"temperature": arguments.temperature, "top_k": arguments.top_k or 0, "top_p": arguments.top_p or 1.0}
        torch.manual_seed(arguments.seed or 0)
    settings = transformers.GenerationConfig(
        max_new_tokens=max(1, arguments.generate), do_sample=arguments.temperature > 0, **drawing, num_beams=1,
        eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, prefill_chunk_size=arguments.prefill_chunk)
    # What these settings leave open, transformers would take from the model's own.
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        result = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
                                stopping_criteria=transformers.StoppingCriteriaList([note]))
    finally:
        model.generation_config = own
    generated = result[0, len(ids):].tolist()
    return generated[: arguments.generate], times[0], times[-1]


def _text_after(tokenizer, ids, generated):
    """What the run generated, without special tokens and with the space that a text's first word would lose."""
    before, whole, alone = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + generated, generated))
    return whole[len(before):] if whole.startswith(before) else alone


def _capture(arguments):
    _check(arguments)
    from .spans import read_spans, read_turns

    text = _read_prompt(arguments.prompt) if arguments.prompt is not None else None
    ids = _read_ids(arguments.tokens) if text is None else None
    spans = read_spans(arguments.spans) if arguments.spans is not None else []
    turns = read_turns(arguments.turns) if arguments.turns is not None else []
    name = _name(arguments.prompt if text is not None else arguments.tokens)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    from .capture import capture
    from .output_file import OutputFile
    from .spans import locate_spans, locate_turns
    from .stop_tokens import model_stop_ids, named_stop_ids
    from .text import encode, token_pieces

    # A long run should not end at a folder that cannot be written to.
    OutputFile(arguments.output).abandon()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = _load_tokenizer(arguments.model, needed=text is not None)
    encoding = None
    if text is not None:
        encoding = encode(tokenizer, text, arguments.templated)
        ids = encoding.ids
    locate_spans(spans, encoding, len(ids))
    locate_turns(turns, encoding, len(ids))
    model = load_model(arguments, arguments.dtype)
    config = model.config.get_text_config(decoder=True)
    for position, token_id in enumerate(ids):
        if token_id >= config.vocab_size:
            raise CaptureError(f"{name}: token id {token_id} at position {position} is not in the model's vocabulary of "
                               f"{config.vocab_size}")
    own_ends = [] if arguments.ignore_stop else model_stop_ids(model, tokenizer)
    ends = sorted({*own_ends, *named_stop_ids(arguments.stop, config.vocab_size, tokenizer)})
    most = len(ids) + max(0, arguments.generate - 1)
    context = getattr(config, "max_position_embeddings", None)
    if context and most > context:
        say(f"warning: the run may take {most} positions, but {arguments.model} was made for {context}; what lies "
             "beyond may be unlike it")

    with capture(model, arguments.output, queries=arguments.queries, attention_mass=arguments.attention_mass,
                 output_projection=not arguments.no_projection, prompt_length=len(ids), tokenizer=tokenizer, prompt=text,
                 templated=arguments.templated, spans=spans, turn_starts=turns, most_tokens=most,
                 source=f"prompt {name}, {_how(arguments)}"):
        generated, prefill, total = _generate(model, ids, ends, arguments)

    line = f"prefill: {counted(len(ids), 'token')} in {prefill:.2f} s ({len(ids) / prefill:.1f} tokens/s)"
    if len(generated) > 1:
        steps, seconds = len(generated) - 1, total - prefill
        line += f", decode: {counted(steps, 'token')} in {seconds:.2f} s ({steps / seconds:.1f} tokens/s)"
    say(line)
    queries = len(ids) + max(0, len(generated) - 1)
    if arguments.queries != "all":
        queries -= max(0, len(ids) - int(arguments.queries.partition(":")[2]))
    print(f"{arguments.output}: {size_text(os.path.getsize(arguments.output))}, "
          f"{counted(config.num_hidden_layers, 'layer')}, {counted(len(ids), 'prompt token')}, "
          f"{counted(queries, 'captured query')}")
    ended = bool(generated) and generated[-1] in ends
    ending = ""
    if ended:
        [piece] = token_pieces(tokenizer, generated[-1:]) if tokenizer is not None else [""]
        ending = f", ended by token {generated[-1]}"
        if piece:
            shown = piece.replace(chr(10), "\\n")
            ending = f", ended by {shown} (token {generated[-1]})"
    if generated:
        shown = _text_after(tokenizer, ids, generated) if tokenizer is not None else " ".join(map(str, generated))
        print(f"generated {counted(len(generated), 'token')}{ending}: {shown}")
    if len(generated) < 2:
        # The last generated token is not fed back, so one alone brings no query.
        remedy = ("the first token ended the text; go on with --ignore-stop, or replay it with an earlier --evict-at" if ended
                  else "--max-new-tokens 2 or more adds some")
        say(f"note: the trace has no query after the prompt, so eviction at its end cannot be measured; {remedy}")


def main(arguments=None):
    """Returns the exit code."""
    return run("kvtrace-capture", lambda: _capture(_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
