import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import h5py
import numpy as np
import pytest
import torch
import transformers
from plain_trace import read_layers

ROOT = pathlib.Path(__file__).resolve().parents[3]
FAMILIES = ROOT / "tests/tracer/families"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(name, attention="eager", dtype=torch.float32):
    """A model of tests/tracer/families, or the folder that is given."""
    folder = name if isinstance(name, pathlib.Path) else FAMILIES / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval()


def prompt_of(name):
    """Its prompt as a batch of one."""
    return torch.tensor([[int(word) for word in (FAMILIES / name / "prompt.ids").read_text().split()]])


def generate(model, ids, count=6, **options):
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)


class Trace:
    """A trace file, read into memory by h5py alone."""

    def __init__(self, path):
        self.plain = read_layers(path)
        with h5py.File(path) as file:
            self.attributes = dict(file.attrs)
            self.model = dict(file["model"].attrs)
            self.provenance = dict(file["provenance"].attrs) if "provenance" in file else None  # kvtrace's alone
            tokens = file["tokens"].attrs
            self.next_token = (tokens["next_id"], tokens["next_logit"]) if "next_id" in tokens else None
            self.ids = file["tokens/ids"][:]
            self.prompt_length = int(file["tokens/ids"].attrs["prompt_length"])
            self.positions = file["query_positions"][:]
            self.pieces = file["tokens/pieces"].asstr()[:].tolist() if "pieces" in file["tokens"] else None
            self.spans = []
            if "annotations" in file:
                spans = file["annotations/spans"]
                self.spans = list(zip(spans["start"][:].tolist(), spans["end"][:].tolist(), spans["label"].asstr()[:]))
            self.layers = []
            self.windows = []
            for number in range(int(self.model["num_layers"])):
                group = file[f"layers/{number}"]
                self.windows.append(int(group.attrs.get("sliding_window", self.model["sliding_window"])))
                self.layers.append({name: group[name][:].astype(np.float64) for name in group})

    def attention(self, number):
        """The layer's attention outputs and, for each key, the attention that the captured prompt queries pay it,
        recomputed from what is in the file, in float64."""
        outputs, weights = self.plain[number].attention()
        return outputs, weights[:, self.positions < self.prompt_length].sum(1)[:, : self.prompt_length]


def distance(ours, theirs):
    """Relative, of two tensors of the same shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_traces(ours, theirs, tolerance):
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.prompt_length == theirs.prompt_length
    assert ours.positions.tolist() == theirs.positions.tolist()
    assert ours.windows == theirs.windows
    for number, (one, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            assert distance(one[name], other[name]) <= tolerance, f"layer {number}: {name}"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """After every test: transformers' attention functions are as before, and no unfinished file is left."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(functions)
    yield
    assert dict(functions) == before
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.fixture
def kvreplay():
    """The program, where the environment names one."""
    program = os.environ.get("KVREPLAY")
    if not program:
        pytest.skip("KVREPLAY names no kvreplay program")
    return program
