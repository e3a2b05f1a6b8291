#!/usr/bin/env python3
"""Measures what docs/performance.md claims, as ratios of times from one run, and prints it as Markdown tables.

    scripts/bench.py --kvreplay build/release-native/kvreplay
    scripts/bench.py --kvreplay ... --reference DIR --python VENV/bin/python    also the ReST-KV authors' code, from a checkout
    scripts/bench.py --kvreplay ... --mpi build/mpi/kvreplay                    also two ranks against one
    scripts/bench.py --kvreplay ... --long                                      also 131,072 positions x 32 layers: 17 GB of disk

What else the machine does falls on all sides of a ratio, but not evenly: measure on an idle one.
"""
import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

TRACE = ["--hidden", "4096", "--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--dtype", "float16"]


def run(*command, quiet=True, **environment):
    """Seconds that a command took."""
    started = time.monotonic()
    done = subprocess.run([str(word) for word in command], env={**os.environ, **environment}, text=True,
                          stdout=subprocess.DEVNULL if quiet else None, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"bench: {' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return time.monotonic() - started


def peak_memory(*command):
    """Seconds and peak memory, in bytes, of a command; the largest child so far must not have been larger."""
    seconds = run(*command)
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def table(title, head, rows):
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


class Bench:
    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.kvreplay = options.kvreplay

    def synth(self, name, tokens, layers):
        path = self.folder / name
        run(self.kvreplay, "synth", "--layers", layers, "--prompt-tokens", tokens, "--tokens", tokens + 32, *TRACE, "-o", path)
        run("cat", path)  # into the system's cache, where it fits
        return path

    def stages(self, trace, threads):
        report = self.folder / "bench.json"
        run(self.kvreplay, "bench", trace, "--threads", threads, "--runs", self.options.runs, "--json", report)
        document = json.loads(report.read_text())
        return document["ceilings"], {stage["name"]: stage for stage in document["stages"]}

    def roofline(self, trace):
        ceilings, stages = self.stages(trace, self.options.threads)
        one = self.stages(trace, 1)[1]
        table("Ceilings", ["", "measured"], [
            ["float32 products in cache", f"{ceilings['products_by_kernel'] / 1e9:.0f} GFLOP/s"],
            ["the same by Eigen", f"{ceilings['products_by_eigen'] / 1e9:.0f} GFLOP/s"],
            ["exponentials in cache", f"{ceilings['exponentials'] / 1e9:.2f} G/s"],
            ["memory", f"{ceilings['memory'] / 1e9:.1f} GB/s"],
            ["the file, one thread / all", f"{ceilings['file_by_one_thread'] / 1e9:.1f} / {ceilings['file'] / 1e9:.1f} GB/s"]])
        table(f"Per layer of 8,192 positions, {self.options.threads} threads",
              ["stage", "settings", "ms", "GB/s", "GFLOP/s", "times the floor", "1 thread / all"],
              [[name, str(stage["settings"]), f"{1e3 * stage['seconds']:.1f}", f"{stage['bytes'] / stage['seconds'] / 1e9:.1f}",
                f"{stage['operations'] / stage['seconds'] / 1e9:.0f}", f"{stage['seconds'] / stage['floor']:.2f}",
                f"{one[name]['seconds'] / stage['seconds']:.2f}"] for name, stage in stages.items()])
        first = stages["restkv, 4 capacities"]["seconds"]
        further = {name: (stages[name]["seconds"] - first) / 99 / first
                   for name in ("restkv, 10 alphas x 10 betas", "restkv, 100 alphas")}
        table("A further setting at 4 capacities, of what the first one takes", ["grid", "share"],
              [[name, f"{100 * share:.2f} %"] for name, share in further.items()])
        return stages

    def reference(self, stages):
        report = self.folder / "reference.json"
        run(self.options.python, pathlib.Path(__file__).with_name("measure-reference.py"), "--checkout",
            self.options.reference, "--threads", self.options.threads, "--runs", 3, "--json", report)
        document = json.loads(report.read_text())
        theirs = {row["method"]: row["seconds_median"] for row in document["methods"]}
        ours = {"snapkv": "snapkv", "restkv-no-projection": "restkv without projection", "restkv": "restkv"}
        rows = [[name, f"{1e3 * theirs[method]:.1f}", f"{1e3 * stages[name]['seconds']:.1f}",
                 f"{theirs[method] / stages[name]['seconds']:.0f}"] for method, name in ours.items()]
        for name in ("restkv, 10 alphas x 10 betas", "restkv, 100 alphas"):
            rows.append([f"{name}, 400 settings", f"{400e3 * theirs['restkv']:.0f} (400 x one run)",
                         f"{1e3 * stages[name]['seconds']:.1f}", f"{400 * theirs['restkv'] / stages[name]['seconds']:.0f}"])
        table("Against the authors' code, ms per layer", ["method", "authors', PyTorch", "kvreplay", "times faster"], rows)

    def reading(self, trace):
        seconds = min(run("dd", f"if={trace}", "of=/dev/null", "bs=1M") for _ in range(5))
        dd = trace.stat().st_size / seconds
        rows = []
        for threads in {1, self.options.threads}:
            stage = self.stages(trace, threads)[1]["reading keys and values"]
            rate = stage["bytes"] / stage["seconds"]
            rows.append([f"{threads}", f"{rate / 1e9:.1f}", f"{dd / 1e9:.1f}", f"{100 * rate / dd:.0f} %"])
        table("Reading keys and values into float32, from the system's cache", ["threads", "GB/s", "dd, GB/s", "share"], rows)

    def threads(self, trace):
        command = [self.kvreplay, "replay", trace, "-p", "restkv", "-c", "160", "--threads"]
        counts = sorted({1, self.options.threads})
        seconds = {count: min(run(*command, count) for _ in range(3)) for count in counts}
        table("Whole replays of 32 layers of 8,192 positions, measures included", ["threads", "seconds", "1 thread / this"],
              [[f"{count}", f"{s:.2f}", f"{seconds[1] / s:.2f}"] for count, s in seconds.items()])

    def lengths(self):
        seconds = {}
        for tokens in (8192, 65536):
            trace = self.synth(f"length-{tokens}.h5", tokens, 4)
            command = [self.kvreplay, "replay", trace, "-p", "restkv", "-c", "160"]
            run(*command)
            seconds[tokens] = min(run(*command) for _ in range(3))
            trace.unlink()
        table("Whole replays of 4 layers, measures included", ["positions", "seconds", "times 8,192"],
              [[f"{tokens:,}", f"{s:.2f}", f"{s / seconds[8192]:.2f}"] for tokens, s in seconds.items()])

    def traces(self):
        traces = [self.synth(f"model-{tokens}.h5", tokens, 8) for tokens in (4096, 4097)]  # of one seed: one projection
        seconds = {}
        for count in (1, 2):
            command = [self.kvreplay, "replay", *traces[:count], "-p", "restkv", "-c", "128", "--threads", "1"]
            run(*command)
            seconds[count] = min(run(*command) for _ in range(3))
        for trace in traces:
            trace.unlink()
        second = seconds[2] - seconds[1]
        table("Two traces of one model, whole replays of 8 layers of 4,096 positions, one thread",
              ["first trace", "both", "second of first"],
              [[f"{seconds[1]:.2f} s", f"{seconds[2]:.2f} s", f"{second / seconds[1]:.2f}"]])

    def ranks(self, trace):
        sweep = [self.options.mpi, "sweep", trace, "-p", "restkv(alpha={0.1:0.9:0.1})", "-c", "160,1024", "--threads", "1",
                 "-o"]
        mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n"]
        outputs = {ranks: self.folder / f"ranks-{ranks}.h5" for ranks in (1, 2)}
        seconds = {ranks: min(run(*mpirun, ranks, *sweep, output) for _ in range(2)) for ranks, output in outputs.items()}
        same = outputs[1].read_bytes() == outputs[2].read_bytes()
        table("Sweeps of 18 settings over 32 layers of 8,192 positions, ranks of one thread",
              ["ranks", "seconds", "1 rank / this", "same bytes"],
              [[f"{ranks}", f"{s:.2f}", f"{seconds[1] / s:.2f}", "yes" if same else "NO"] for ranks, s in seconds.items()])

    def long(self):
        trace = self.options.long_trace or self.synth("long.h5", 131072, 32)
        output = self.folder / "long-results.h5"
        seconds, memory = peak_memory(self.kvreplay, "sweep", trace, "-p", "restkv", "-p", "snapkv", "-c", "160,1024",
                                      "--memory", "900M", "-o", output)
        table("131,072 positions, 32 layers, float16", ["settings", "seconds", "peak memory"],
              [["restkv and snapkv at 160 and 1,024", f"{seconds:.0f}", f"{memory / 1e6:.0f} MB"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvreplay", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--reference", type=pathlib.Path, metavar="DIR", help="a checkout of the authors' code")
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch (with --reference)")
    parser.add_argument("--mpi", type=pathlib.Path, metavar="PROGRAM", help="a kvreplay built with -DKVREPLAY_MPI=ON")
    parser.add_argument("--long", action="store_true", help="also 131,072 positions x 32 layers")
    parser.add_argument("--long-trace", type=pathlib.Path, metavar="FILE", help="such a trace, instead of a new one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all, by default")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kvreplay-bench-"))
    try:
        bench = Bench(options, folder)
        if options.long or options.long_trace:  # first: peak memory is the largest of all children
            bench.long()
        trace = bench.synth("bench.h5", 8192, 2)
        stages = bench.roofline(trace)
        if options.reference:
            bench.reference(stages)
        bench.reading(trace)
        bench.lengths()
        bench.traces()
        layers = bench.synth("layers.h5", 8192, 32)
        bench.threads(layers)
        if options.mpi:
            bench.ranks(layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
