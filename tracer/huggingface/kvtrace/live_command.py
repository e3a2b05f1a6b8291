"""kvtrace-live: runs a Hugging Face model on what kvreplay's policies kept of its cache, and tells what it loses."""

import os
import pathlib
import sys
import time

import numpy as np

from .console import Parser, add_model_options, check_model_name, check_model_options, counted, load_model, run, say
from .errors import Error, EvictionError, UsageError


def _parser():
    parser = Parser("kvtrace-live", "Run a Hugging Face model on what kvreplay's policies kept of its cache, and tell what it "
                    "loses: the prompt of a trace once, then the tokens after it for each of the kept sets.")
    add_model_options(parser, "what the model runs in", "what the trace holds")
    add = parser.add_argument
    add("-t", "--trace", required=True, metavar="FILE", help="the trace that the kept sets are of, with tokens after its prompt")
    add("-k", "--kept", required=True, metavar="FILE", help="kept sets, as kvreplay replay --kept writes them")
    add("-o", "--output", default="live.h5", metavar="FILE",
        help="results to write, replaced if they exist (default: live.h5)")
    return parser


def _check(arguments):
    check_model_options(arguments)
    for name in ("model", "trace", "kept", "output"):
        if getattr(arguments, name) == "":
            raise UsageError(f"--{name}: the file's name is empty")
    output = pathlib.Path(arguments.output)
    if output.exists():
        for path in (arguments.trace, arguments.kept):
            if os.path.exists(path) and os.path.samefile(output, path):
                raise UsageError(f"{output}: the results would overwrite what they are made from; name another file with -o")
        folder = output.absolute().parent
        if os.path.isdir(arguments.model) and os.path.samefile(folder, arguments.model):
            raise UsageError(f"{output}: the results would overwrite a file of the model; name another file with -o")


def _read_kept(path, trace):
    """The kept sets of the trace's prompt, and notes on what was left out."""
    from .kept_sets import kept_indices, read_kept_sets
    from .trace_digest import tokens_digest

    name = pathlib.Path(trace.path).name
    found, notes, others, refused, same_tokens, untold = [], [], [], [], set(), False
    for index in kept_indices(path):
        try:
            kept = read_kept_sets(path, index)
        except EvictionError as problem:
            refused.append(problem)
            continue
        if kept.tells_no_run:
            is_other = kept.trace and pathlib.Path(kept.trace).name != name
        else:
            is_other = kept.trace_digest != trace.digest and kept.tokens_digest != tokens_digest(trace.ids[: kept.evict_at])
        if is_other:
            others.append(kept.trace or "another trace")
            continue
        if kept.evict_at != trace.prompt_length:
            refused.append(EvictionError(f"{kept.place}: the eviction is at {kept.evict_at}, and the prompt of {trace.path} has "
                                         f"{trace.prompt_length} tokens"))
            continue
        if kept.tells_no_run:
            untold = True
        elif kept.trace_digest not in ("", trace.digest):
            same_tokens.add(kept.trace or "another trace")
        found.append(kept)
    if not found and others:
        raise Error(f"{path}: its kept sets are of {', '.join(sorted(set(others)))}, and not of {trace.path}; name kept sets of "
                    "this trace, as --kept writes them")
    if not found:
        raise refused[0] if refused else Error(f"{path}: holds no kept sets")
    if others:
        notes.append(f"{path}: {counted(len(others), 'group')} of kept sets of other traces left out")
    if untold:
        notes.append(f"{path}: does not say which tokens its kept sets are of (tokens_digest), so whether they are those of "
                     f"{trace.path} could not be checked")
    if same_tokens:
        notes.append(f"{path}: its kept sets are of another run of the same tokens, {', '.join(sorted(same_tokens))}")
    notes += [f"left out: {problem}" for problem in refused]
    return found, notes


class _Progress:
    """A line on a terminal that says how far the run is and how long it will take."""

    def __init__(self, count):
        self._count, self._start, self._shown = count, time.monotonic(), sys.stderr.isatty()

    def tell(self, done):
        if self._shown:
            left = (time.monotonic() - self._start) / done * (self._count - done)
            print(f"\r{done} of {self._count} kept sets, {left:.0f} s left \x1b[K", end="", file=sys.stderr, flush=True)

    def end(self):
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _mean(values):
    """Of those that are numbers; NaN where none is."""
    there = values[~np.isnan(values)]
    return there.mean() if len(there) else float("nan")


def _number(value):
    return f"{value:.4f}" if value >= 1e-3 or value <= -1e-3 or value == 0 else f"{value:.1e}"


def _table(trace, results):
    """One row per kept sets, best mean KL first."""
    header = ("policy", "capacity", "kept", "of prompt", "heads", "KL", "worst KL", "agree", "loss", "increase")
    rows = []
    for kept, outcome in sorted(results, key=lambda result: result[1].kl.mean()):
        size = np.mean([len(positions) for positions in kept.sets])
        rows.append((kept.policy, kept.capacity_request, f"{size:.1f}".removesuffix(".0"),
                     f"{100 * size / trace.prompt_length:.1f} %", kept.heads, _number(outcome.kl.mean()),
                     _number(outcome.kl.max()), f"{100 * outcome.agree.mean():.1f} %", _number(_mean(outcome.nll)),
                     _number(_mean(outcome.nll_increase))))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row):
        return "  ".join(value.ljust(width) if column == 0 else value.rjust(width)
                         for column, (value, width) in enumerate(zip(row, widths))).rstrip()

    return "\n".join((line(header), "  ".join("─" * width for width in widths), *map(line, rows)))


def _live(arguments):
    _check(arguments)
    check_model_name(arguments.model)
    from .traces import read_trace

    trace = read_trace(arguments.trace)
    kept_sets, notes = _read_kept(arguments.kept, trace)
    import transformers

    from .live import LiveRun
    from .output_file import OutputFile
    from .results_file import write_live_results

    # A long run should not end at a folder that cannot be written to.
    OutputFile(arguments.output).abandon()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = trace.dtype if arguments.dtype == "auto" else arguments.dtype
    model = load_model(arguments, dtype)
    start = time.monotonic()
    live = LiveRun(model, trace)
    if dtype != "float32":
        notes.append(f"the model ran in {dtype}, whose rounding moves every logit; with --dtype float32 it does not")
    for note in notes:
        say(f"note: {note}")
    results, progress = [], _Progress(len(kept_sets))
    try:
        for kept in kept_sets:
            results.append((kept, live.evicted(kept)))
            progress.tell(len(results))
    finally:
        progress.end()
    write_live_results(arguments.output, trace, results, live.positions, notes)
    print(f"{trace.model}: {counted(trace.prompt_length, 'prompt token')}, {counted(len(live.positions), 'token')} after them; "
          f"loss with the full cache {_number(_mean(live.full_nll))}\n")
    print(_table(trace, results))
    print("\nKL: of the next token's distribution after eviction from that with the full cache, in nats, mean and largest; "
          "agree:\nhow often the same token is the most likely one; loss: of the token that did come next, in nats, and what it "
          f"is more\nthan with the full cache. Best first. Ran in {time.monotonic() - start:.1f} s.")
    print(f"wrote {arguments.output}")


def main(arguments=None):
    """Returns the exit code."""
    return run("kvtrace-live", lambda: _live(_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
