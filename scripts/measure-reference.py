#!/usr/bin/env python3
"""Times the ReST-KV authors' code (github.com/an-yongqi/rest-kv) where kvreplay runs: PyTorch, float32, this processor.

One layer's eviction after the prefill, with tensors in memory: the calls that scripts/longbench/run_llama3.sh of their
release leads to, on random queries, keys and values. Their file is read from a checkout and run as it is. Every method
runs in a process of its own, so that its peak memory is its own: one call to warm up, then the timed ones.

    git clone https://github.com/an-yongqi/rest-kv
    python3 -m venv .venv && .venv/bin/pip install torch numpy
    .venv/bin/python scripts/measure-reference.py --checkout rest-kv --json reference.json
"""

import argparse
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
import types

SOURCE = pathlib.Path("restkv", "restkv_utils.py")  # in the checkout
SEED = 1
# What run_llama3.sh and the defaults of run_longbench.py set, beside window and capacity.
SNAPKV = {"kernel_size": 5, "pooling": "avgpool"}
RESTKV = {"kernel_size": 5, "pooling": "adaptive", "use_ema": True, "alpha": 0.3, "metric_mode": "after", "scale": 2000,
          "tau": 1.0}
METHODS = {
    "snapkv": ("SnapKVCluster", SNAPKV),
    "restkv": ("RestKVCluster", RESTKV | {"use_wo": True}),
    "restkv-no-projection": ("RestKVCluster", RESTKV | {"use_wo": False}),
}


class Failure(Exception):
    """What went wrong, where, and what to do, in one line."""


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkout", required=True, type=pathlib.Path, metavar="DIR",
                        help="a clone of github.com/an-yongqi/rest-kv")
    parser.add_argument("--tokens", type=positive, default=8192, help="positions of the prompt")
    parser.add_argument("--heads", type=positive, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=positive, default=8, help="KV heads")
    parser.add_argument("--head-dim", type=positive, default=128, help="numbers in a key or value")
    parser.add_argument("--hidden", type=positive, default=4096, help="numbers that the output projection gives")
    parser.add_argument("--window", type=positive, default=32, help="queries in the observation window")
    parser.add_argument("--capacity", type=positive, default=160,
                        help="positions kept, those of the observation window among them")
    parser.add_argument("--threads", type=positive, default=2, help="threads that PyTorch may use")
    parser.add_argument("--runs", type=positive, default=3, help="timed calls of each method, after one to warm up")
    parser.add_argument("--methods", default=",".join(METHODS), help="what to time, separated by commas")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    options.methods = [name.strip() for name in options.methods.split(",")]
    for name in options.methods:
        if name not in METHODS:
            parser.error(f"--methods: there is no '{name}' among {', '.join(METHODS)}")
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} is no multiple of --kv-heads {options.kv_heads}")
    if options.window >= options.capacity:
        parser.error(f"--capacity {options.capacity} leaves nothing to choose beside --window {options.window}")
    if options.capacity >= options.tokens:
        parser.error(f"--capacity {options.capacity} evicts nothing from --tokens {options.tokens}")
    # Their adaptive pooling ranks as many positions of half the window as are kept beside it.
    if options.window < 2 and any(name.startswith("restkv") for name in options.methods):
        parser.error("--window 1 cannot be halved, as ReST-KV does")
    return options


