"""What a capture promises besides the numbers: nothing is patched, nothing is half-written, nothing is silently wrong."""

import concurrent.futures
import contextlib
import gc
import threading

import h5py
import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES, Trace, assert_same_traces, generate, load, prompt_of
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvtrace
from kvtrace import interface
from kvtrace.trace_file import TraceFile
from kvtrace.transfer import Transfer


@pytest.fixture
def model():
    return load("llama")


@pytest.fixture
def ids():
    return prompt_of("llama")


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def refused(model, output, match, run, **options):
    """Asserts that the run ends with one clear line, and leaves neither a file nor a hook."""
    with pytest.raises(kvtrace.CaptureError, match=match) as problem:
        with kvtrace.capture(model, output, **options):
            run()
    assert "\n" not in str(problem.value)
    assert not output.exists()
    assert not hooks(model)


def test_batch_of_two_is_refused(model, ids, output):
    refused(model, output, "batch has 2", lambda: generate(model, ids.repeat(2, 1)))


def test_beams_are_refused(model, ids, output):
    refused(model, output, "batch has 3", lambda: generate(model, ids, num_beams=3))


def test_second_run_is_refused(model, ids, output):
    refused(model, output, "second run", lambda: [generate(model, ids), generate(model, ids)])


def test_run_without_cache_is_refused(model, ids, output):
    refused(model, output, "without a cache", lambda: generate(model, ids, use_cache=False))


def test_other_caches_are_refused(model, ids, output):
    refused(model, output, "default cache", lambda: generate(model, ids, cache_implementation="static"))


def test_embeddings_are_refused(model, ids, output):
    embeddings = model.get_input_embeddings()(ids).detach()
    refused(model, output, "token ids", lambda: model(inputs_embeds=embeddings))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_refused(attention, ids, output):
    model = load("llama", attention)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    refused(model, output, "without padding", lambda: generate(model, ids, attention_mask=mask))


def test_window_of_one_is_refused(output):
    model, ids = load("mistral"), prompt_of("mistral")
    for module in (model.config, *(layer.self_attn for layer in model.model.layers)):
        module.sliding_window = 1
    refused(model, output, "sliding window of 1", lambda: generate(model, ids))


def test_dropout_is_refused(model, ids, output):
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    refused(model, output, r"model\.eval\(\)", lambda: model(ids))


def test_block_without_a_run_is_refused(model, output):
    refused(model, output, "did not run", lambda: None)


def test_too_short_a_run_is_refused(model, ids, output):
    refused(model, output, "should have 99 tokens", lambda: generate(model, ids), prompt_length=99)


def test_run_that_is_cut_short_is_refused(model, ids, output):
    def run():
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            model(ids)
        except ZeroDivisionError:
            pass
        hook.remove()

    refused(model, output, "layer 1 was seen at 0 of 47 tokens", run)


@pytest.mark.parametrize("at", range(1, 12))
def test_run_that_the_block_saved_from_an_interruption_is_refused(at, model, ids, output, monkeypatch):
    """Wherever recording is interrupted: a trace is whole, whatever the block catches."""
    submit, calls = Transfer.submit, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        submit(*arguments)

    monkeypatch.setattr(Transfer, "submit", interrupted)

    def run():
        with contextlib.suppress(KeyboardInterrupt):
            generate(model, ids)

    refused(model, output, "^the run was cut short by KeyboardInterrupt$", run, queries="window:4", attention_mass=True)


def test_failure_that_the_block_caught_is_one(model, ids, output):
    def run():
        with contextlib.suppress(kvtrace.CaptureError):
            generate(model, ids.repeat(2, 1))
        generate(model, ids)

    refused(model, output, "batch has 2", run)


def test_interruption_of_the_end_leaves_nothing(model, ids, output, monkeypatch):
    """The name goes before anything is waited for."""
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Transfer, "abandon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with kvtrace.capture(model, output):
            model(ids)
            raise RuntimeError("on purpose")
    monkeypatch.undo()
    stop = interface.leave
    monkeypatch.setattr(interface, "leave", lambda *arguments: (stop(*arguments), interrupted()))
    with pytest.raises(KeyboardInterrupt):
        with kvtrace.capture(model, output):
            model(ids)
    assert not list(output.parent.iterdir())
    assert not hooks(model)


def test_nan_is_named_with_its_place(model, ids, output):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[4] = float("nan")
    refused(model, output, "layers/1/values: NaN at layer 1, head 0, position 0", lambda: generate(model, ids))


