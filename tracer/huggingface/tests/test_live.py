"""What the model loses: against an independent forward pass, and against one pass over all tokens with a mask for every head."""

import pathlib
import re
import subprocess
import sys

import check_architectures as architectures
import h5py
import numpy as np
import pytest
import torch
from commands import one_line_of, run_command
from conftest import FAMILIES, ROOT, load, prompt_of
from kept_files import make_sets, write_kept
from test_eviction import MORE, expected_logits, kept_of, shape_of, tokens_of

import kvtrace
import kvtrace.live_command
from kvtrace.kept_sets import read_kept_sets
from kvtrace.live import LiveRun, _most_likely
from kvtrace.trace_digest import tokens_digest, trace_digest
from kvtrace.traces import read_trace

DATA = ROOT / "tests/data"
DEMO = ROOT / "traces/demo-model"
NEEDLE = DATA / "reference-needle.h5"
REFERENCE = DATA / "reference-needle-live.h5"


def live(*arguments):
    return run_command(kvtrace.live_command.main, *arguments)


def one_line(result, code):
    return one_line_of("kvtrace-live", result, code)


@pytest.fixture(scope="module")
def needle(tmp_path_factory):
    """The demo model on the kept sets of the reference, which another program wrote."""
    output = tmp_path_factory.mktemp("needle") / "live.h5"
    result = live("-m", DEMO, "-t", NEEDLE, "-k", REFERENCE, "--dtype", "float32", "-o", output)
    assert result.returncode == 0, result.stderr
    return result, output


def test_reference(needle):
    """tests/data/reference-needle-live.h5: what an independent float32 forward pass gave."""
    with h5py.File(needle[1]) as ours, h5py.File(REFERENCE) as theirs:
        assert ours["results"].keys() == theirs["kept"].keys()
        for index, expected in theirs["kept"].items():
            result = ours[f"results/{index}"]
            assert result.attrs["policy"] == expected.attrs["policy"].decode()
            assert np.allclose(result["kl"][:], expected["kl"][:], rtol=1e-4, atol=1e-6), index
            assert result["agree"][:].tolist() == expected["agree"][:].tolist()
            assert np.allclose(result["nll"][:-1], expected["nll"][:], rtol=1e-4, atol=1e-6)
            full = result["nll"][:-1] - result["nll_increase"][:-1]
            assert np.allclose(full, expected["nll_full"][:], rtol=1e-4, atol=1e-5)
            assert np.isnan(result["nll"][-1]) and np.isnan(result["nll_increase"][-1])
            assert all(result[name].dtype == np.float32 for name in ("kl", "nll", "nll_increase", "agree"))


@pytest.mark.parametrize(("name", "reason"), [
    ("bamba", "layer 0 has no keys of its own"), ("gemma3n_text", "layer 4 has no keys of its own"),
    ("deepseek_v3", r"layer 0 holds latent rows \(MLA\)")])
def test_traces_of_models_that_cannot_be_evicted_are_refused(name, reason, tmp_path):
    model, given = architectures.build(name, "eager"), architectures.inputs(name)
    with kvtrace.capture(model, tmp_path / "run.h5"):
        architectures.generate(model, given)
    with pytest.raises(kvtrace.Error, match=f"{reason}.*; runs of such models cannot be evicted"):
        read_trace(tmp_path / "run.h5")


def test_table_begins_with_the_smallest_loss(needle):
    result, output = needle
    lines = result.stdout.splitlines()
    assert lines[0].startswith("demo-model: 569 prompt tokens, 15 tokens after them; loss with the full cache 0.0037")
    assert lines[2].split()[:3] == ["policy", "capacity", "kept"]
    rows = [re.split(r"  +", line) for line in lines[4:35]]
    assert [rows[0][0], rows[1][0], rows[1][5]] == ["full", "restkv", "0.0028"]
    divergences = [float(row[5]) for row in rows]
    assert divergences == sorted(divergences) and len(rows) == 31
    assert lines[-1] == f"wrote {output}"
    assert result.stderr == (f"note: {REFERENCE}: does not say which tokens its kept sets are of (tokens_digest), so whether they "
                             f"are those of {NEEDLE} could not be checked\n")