def load(checkout):
    """The authors' module, without what their package imports beside it."""
    path = checkout / SOURCE
    # It names transformers' Cache as a base class and calculates nothing with it.
    cache_utils = types.ModuleType("transformers.cache_utils")
    cache_utils.Cache = object
    transformers = types.ModuleType("transformers")
    transformers.cache_utils = cache_utils
    sys.modules.setdefault("transformers", transformers)
    sys.modules.setdefault("transformers.cache_utils", cache_utils)
    spec = importlib.util.spec_from_file_location("restkv_reference", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Failure(f"{path} does not load: {type(error).__name__}: {error}") from error
    return module


def needed_bytes(name, options):
    """What a method holds at once, at least."""
    floats = 5 * options.heads * options.tokens * options.head_dim  # queries, keys, values, and what is gathered
    floats += 6 * options.heads * options.window * options.tokens  # weights, their softmax, and two orders of int64
    if METHODS[name][1].get("use_wo"):
        floats += 2 * options.heads * options.tokens * options.hidden  # projected values, and how they differ
    return 4 * floats


def available_bytes():
    """Memory that can be had without swapping; infinite where the system does not say."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return math.inf


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(name, options):
    """Seconds of every timed call, and the peak memory of this process."""
    import torch

    torch.set_num_threads(options.threads)
    module = load(options.checkout)
    class_name, parameters = METHODS[name]
    try:
        cluster = getattr(module, class_name)(window_size=options.window, max_capacity_prompt=options.capacity,
                                              **parameters)
        repeat = module.repeat_kv
    except (AttributeError, TypeError) as error:
        raise Failure(f"{options.checkout / SOURCE} is of a release that this script does not know: {error}") from error

    generator = torch.Generator().manual_seed(SEED)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    groups = options.heads // options.kv_heads
    queries = random(1, options.heads, options.tokens, options.head_dim)
    keys = random(1, options.kv_heads, options.tokens, options.head_dim)
    values = random(1, options.kv_heads, options.tokens, options.head_dim)
    extra = []
    if class_name == "RestKVCluster":
        extra = [random(options.hidden, options.heads * options.head_dim) / math.sqrt(options.hidden)]

    seconds = []
    repeat_seconds = []
    system_seconds = []
    with torch.inference_mode():
        for run in range(options.runs + 1):
            start = time.perf_counter()
            repeated_keys, repeated_values = repeat(keys, groups), repeat(values, groups)
            repeated, system = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
            kept_keys, kept_values = cluster.update_kv(repeated_keys, queries, repeated_values, None, groups, *extra)
            end = time.perf_counter()
            if run > 0:
                repeat_seconds.append(repeated - start)
                seconds.append(end - repeated)
                system_seconds.append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - system)
    expected = (1, options.heads, options.capacity, options.head_dim)
    for kept in (kept_keys, kept_values):
        if tuple(kept.shape) != expected:
            raise Failure(f"{class_name} kept {tuple(kept.shape)} where {expected} was asked for")
    return {
        "method": name,
        "seconds": seconds,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        # Of all threads: what the system takes to hand out and clear memory.
        "system_seconds_median": statistics.median(system_seconds),
        "repeat_kv_seconds_median": statistics.median(repeat_seconds),
        "peak_rss_bytes": peak_bytes(),
    }


def describe_torch(options):
    """What PyTorch calculates with."""
    import torch

    torch.set_num_threads(options.threads)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
    }


def answer(function, pipe, *parameters):
    try:
        pipe.send((function(*parameters), None))
    except ImportError as error:
        pipe.send((None, f"{sys.executable} cannot import {error.name or 'torch'} ({error}): pip install torch"))
    except Failure as failure:
        pipe.send((None, str(failure)))
    except (MemoryError, RuntimeError) as error:
        pipe.send((None, f"PyTorch stopped: {str(error).splitlines()[0] if str(error) else type(error).__name__}"))


def in_process(what, function, *parameters):
    """What the function returns when a fresh process calls it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(function, sender, *parameters), daemon=True)
    process.start()
    sender.close()
    try:
        result, failure = receiver.recv()
    except EOFError:
        process.join()
        raise Failure(f"{what}: its process ended with {process.exitcode}"
                      f"{', killed, perhaps for want of memory' if process.exitcode == -9 else ''}") from None
    process.join()
    if failure:
        raise Failure(f"{what}: {failure}")
    return result


def processor():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def revision(checkout):
    """The checkout's commit; empty where git does not say."""
    try:
        git = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True,
                             check=True)
        return git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def print_table(rows):
    header = ("method", "median s", "min s", "system s", "repeat_kv s", "peak RSS GB")
    cells = [header] + [(row["method"], f"{row['seconds_median']:.3f}", f"{row['seconds_min']:.3f}",
                         f"{row['system_seconds_median']:.3f}", f"{row['repeat_kv_seconds_median']:.3f}",
                         f"{row['peak_rss_bytes'] / 1e9:.2f}") for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(text.ljust(width) if column == 0 else text.rjust(width)
                        for column, (text, width) in enumerate(zip(row, widths))))


def write_json(path, document):
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Failure(f"{path}: cannot be written: {error.strerror}") from error


def main():
    options = arguments()
    path = options.checkout / SOURCE
    try:
        source = path.read_bytes()
    except OSError as error:
        raise Failure(f"{options.checkout}: no checkout of github.com/an-yongqi/rest-kv, {path} cannot be read "
                      f"({error.strerror})") from error
    if options.json and not options.json.absolute().parent.is_dir():
        raise Failure(f"{options.json}: there is no folder {options.json.absolute().parent}")
    if options.json and options.json.is_dir():
        raise Failure(f"{options.json}: a folder, where --json names a file")
    for name in options.methods:
        needed, available = needed_bytes(name, options), available_bytes()
        if needed > available:
            raise Failure(f"{name} takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free: "
                          "lower --tokens or leave it out of --methods")

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"measure-reference: others use this machine (load {load:.1f}): the times will be too long",
              file=sys.stderr)
    environment = in_process("PyTorch", describe_torch, options)
    environment |= {"processor": processor(), "load_before": load, "commit": revision(options.checkout),
                    "source_sha256": hashlib.sha256(source).hexdigest()}
    shape = {key: getattr(options, key)
             for key in ("tokens", "heads", "kv_heads", "head_dim", "hidden", "window", "capacity", "runs")}
    print(f"rest-kv {environment['commit'][:12] or 'sha256 ' + environment['source_sha256'][:12]}, PyTorch "
          f"{environment['torch']} ({environment['cpu_capability']}), {environment['threads']} threads, "
          f"{environment['processor']}")
    print(f"{options.tokens} positions, {options.heads} query heads on {options.kv_heads} KV heads of "
          f"{options.head_dim}, hidden {options.hidden}, window {options.window}, capacity {options.capacity}: "
          f"one layer, {options.runs} runs\n", flush=True)
    rows = [in_process(name, measure, name, options) for name in options.methods]
    print_table(rows)
    if options.json:
        write_json(options.json, {"environment": environment, "shape": shape, "methods": rows})


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"measure-reference: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