def test_encoder_decoders_are_refused(output):
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(kvtrace.CaptureError, match="decoder-only"):
        kvtrace.capture(model, output)


@pytest.mark.parametrize("queries", ["window", "window:0", "window:-1", "window:3.5", "some", "", 7])
def test_unknown_queries_are_refused(queries, model, output):
    with pytest.raises(kvtrace.UsageError, match='must be "all" or "window:N"'):
        kvtrace.capture(model, output, queries=queries)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_everything_is_restored_after_an_exception(attention, ids, output):
    model = load("llama", attention)
    before = generate(model, ids)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        with kvtrace.capture(model, output):
            model(ids)
            raise RuntimeError("on purpose")
    assert not output.exists()
    assert not hooks(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == attention
    assert generate(model, ids).tolist() == before.tolist()
    with kvtrace.capture(model, output):
        assert generate(model, ids).tolist() == before.tolist()
    assert Trace(output).ids.tolist() == before[0, :-1].tolist()


def test_file_appears_at_the_end_and_replaces_what_stood_there(model, ids, output):
    output.write_text("earlier")
    with kvtrace.capture(model, output):
        generate(model, ids)
        assert output.read_text() == "earlier"
    assert Trace(output).attributes["complete"] == 1


def test_failed_capture_leaves_what_stood_there(model, ids, output):
    output.write_text("earlier")
    with pytest.raises(kvtrace.CaptureError):
        with kvtrace.capture(model, output):
            generate(model, ids.repeat(2, 1))
    assert output.read_text() == "earlier"


def test_places_that_cannot_be_written_are_refused_before_the_run(model, tmp_path):
    for path, match in ((tmp_path, "is a folder"), (tmp_path / "missing" / "run.h5", "cannot be written"),
                        ("/dev/null", "is a device")):
        with pytest.raises(kvtrace.CaptureError, match=match):
            with kvtrace.capture(model, path):
                pytest.fail("the block was entered")
    assert not hooks(model)


def test_block_that_cannot_begin_leaves_nothing(model, ids, output, monkeypatch):
    monkeypatch.setattr(model, "get_input_embeddings", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with kvtrace.capture(model, output):
            pytest.fail("the block was entered")
    monkeypatch.undo()
    model.config._attn_implementation = "unheard-of"
    with pytest.raises(kvtrace.CaptureError, match="no attention implementation named unheard-of"):
        with kvtrace.capture(model, output):
            pytest.fail("the block was entered")
    model.config._attn_implementation = "eager"
    assert not hooks(model)
    with kvtrace.capture(model, output):
        model(ids)
    Trace(output)


def test_symbolic_links_are_followed(model, ids, tmp_path):
    (tmp_path / "link.h5").symlink_to("target.h5")
    with kvtrace.capture(model, tmp_path / "link.h5"):
        generate(model, ids)
    assert (tmp_path / "link.h5").is_symlink()
    Trace(tmp_path / "target.h5")


def test_other_models_run_unseen(model, ids, tmp_path):
    other = load("llama3")
    with kvtrace.capture(model, tmp_path / "alone.h5"):
        generate(model, ids)
    with kvtrace.capture(model, tmp_path / "beside.h5"):
        generate(other, prompt_of("llama3"))
        generate(model, ids)
        generate(other, prompt_of("llama3"))
    assert_same_traces(Trace(tmp_path / "beside.h5"), Trace(tmp_path / "alone.h5"), 0)


@pytest.mark.parametrize("first_ends", ["inside", "outside"])
def test_two_models_are_captured_at_once(first_ends, model, ids, tmp_path):
    other = load("llama3")
    captures = [kvtrace.capture(model, tmp_path / "one.h5"), kvtrace.capture(other, tmp_path / "two.h5")]
    for each in captures:
        each.__enter__()
    generate(model, ids)
    generate(other, prompt_of("llama3"))
    for each in captures if first_ends == "outside" else reversed(captures):
        each.__exit__(None, None, None)
    assert Trace(tmp_path / "one.h5").model["name"] == "llama"
    assert Trace(tmp_path / "two.h5").model["name"] == "llama3"


def test_one_model_is_not_captured_twice_at_once(model, ids, tmp_path):
    with kvtrace.capture(model, tmp_path / "one.h5"):
        with pytest.raises(kvtrace.CaptureError, match="captured already"):
            with kvtrace.capture(model, tmp_path / "two.h5"):
                pytest.fail("the block was entered")
        generate(model, ids)
    Trace(tmp_path / "one.h5")
    assert not (tmp_path / "two.h5").exists()


def test_attention_functions_of_others_stay(model, ids, output):
    calls = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        sdpa = load("llama", "sdpa")
        with kvtrace.capture(sdpa, output):
            generate(sdpa, ids)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert calls


def test_attention_mass_is_what_attention_weights_add_up_to(output):
    for name in ("llama3", "gemma2", "mistral"):
        model, ids = load(name), prompt_of(name)
        with kvtrace.capture(model, output, attention_mass=True, queries="window:3"):
            weights = model(ids, output_attentions=True).attentions
        for layer, attention in zip(Trace(output).layers, weights, strict=True):
            assert np.allclose(layer["attention_mass"], attention[0].sum(1).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_attention_mass_does_not_depend_on_its_blocks(model, ids, tmp_path, monkeypatch):
    with kvtrace.capture(model, tmp_path / "one.h5", attention_mass=True):
        model(ids)
    monkeypatch.setattr("kvtrace.attention_mass._BLOCK_BYTES", 8 * 5 * ids.shape[1] * 8)
    with kvtrace.capture(model, tmp_path / "many.h5", attention_mass=True):
        model(ids)
    assert_same_traces(Trace(tmp_path / "many.h5"), Trace(tmp_path / "one.h5"), 1e-6)


@pytest.mark.parametrize("queries", ["all", "window:20"])
def test_prompt_may_end_in_a_piece_of_one_token(queries, model, ids, tmp_path):
    pieces = next(size for size in range(5, 40) if ids.shape[1] % size == 1)
    options = {"queries": queries, "attention_mass": True, "prompt_length": ids.shape[1]}
    with kvtrace.capture(model, tmp_path / "whole.h5", **options):
        generate(model, ids)
    with kvtrace.capture(model, tmp_path / "pieces.h5", **options):
        generate(model, ids, prefill_chunk_size=pieces)
    assert_same_traces(Trace(tmp_path / "pieces.h5"), Trace(tmp_path / "whole.h5"), 1e-5)


def test_prompt_may_end_inside_of_what_runs_at_once(model, ids, tmp_path):
    with kvtrace.capture(model, tmp_path / "run.h5", queries="window:5", attention_mass=True, prompt_length=30):
        model(ids)
    trace = Trace(tmp_path / "run.h5")
    assert trace.prompt_length == 30
    assert trace.positions.tolist() == list(range(25, ids.shape[1]))
    assert trace.layers[0]["attention_mass"].shape == (8, 30)
    with torch.no_grad():
        assert trace.next_token == (int(model(ids).logits[0, 29].argmax()), float(model(ids).logits[0, 29].max()))
    # Every prompt query pays 1 in all.
    assert np.allclose(trace.layers[0]["attention_mass"].sum(1), 30)


def test_conversation_goes_on_in_the_same_trace(model, ids, output):
    """A second turn's tokens come in one piece behind those that were generated."""
    with kvtrace.capture(model, output, queries="window:4"):
        first = generate(model, ids, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, torch.tensor([[7, 9, 11]])], 1)
        second = generate(model, turn, past_key_values=first.past_key_values)
    trace = Trace(output)
    assert trace.ids.tolist() == second[0, :-1].tolist()
    assert trace.prompt_length == ids.shape[1]
    for number, layer in enumerate(trace.layers):
        assert np.allclose(layer["outputs"], trace.attention(number)[0], atol=1e-5)


def test_a_long_run_holds_no_tensors_of_its_own(model, ids, output):
    """But for what waits to be written: small ones between the model's would keep their memory from being used again."""
    alive = []

    def count(*_, **__):
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
        return torch.zeros(1, dtype=torch.bool)

    with kvtrace.capture(model, output, prompt_length=ids.shape[1]):
        generate(model, ids, 80, stopping_criteria=transformers.StoppingCriteriaList([count]))
    assert alive[79] - alive[39] < 40


def test_turns_may_begin_behind_the_prompt(model, ids, output):
    length = ids.shape[1]
    with kvtrace.capture(model, output, turn_starts=[length + 3, 0, 9]):
        first = generate(model, ids, return_dict_in_generate=True)
        generate(model, torch.cat([first.sequences, torch.tensor([[7, 9, 11]])], 1), past_key_values=first.past_key_values)
    with h5py.File(output) as file:
        assert file["tokens/turn_starts"][:].tolist() == [0, 9, length + 3]
        assert file["tokens/turn_starts"].dtype == np.int32


def test_turns_that_do_not_begin_in_the_run_are_refused(model, ids, output):
    refused(model, output, "turn at 99: is not one of the 47 tokens", lambda: model(ids), turn_starts=[0, 99])


def test_strings_are_read_as_such(model, ids, output):
    """Variable length and UTF-8: h5py gives them as str, so that comparing them is what it says."""
    with kvtrace.capture(model, output, spans=[{"label": "Nadel ⟂", "start": 2, "end": 5}], source="a prompt"):
        model(ids)
    found = []

    def look(name, thing):
        found.extend(f"{name} {key}" for key, value in thing.attrs.items() if isinstance(value, (bytes, np.bytes_)))
        if isinstance(thing, h5py.Dataset):
            text = h5py.check_string_dtype(thing.dtype)
            if thing.dtype.names or text is not None and (text.encoding, text.length) != ("utf-8", None):
                found.append(name)

    with h5py.File(output) as file:
        assert file.attrs["format"] == "kvtrace" and file["model"].attrs["architecture"] == "llama"
        look("/", file)
        file.visititems(look)
    assert not found
    assert Trace(output).spans == [(2, 5, "Nadel ⟂")]


def test_trace_may_go_without_projections(model, ids, output):
    with kvtrace.capture(model, output, output_projection=False):
        model(ids)
    assert set(Trace(output).layers[0]) == {"keys", "values", "queries", "outputs", "residual_norm"}


def test_weights_that_are_no_floats_are_left_out_with_a_warning(model, ids, output):
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.double(), requires_grad=False)
    projection.forward = lambda hidden: torch.nn.functional.linear(hidden.double(), projection.weight).float()
    with pytest.warns(UserWarning, match="goes without output projections"):
        with kvtrace.capture(model, output):
            model(ids)
    assert "output_projection" not in Trace(output).layers[0]


def test_long_runs_are_written_in_chunks(ids, output):
    """More rows than a chunk holds, in pieces that do not fit it."""
    model = load("llama")
    long = torch.randint(3, 160, (1, 700), generator=torch.Generator().manual_seed(5))
    with kvtrace.capture(model, output):
        result = generate(model, long, 40, return_dict_in_generate=True, prefill_chunk_size=93)
    trace = Trace(output)
    assert len(trace.ids) == 739
    for number, (layer, cached) in enumerate(zip(trace.layers, result.past_key_values.layers)):
        assert np.array_equal(layer["keys"], cached.keys[0].numpy())
        assert np.allclose(layer["outputs"], trace.attention(number)[0], atol=1e-5)


def test_cache_is_freed_while_the_disk_lags_behind(model, ids, output, monkeypatch):
    """Only copies wait to be written: a key cache that the next step has replaced is nobody's."""
    disk = threading.Event()
    append = TraceFile.append

    def lagging(*arguments):
        assert disk.wait(60)
        append(*arguments)

    monkeypatch.setattr(TraceFile, "append", lagging)
    try:
        with kvtrace.capture(model, output), torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            replaced = [StorageWeakRef(layer.keys.untyped_storage()) for layer in cache.layers]
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            held = [number for number, storage in enumerate(replaced) if not storage.expired()]
            disk.set()
    finally:
        disk.set()
    assert not held
    assert len(Trace(output).ids) == ids.shape[1] + 1


def test_provenance_is_told(model, ids, output):
    with kvtrace.capture(model, output, queries="window:8", source="a test"):
        model(ids)
    trace = Trace(output)
    assert trace.provenance["torch"] == torch.__version__
    assert trace.provenance["transformers"] == transformers.__version__
    assert trace.provenance["attn_implementation"] == "eager"
    assert trace.provenance["dtype"] == "float32"
    assert trace.provenance["device"] == "cpu"
    assert trace.provenance["queries"] == "window:8"
    assert trace.attributes["source"].startswith("model llama, a test; float32, attention by eager")
    # Nothing of the machine that made it.
    assert str(FAMILIES) not in " ".join(map(str, {**trace.attributes, **trace.provenance, **trace.model}.values()))


def test_works_in_a_thread(model, ids, output):
    def run():
        with kvtrace.capture(model, output):
            return generate(model, ids)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ids = pool.submit(run).result()
    assert Trace(output).ids.tolist() == ids[0, :-1].tolist()