@pytest.mark.parametrize("kind", ["equal", "unequal", "query"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])  # 8 heads on 1, windows, a soft cap
def test_numbers_are_those_of_one_pass_with_masks(name, kind, tmp_path):
    model, tokens = load(name), tokens_of(name)
    evict_at = tokens.shape[1] - MORE
    with kvtrace.capture(model, tmp_path / "run.h5", prompt_length=evict_at), torch.no_grad():
        model(tokens)
    path, kept = kept_of(name, model, evict_at, kind, tmp_path / "kept.h5")
    full, rest = (expected_logits(name, tokens, sets, evict_at).double() for sets in (
        [[np.arange(evict_at)] * len(layer) for layer in kept], kept))
    log_full, log_rest = torch.log_softmax(full, -1), torch.log_softmax(rest, -1)

    run = LiveRun(model, read_trace(tmp_path / "run.h5"))
    outcome = run.evicted(read_kept_sets(path, 0))
    assert list(run.positions) == list(range(evict_at, tokens.shape[1]))
    expected = (log_full.exp() * (log_full - log_rest)).sum(-1).numpy()
    assert expected.min() > 1e-4
    assert np.allclose(outcome.kl, expected, rtol=1e-4, atol=1e-6)
    assert outcome.agree.tolist() == (full.argmax(-1) == rest.argmax(-1)).double().tolist()
    following = tokens[0, evict_at + 1 :]
    losses = -log_rest[range(MORE - 1), following].numpy()
    assert np.allclose(outcome.nll[:-1], losses, rtol=1e-4, atol=1e-6) and np.isnan(outcome.nll[-1])
    assert np.allclose(outcome.nll_increase[:-1], losses + log_full[range(MORE - 1), following].numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "demo-model"])  # 8 heads on 1, windows, a soft cap
def test_both_roads_agree(name, kvreplay, tmp_path):
    """kvreplay live decides and runs; here the model runs on what it kept."""
    folder, trace = (DEMO, NEEDLE) if name == "demo-model" else (FAMILIES / name, FAMILIES / name / "trace.h5")
    result = subprocess.run(
        [kvreplay, "live", "--model", folder, "--trace", trace, "--policy", "snapkv", "--policy", "snapkv+adakv", "--policy",
         "streamingllm", "--policy", "knorm", "--heads", "kv", "--capacity", "50%,70%", "--no-offline", "-o",
         tmp_path / "cpp.h5", "--kept", tmp_path / "kept.h5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = live("-m", folder, "-t", trace, "-k", tmp_path / "kept.h5", "--dtype", "float32", "-o", tmp_path / "live.h5")
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "live.h5") as ours, h5py.File(tmp_path / "cpp.h5") as theirs:
        assert len(ours["results"]) == len(theirs["results"]) >= 4
        for index, expected in theirs["results"].items():
            result = ours[f"results/{index}"]
            for attribute in ("policy", "capacity", "capacity_request", "kept", "trace_digest", "heads", "evict_at", "oracle"):
                assert result.attrs[attribute] == expected.attrs[attribute], attribute
            assert result["evaluation_positions"][:].tolist() == expected["evaluation_positions"][:].tolist()
            assert result["held"][:].tolist() == expected["held"][:].tolist()
            assert np.allclose(result["kl"][:], expected["kl"][:], rtol=1e-4, atol=1e-6), (index, expected.attrs["policy"])
            assert result["agree"][:].tolist() == expected["agree"][:].tolist()
            for measure in ("nll", "nll_increase"):
                assert np.allclose(result[measure][:], expected[measure][:], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_all_kept_loses_nothing(tmp_path):
    model, trace, kept = tiny(tmp_path)
    layers, _, kv_heads = shape_of(model)
    length = prompt_of("llama3").shape[1]
    path = write_kept(tmp_path / "all.h5", ([np.arange(length)] * (layers * kv_heads), {"evict_at": length}))
    outcome = LiveRun(model, read_trace(trace)).evicted(read_kept_sets(path, 0))
    assert not outcome.kl.any() and outcome.agree.all() and not outcome.nll_increase[:-1].any()


def test_of_equal_logits_the_lowest_id_counts():
    assert _most_likely(torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0]])).tolist() == [1, 0]


