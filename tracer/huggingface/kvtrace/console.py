"""What the package's commands have in common: their options for models, exit codes, and how they end."""

import argparse
import os
import signal
import sys
import warnings

from . import __version__
from .errors import CaptureError, Error, UsageError

_FAILED = 1
_WRONG_USAGE = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(text):
    print(text, file=sys.stderr)


def first_line(problem):
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__


def counted(number, noun):
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def size_text(size):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024


class Parser(argparse.ArgumentParser):
    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage.",
                         allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"kvtrace {__version__}")

    def error(self, message):
        raise UsageError(message)


def add_model_options(parser, dtype_help, dtype_default):
    """`dtype_help`: what --dtype decides; `dtype_default`: in words, what "auto" stands for."""
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="ID_OR_DIR", help="model on the Hugging Face hub, or its folder")
    add("--dtype", default="auto", metavar="TYPE",
        help=f"{dtype_help}: float32, float16 or bfloat16 (default: {dtype_default})")
    add("--attn-implementation", metavar="NAME",
        help="sdpa, eager, flash_attention_2, ... (default: what transformers chooses)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; auto spreads the model over all, with accelerate "
        "(default: cuda where there is one)")


def check_model_options(arguments):
    if arguments.dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype {arguments.dtype}: must be float32, float16, bfloat16 or auto")


def check_model_name(model):
    # transformers would go and look for it on the hub.
    if not os.path.isdir(model) and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise CaptureError(f"{model}: is neither a folder nor the name of a model on the hub")


def load_model(arguments, dtype):
    """`dtype`: its type by name, or "auto": what the weights are."""
    import torch
    import transformers

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if device == "auto":
        options["device_map"] = "auto"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **options)
        return (model if device == "auto" else model.to(device)).eval()
    except Exception as problem:  # of many kinds: network, files, memory, an unknown architecture or implementation
        raise CaptureError(f"{arguments.model}: the model cannot be loaded: {first_line(problem)}") from None


class _Interrupted(BaseException):
    pass


def _interrupt(number, frame):
    # Whoever asks again must not interrupt the cleaning up.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise _Interrupted(number)


def run(program, action):
    """Calls `action` and returns the exit code; what goes wrong is told in one line."""
    # What ends the program must pass through the file's cleaning up.
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        action()
    except UsageError as problem:
        say(f"{program}: {first_line(problem)}")
        return _WRONG_USAGE
    except Error as problem:
        say(f"{program}: {first_line(problem)}")
        return _FAILED
    except _Interrupted as problem:
        say(f"{program}: interrupted")
        return 128 + problem.args[0]
    except Exception as problem:  # of the model's own code: out of memory, an unsupported combination
        say(f"{program}: {type(problem).__name__}: {first_line(problem)}")
        return _FAILED
    return 0
