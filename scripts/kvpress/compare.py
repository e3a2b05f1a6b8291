#!/usr/bin/env python3
"""Settings of policies that kvreplay and kvpress both have, on one prompt of one model: how long kvpress' pipeline takes for
them, the model run once for each, beside one `kvreplay live` for all of them.

    scripts/kvpress/compare.py KVREPLAY MODEL PROMPT [--capacities 64,128,256] [--tokens 48] [--threads N] [--most N]

Needs kvpress 0.5.5 (pip install kvpress==0.5.5 transformers==5.2.0). The machine should have nothing else to do.
"""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("kvreplay")
parser.add_argument("model")
parser.add_argument("prompt", type=Path)
parser.add_argument("--capacities", default="64,128,256")
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--most", type=int, help="run so many of the settings in kvpress, and count the others as their mean")
arguments = parser.parse_args()

import kvpress  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline  # noqa: E402

torch.set_num_threads(arguments.threads)
PRESSES = {
    "snapkv(window=64)": lambda ratio: kvpress.SnapKVPress(ratio),
    "tova": lambda ratio: kvpress.TOVAPress(ratio),
    "streamingllm": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "knorm": lambda ratio: kvpress.KnormPress(ratio),
    "keydiff": lambda ratio: kvpress.KeyDiffPress(ratio),
    "lagkv": lambda ratio: kvpress.LagKVPress(ratio),
    "random": lambda ratio: kvpress.RandomPress(ratio),
    "snapkv(window=64)+pyramid": lambda ratio: kvpress.PyramidKVPress(ratio),
    "snapkv(window=64)+adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "expected-attention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
}

text = arguments.prompt.read_text()
with tempfile.TemporaryDirectory() as folder:
    command = [arguments.kvreplay, "live", "--model", arguments.model, "--prompt", str(arguments.prompt), "--templated"]
    command += ["--continue", str(arguments.tokens), "--no-offline", "--capacity", arguments.capacities]
    command += ["--threads", str(arguments.threads), "-o", f"{folder}/live.h5", "--policy", ",".join(PRESSES)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours = time.perf_counter() - start

# The prompt is a chat as the template writes it, and the pipeline puts the tokenizer's BOS before it.
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(arguments.model) / "tokenizer.json"), bos_token="")
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
length = len(tokenizer(text)["input_ids"])
settings = [(name, int(capacity)) for name in PRESSES for capacity in arguments.capacities.split(",")]
chosen = settings[:: max(1, len(settings) // arguments.most)] if arguments.most else settings
theirs = []
for name, capacity in chosen:
    start = time.perf_counter()
    press = PRESSES[name](1 - capacity / length)
    # Greedy, as many tokens; an answer that ends earlier takes less, which is in kvpress' favour.
    pipe(text, question=" ", press=press, max_new_tokens=arguments.tokens)
    theirs.append(time.perf_counter() - start)
    print(f"kvpress {name} at {capacity}: {theirs[-1]:.2f} s", flush=True)
whole = sum(theirs) / len(theirs) * len(settings)
print(f"{length} tokens, {len(settings)} settings, {arguments.threads} threads")
print(f"kvreplay live: {ours:.1f} s; kvpress: {whole:.1f} s ({len(theirs)} settings run); ratio {whole / ours:.1f}")
