"""Runs the package's commands as a user would."""

import contextlib
import io
import signal
import subprocess
import warnings


def run_command(main, *arguments):
    """Runs it in this process: a new one would spend seconds on importing."""
    streams = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    show_warning = warnings.showwarning
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = main([str(argument) for argument in arguments])
    finally:
        warnings.showwarning = show_warning
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, *(stream.getvalue() for stream in streams))


def one_line_of(program, result, code):
    """Its only line on standard error, after asserting the exit code."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{program}: ")
    return lines[0].removeprefix(f"{program}: ")