def tiny(folder):
    """The model of a family, its trace and kept sets of it: two groups."""
    model, tokens = load("llama3"), tokens_of("llama3")
    length = tokens.shape[1] - MORE
    with kvtrace.capture(model, folder / "run.h5", prompt_length=length), torch.no_grad():
        model(tokens)
    layers, _, kv_heads = shape_of(model)
    told = {"evict_at": length, "tokens_digest": tokens_digest(tokens[0, :length].tolist())}
    groups = [(make_sets(layers, kv_heads, length, unequal=unequal), told) for unequal in (False, True)]
    return model, folder / "run.h5", write_kept(folder / "kept.h5", *groups)


@pytest.fixture
def llama3(tmp_path):
    _, trace, kept = tiny(tmp_path)
    return ["-m", FAMILIES / "llama3", "-t", trace, "-k", kept, "-o", tmp_path / "live.h5"]


def replaced(arguments, **given):
    """Arguments with others in the place of some: m, t, k, o."""
    values = dict(zip([flag[1:] for flag in arguments[::2]], arguments[1::2]))
    return [part for flag, value in {**values, **given}.items() for part in (f"-{flag}", value)]


def test_results_are_those_of_the_format(llama3, tmp_path, kvreplay):
    assert live(*llama3).returncode == 0
    checked = subprocess.run([sys.executable, ROOT / "scripts/check-files.py", tmp_path / "live.h5"], capture_output=True,
                             text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    kept = tmp_path / "kept.h5"
    # What kvreplay writes of the same kept sets.
    written = subprocess.run([kvreplay, "replay", tmp_path / "run.h5", "--policy", f"kept(file={kept},index=0)", "--policy",
                              f"kept(file={kept},index=1)", "--capacity", "9", "-o", tmp_path / "replay.h5"],
                             capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    with h5py.File(tmp_path / "live.h5") as ours, h5py.File(tmp_path / "replay.h5") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.attrs["complete"] == 1
        assert ours["evaluation_positions"][:].tolist() == theirs["evaluation_positions"][:].tolist()
        for index in ("0", "1"):
            one, other = ours["results"][index], theirs["results"][index]
            for name, value in other.attrs.items():
                if name in ("attributes_xxh64", "nothing_to_choose"):
                    continue  # kvreplay's alone; not known of kept sets
                if name in ("policy", "capacity", "capacity_request", "trace"):
                    assert name in one.attrs
                else:
                    assert one.attrs[name] == (pytest.approx(value) if isinstance(value, float) else value), name
            for name in ("evaluation_positions", "held", "kept_per_layer"):
                assert one[name].dtype == other[name].dtype
                assert np.allclose(one[name][:], other[name][:]), name
            assert set(one) == {"evaluation_positions", "held", "kept_per_layer", "kl", "nll", "nll_increase", "agree"}
            assert one["kl"].shape == one["evaluation_positions"].shape


DIGESTS = {"tests/data/reference-needle.h5": "aafa76de49f80f19", "tests/data/trace-version-1.h5": "c710171da9911360",
           "tests/tracer/families/llama/trace.h5": None, "tests/tracer/families/mistral/trace.h5": None,
           "tests/fuzz/corpus/trace_reader/fixed-strings.h5": "cc41434828e0f35a",
           "tests/fuzz/corpus/trace_reader/written-bfloat16.h5": "c710171da9911360"}


@pytest.mark.parametrize("path", DIGESTS)
def test_digests_are_kvreplays(path):
    with h5py.File(ROOT / path) as file:
        digest = trace_digest(file)
    assert DIGESTS[path] in (None, digest)
    assert re.fullmatch("[0-9a-f]{16}", digest)


@pytest.mark.parametrize("path", [path for path in DIGESTS if "fuzz" not in path])
def test_digests_are_those_of_results(path, kvreplay, tmp_path):
    result = subprocess.run([kvreplay, "replay", ROOT / path, "--policy", "recent", "--capacity", "5", "-o",
                             tmp_path / "results.h5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with h5py.File(ROOT / path) as file, h5py.File(tmp_path / "results.h5") as results:
        assert trace_digest(file) == results["results/0"].attrs["trace_digest"]


def test_kept_sets_of_others_are_left_out_with_a_note(llama3, tmp_path):
    """By their names, where there are no digests."""
    with h5py.File(tmp_path / "kept.h5", "r+") as file:
        for index, name in (("0", "other.h5"), ("1", "run.h5")):
            del file[f"kept/{index}"].attrs["tokens_digest"]
            file[f"kept/{index}"].attrs["trace"] = f"elsewhere/{name}"
    result = live(*llama3)
    assert result.returncode == 0, result.stderr
    notes = [f"{tmp_path / 'kept.h5'}: 1 group of kept sets of other traces left out",
             f"{tmp_path / 'kept.h5'}: does not say which tokens its kept sets are of (tokens_digest), so whether they are those "
             f"of {tmp_path / 'run.h5'} could not be checked"]
    assert result.stderr == "".join(f"note: {note}\n" for note in notes)
    with h5py.File(tmp_path / "live.h5") as file:
        assert list(file["results"]) == ["0"] and file["results/0"].attrs["policy"] == "policy-1"
        assert file["results/0/notes"].asstr()[:].tolist() == notes


def test_digests_tell_of_which_trace_kept_sets_are(llama3, tmp_path, kvreplay):
    """Whatever the files are called."""
    run, kept = tmp_path / "run.h5", tmp_path / "written.h5"
    copy, again, other = (tmp_path / name for name in ("copy.h5", "again.h5", "other.h5"))
    copy.write_bytes(run.read_bytes())
    model, tokens = load("llama3"), tokens_of("llama3")
    for path, ids in ((again, tokens), (other, tokens.flip(1))):
        with kvtrace.capture(model, path, prompt_length=tokens.shape[1] - MORE, source="once more"), torch.no_grad():
            model(ids)
    written = subprocess.run([kvreplay, "replay", run, other, "--policy", "recent", "--capacity", "9", "--kept", kept],
                             capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    left_out = f"note: {kept}: 1 group of kept sets of other traces left out\n"
    for trace, notes in ((copy, left_out),
                         (again, left_out + f"note: {kept}: its kept sets are of another run of the same tokens, {run}\n")):
        result = live(*replaced(llama3, t=trace, k=kept))
        assert (result.returncode, result.stderr) == (0, notes)
    with h5py.File(kept, "r+") as file:
        del file["kept/1"]
    other.rename(run)
    assert one_line(live(*replaced(llama3, k=kept)), 1).startswith(f"{kept}: its kept sets are of {run}, and not of {run}; name")


def test_short_types_are_told(llama3, tmp_path):
    result = live(*llama3, "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("note: the model ran in bfloat16, whose rounding moves every logit")


def test_failures_are_one_line_and_leave_nothing(llama3, tmp_path):
    trace, kept = tmp_path / "run.h5", tmp_path / "kept.h5"
    model, ids = load("llama3"), prompt_of("llama3")
    with kvtrace.capture(model, tmp_path / "short.h5"), torch.no_grad():
        model(ids)
    other = load("llama3")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    last = load("llama3")
    with torch.no_grad():
        last.model.layers[1].self_attn.k_proj.weight.mul_(2)
    last.save_pretrained(tmp_path / "last")
    head = load("llama3")
    with torch.no_grad():
        head.model.norm.weight.mul_(-1)
    head.save_pretrained(tmp_path / "head")
    wider = tmp_path / "wider.h5"
    wider.write_bytes(trace.read_bytes())
    with h5py.File(wider, "r+") as file:
        file["model"].attrs["weight_shapes_digest"] = "0" * 16
    (tmp_path / "text.h5").write_text("text")
    length = ids.shape[1]
    layers, _, kv_heads = shape_of(model)
    write_kept(tmp_path / "early.h5", (make_sets(layers, kv_heads, length - 1), {"evict_at": length - 1}))
    told = {"evict_at": length, "tokens_digest": tokens_digest(ids[0].tolist())}
    write_kept(tmp_path / "heads.h5", (make_sets(layers, kv_heads + 1, length), told))
    write_kept(tmp_path / "foreign.h5", (make_sets(layers, kv_heads, length), {"evict_at": length, "trace": "other.h5"}))
    write_kept(tmp_path / "unfinished.h5", (make_sets(layers, kv_heads, length), {"evict_at": length}), complete=None)
    with h5py.File(write_kept(tmp_path / "none.h5", (make_sets(1, 1, length), {})), "r+") as file:
        del file["kept/0"]
    cut = tmp_path / "cut.h5"
    cut.write_bytes(trace.read_bytes())
    with h5py.File(cut, "r+") as file:
        del file.attrs["complete"]
    before = sorted(tmp_path.iterdir())
    for given, message in (
            ({"t": tmp_path / "missing.h5"}, "missing.h5: cannot be read: No such file"),
            ({"t": tmp_path / "text.h5"}, "text.h5: is no HDF5 file"),
            ({"t": kept}, "kept.h5: is no file of a captured run, but of kvreplay-kept"),
            ({"t": cut}, "cut.h5: is unfinished"),
            ({"t": tmp_path / "short.h5", "k": tmp_path / "bare.h5"}, "short.h5: has no tokens after the prompt"),
            ({"k": tmp_path / "text.h5"}, "text.h5: is no HDF5 file"),
            ({"k": trace}, "run.h5: is no file of kept sets, but of kvtrace"),
            ({"k": tmp_path / "unfinished.h5"}, "unfinished.h5: is unfinished"),
            ({"k": tmp_path / "none.h5"}, "none.h5: holds no kept sets"),
            ({"k": tmp_path / "foreign.h5"}, f"its kept sets are of other.h5, and not of {trace}"),
            ({"k": tmp_path / "early.h5"}, f"the eviction is at {length - 1}, and the prompt of {trace} has {length} tokens"),
            ({"k": tmp_path / "heads.h5"}, f"holds {kv_heads + 1} sets for each of {layers} layers"),
            ({"m": tmp_path / "nowhere"}, "is neither a folder nor"),
            ({"m": FAMILIES / "llama"}, "the model is not the one that"),
            ({"m": FAMILIES / "qwen3"}, "the model is not the one that"),
            ({"m": tmp_path / "other"}, "the keys that it computes in layer 0 are 10% apart from the trace's"),
            ({"m": tmp_path / "last"}, "the keys that it computes in layer 1 are"),
            ({"m": tmp_path / "head"}, "the logit of token "),
            ({"t": wider, "k": tmp_path / "any.h5"}, "its weights have other names or shapes"),
            ({"o": tmp_path / "nowhere" / "live.h5"}, "cannot be written: No such file"),
            ({"o": tmp_path}, "is a folder")):
        if "k" in given and not given["k"].exists():
            bare = write_kept(given["k"], (make_sets(layers, kv_heads, length), {"evict_at": length}))
            with h5py.File(bare, "r+") as file:
                del file["kept/0"].attrs["trace"]
            before = sorted(tmp_path.iterdir())
        assert message in one_line(live(*replaced(llama3, **given)), 1), message
        assert sorted(tmp_path.iterdir()) == before


def test_wrong_usage(llama3, tmp_path):
    for arguments, message in (
            ([], "--model"), (llama3[:2], "--trace"), ([*llama3, "--generate", "3"], "--generate"),
            (replaced(llama3, o=""), "name is empty"), ([*llama3, "--dtype", "float64"], "--dtype float64"),
            (replaced(llama3, o=tmp_path / "run.h5"), "would overwrite what they are made from"),
            (replaced(llama3, o=tmp_path / "kept.h5"), "would overwrite what they are made from"),
            (replaced(llama3, o=FAMILIES / "llama3/config.json"), "would overwrite a file of the model")):
        assert message in one_line(live(*arguments), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.h5", "run.h5"]


def test_disk_full_leaves_nothing(llama3, tmp_path):
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
            "from kvtrace.live_command import main; sys.exit(main())")
    result = subprocess.run([sys.executable, "-c", code, *map(str, llama3)], capture_output=True, text=True)
    assert one_line(result, 1) == f"{tmp_path / 'live.h5'}: cannot be written: File too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.h5", "run.h5"]


def test_command_is_installed():
    """As pyproject.toml names it."""
    project = (pathlib.Path(kvtrace.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'kvtrace-live = "kvtrace.live_command:main"' in project
