#!/usr/bin/env python3
"""Reads traces, results and kept sets as docs/trace-format.md and docs/results-format.md say that h5py does.

    scripts/check-files.py FILE...

Needs h5py. Fails with a line for each thing that is not so.
"""
import sys

import h5py

wrong = []


def expect(condition, text):
    if not condition:
        wrong.append(text)


def check(path, name, item):
    """What holds for every group and dataset: texts are str, and nothing is compound."""
    for attribute, value in item.attrs.items():
        expect(not isinstance(value, bytes), f"{path}: {name}: attribute {attribute} is bytes, {value!r}")
    if not isinstance(item, h5py.Dataset):
        return
    expect(item.dtype.names is None, f"{path}: {name}: is compound")
    text = h5py.check_string_dtype(item.dtype)
    if text is None:
        return
    expect(text.encoding == "utf-8" and text.length is None, f"{path}: {name}: holds {text}")
    expect(all(isinstance(one, str) for one in item.asstr()[:]), f"{path}: {name}: gives no str")


def check_spans(path, name, spans):
    expect(isinstance(spans, h5py.Group), f"{path}: {name}: is no group")
    lengths = {column: len(spans[column]) for column in ("start", "end", "label")}
    expect(len(set(lengths.values())) == 1, f"{path}: {name}: {lengths}")
    expect(all(start < end for start, end in zip(spans["start"][:], spans["end"][:])), f"{path}: {name}: is empty")


def check_file(path):
    with h5py.File(path) as file:
        check(path, "/", file)
        file.visititems(lambda name, item: check(path, name, item))
        version = {"kvtrace": 2, "kvreplay-results": 3, "kvreplay-kept": 3}
        kind = file.attrs["format"]
        expect(file.attrs["format_version"] == version.get(kind), f"{path}: is {kind} {file.attrs['format_version']}")
        if kind == "kvtrace":
            if "annotations" in file:
                check_spans(path, "annotations/spans", file["annotations/spans"])
            return kind
        for name, result in file["results" if kind == "kvreplay-results" else "kept"].items():
            expect(result.attrs["policy"] == str(result.attrs["policy"]), f"{path}: {name}: policy is no str")
            if "spans" in result:
                check_spans(path, name, result["spans"])
                expect(result["span_recall"].shape[2] == len(result["spans/label"]), f"{path}: {name}: span_recall")
        return kind


def main():
    kinds = [check_file(path) for path in sys.argv[1:]]
    if wrong:
        sys.exit("\n".join(wrong))
    if not kinds:
        sys.exit(__doc__)
    print(f"h5py {h5py.__version__} reads {len(kinds)} files: " +
          ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))


if __name__ == "__main__":
    main()
