#!/usr/bin/env python3
"""Captures the same runs by both roads, `kvreplay capture` and kvtrace-capture, and compares them tensor by tensor.

The runs are those of the families in tests/tracer/families, and the demo model on one of the bundled prompts, in float32.
A tensor's distance is the norm of the difference over that of transformers' tensor, which must not exceed 1e-5; ids, shapes and the model's numbers must be equal. Logits are compared by the C++ tests with what transformers computed
(expected.h5), which make_model_fixtures.py --check makes anew; here the tokens that they lead to.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import h5py
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import kvtrace.command

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, thing: found.update({name: thing[()]}) if isinstance(thing, h5py.Dataset) else None)
        # What a rotary table is called is up to who writes it: here, by the first layer that it turns.
        of_all = file["model"].attrs.get("rotary")
        for layer in reversed(range(int(file["model"].attrs["num_layers"]))):
            table = f"rotary/{file[f'layers/{layer}'].attrs.get('rotary', of_all)}"
            if table in found:
                found[f"rotary of layer {layer}"] = found[table]
        found = {name: value for name, value in found.items() if not name.startswith("rotary/")}
        # The digest of the others is kvreplay's alone.
        model = {name: value for name, value in file["model"].attrs.items() if name not in ("attributes_xxh64", "rotary")}
        windows = [int(file[f"layers/{layer}"].attrs.get("sliding_window", model["sliding_window"]))
                   for layer in range(int(model["num_layers"]))]
    return found, model, windows


def compare(ours, theirs, faults, name):
    """The largest distance of a float tensor; what differs otherwise goes to `faults`."""
    (one, model, windows), (other, other_model, other_windows) = datasets(ours), datasets(theirs)
    # Where there is no tokenizer neither trace has pieces.
    # transformers tells no table where query, key and value come from one matrix.
    alone = {key for key in one.keys() ^ other.keys() if not key.startswith("rotary of")}
    if alone:
        faults.append(f"{name}: {sorted(alone)} by one road only")
    for key, value in model.items():
        same = np.isclose(value, other_model.get(key, 0)) if isinstance(value, float) else value == other_model.get(key)
        if not same and key not in ("name", "architecture"):
            faults.append(f"{name}: /model's {key} is {value} and {other_model.get(key)}")
    if windows != other_windows:
        faults.append(f"{name}: sliding windows are {windows} and {other_windows}")
    worst, where = 0.0, ""
    for key in one.keys() & other.keys():
        mine, expected = one[key], other[key]
        if mine.dtype.kind != "f":
            if mine.shape != expected.shape or mine.tolist() != expected.tolist():
                faults.append(f"{name}: {key} differs")
            continue
        if mine.shape != expected.shape:
            faults.append(f"{name}: {key} has shapes {mine.shape} and {expected.shape}")
            continue
        mine, expected = mine.astype(np.float64), expected.astype(np.float64)
        distance = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
        if not distance <= TOLERANCE:
            faults.append(f"{name}: {key} is {distance:.1e} apart")
        if not distance <= worst:
            worst, where = distance, key
    return worst, where


def huggingface(arguments):
    """kvtrace-capture in this process: a new one would spend seconds on importing."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = kvtrace.command.main(arguments)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def fidelity(kvreplay, trace):
    """The largest mean of a layer that `kvreplay inspect` reports."""
    output = subprocess.run([kvreplay, "inspect", trace], capture_output=True, text=True, check=True).stdout
    return max(float(row[1]) for row in (line.split() for line in output.split("\nfidelity")[1].splitlines())
               if len(row) == 5 and row[0].isdigit())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvreplay", help="the program")
    kvreplay = os.path.abspath(parser.parse_args().kvreplay)
    families = sorted((ROOT / "tests/tracer/families").iterdir())
    runs = {folder.name: (folder, ["--tokens", folder / "prompt.ids"], 8, "window:24") for folder in families}
    prompts = ROOT / "traces/prompts"
    runs["demo-model"] = (ROOT / "traces/demo-model", ["--prompt", prompts / "facts.txt", "--spans",
                                                       prompts / "facts.spans.json"], 16, "all")
    faults = []
    for name, (model, prompt, generate, queries) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = os.path.join(folder, "cpp.h5"), os.path.join(folder, "huggingface.h5")
            common = [str(word) for word in ["--model", model, *prompt, "--generate", generate, "--queries", queries]]
            first = subprocess.run([kvreplay, "capture", *common, "-o", ours], capture_output=True, text=True)
            # Eager, since it alone computes soft caps.
            second = huggingface([*common, "--attention-mass", "--dtype", "float32", "--attn-implementation", "eager", "-o",
                                  theirs])
            for result in (first, second):
                if result.returncode != 0:
                    sys.exit(f"{name}: {result.stderr}")
            generated = [re.sub(r"^.*?generated", "generated", result.stdout, flags=re.DOTALL) for result in (first, second)]
            if generated[0] != generated[1]:
                faults.append(f"{name}: {generated[0].strip()} and {generated[1].strip()}")
            worst, where = compare(ours, theirs, faults, name)
            faithful = [fidelity(kvreplay, trace) for trace in (ours, theirs)]
            if not max(faithful) <= 1e-5:
                faults.append(f"{name}: fidelity is {faithful[0]:.1e} and {faithful[1]:.1e}")
        print(f"{name:<20} at most {worst:.1e} apart ({where}); fidelity {faithful[0]:.1e} and {faithful[1]:.1e}", flush=True)
    print("\n".join(faults) if faults else f"{len(runs)} models: both roads capture the same")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
