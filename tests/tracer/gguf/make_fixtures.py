#!/usr/bin/env python3
"""Writes, beside itself, what the tests of GGUF files compare with:

    python3 -m venv venv && venv/bin/pip install gguf
    venv/bin/python tests/tracer/gguf/make_fixtures.py

    types.gguf   a tensor of random bytes [2, 512] or [3, 64] for every type that is dequantised, and a few metadata
    types.f32    the numbers that the package gguf makes of them, float32, the tensors in the order of their names
With --check it writes nothing and fails if what it would write differs from what is there: with gguf 0.19.0 it is the
same bytes on every machine.
"""

import argparse
import pathlib
import sys
import tempfile

import gguf
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


def write(folder):
    random = np.random.Generator(np.random.PCG64(7))
    writer = gguf.GGUFWriter(folder / "types.gguf", "llama")
    writer.add_block_count(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(True)
    writer.add_token_list(["<s>", "a", "é"])
    writer.add_token_scores([0.0, -1.5, -2.5])
    numbers = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (2, 512) if elements == 256 else (3, 64)
        data = random.integers(0, 256, (shape[0], shape[1] // elements * size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            numbers[name] = gguf.dequantize(data, kind).astype(np.float32)
        assert numbers[name].shape == shape
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "types.f32").write_bytes(b"".join(numbers[name].tobytes() for name in sorted(numbers)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    if not parser.parse_args().check:
        write(HERE)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write(folder)
        different = [made.name for made in sorted(folder.iterdir())
                     if made.read_bytes() != (HERE / made.name).read_bytes()]
    for name in different:
        print(f"{name} differs", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
