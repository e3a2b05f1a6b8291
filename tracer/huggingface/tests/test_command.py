"""kvtrace-capture as a user meets it: exit codes, one line on standard error, complete files or none."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
import transformers
from commands import one_line_of, run_command
from conftest import FAMILIES, ROOT, Trace, distance

import kvtrace.command

DEMO = ROOT / "traces/demo-model"
PROMPTS = ROOT / "traces/prompts"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def command(*arguments):
    return run_command(kvtrace.command.main, *arguments)


def one_line(result, code):
    return one_line_of("kvtrace-capture", result, code)


def test_exit_code_is_the_programs():
    result = subprocess.run([sys.executable, "-m", "kvtrace.command", "--queries"], capture_output=True, text=True)
    assert "--queries" in one_line(result, 2)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """The demo model on a prompt with spans."""
    output = tmp_path_factory.mktemp("facts") / "run.h5"
    result = command("--model", DEMO, "--prompt-file", PROMPTS / "facts.txt", "--spans", PROMPTS / "facts.spans.json",
                     "--max-new-tokens", 8, "--dtype", "float32", "--attention-mass", "-o", output)
    assert result.returncode == 0, result.stderr
    return result, Trace(output), output


def test_capture_tells_what_it_did(facts):
    result, trace, output = facts
    assert result.stdout.splitlines()[0].startswith(f"{output}: ")
    assert result.stdout.splitlines()[0].endswith(" MiB, 6 layers, 1286 prompt tokens, 1293 captured queries")
    assert result.stdout.splitlines()[1].startswith("generated 8 tokens: ")
    assert "83107" in result.stdout
    assert result.stderr.startswith("prefill: 1286 tokens in ")
    assert trace.attributes["source"].startswith("model demo-model, prompt facts.txt, greedy decoding; float32")


def test_spans_are_where_the_text_is(facts):
    _, trace, _ = facts
    spans = {request["label"]: request["text"] for request in json.loads((PROMPTS / "facts.spans.json").read_text())}
    assert {label for _, _, label in trace.spans} == set(spans)
    for start, end, label in trace.spans:
        assert spans[label].strip() == "".join(trace.pieces[start:end]).strip()


def test_both_roads_agree(facts, kvreplay, tmp_path):
    _, trace, output = facts
    result = subprocess.run(
        [kvreplay, "capture", "--model", DEMO, "--prompt", PROMPTS / "facts.txt", "--spans", PROMPTS / "facts.spans.json",
         "--generate", "8", "-o", tmp_path / "cpp.h5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with h5py.File(output) as ours, h5py.File(tmp_path / "cpp.h5") as theirs:
        names = []
        theirs.visititems(lambda name, thing: names.append(name) if isinstance(thing, h5py.Dataset) else None)
        assert {name.rpartition("/")[2] for name in names} >= {"keys", "values", "queries", "outputs", "output_projection"}
        assert ours.attrs["format_version"] == theirs.attrs["format_version"]
        # What a table is called is up to who writes it.
        tables = [file[f"rotary/{file['model'].attrs['rotary']}"] for file in (ours, theirs)]
        assert distance(tables[0][:], tables[1][:]) < 1e-6
        assert dict(tables[0].attrs).items() <= dict(tables[1].attrs).items()
        names = [name for name in names if not name.startswith("rotary/")]
        for name in names:
            one, other = ours[name][()], theirs[name][()]
            if one.dtype.kind == "f":
                assert distance(one, other) < 1e-5, name
            else:
                assert one.tolist() == other.tolist(), name
        for name, value in theirs["model"].attrs.items():
            if name in ("attributes_xxh64", "rotary"):  # kvreplay's alone; compared above
                continue
            assert ours["model"].attrs[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_file_is_what_the_format_says(facts, tmp_path):
    (tmp_path / "turns.json").write_text("[0, 5]")
    result = command("--model", FAMILIES / "llama", "--tokens", FAMILIES / "llama/prompt.ids", "--turns",
                     tmp_path / "turns.json", "-o", tmp_path / "turns.h5")
    assert result.returncode == 0, result.stderr
    checked = subprocess.run([sys.executable, ROOT / "scripts/check-files.py", facts[2], tmp_path / "turns.h5"],
                             capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.endswith("reads 2 files: 2 kvtrace\n")


def test_kvreplay_replays_it(facts, kvreplay):
    _, _, output = facts
    result = subprocess.run([kvreplay, "replay", output, "--policy", "h2o", "--policy", "restkv", "--capacity", "128"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


def test_fidelity_of_kvreplay(facts, kvreplay):
    _, _, output = facts
    result = subprocess.run([kvreplay, "inspect", output], capture_output=True, text=True)
    rows = [line.split() for line in result.stdout.split("fidelity")[1].splitlines()]
    worst = [float(row[2]) for row in rows if len(row) == 5 and row[0].isdigit()]
    assert len(worst) == 6
    assert max(worst) <= 1e-5


def test_one_of_a_thing_is_told_as_one(tmp_path):
    (tmp_path / "one.ids").write_text("7")
    result = command("-m", FAMILIES / "llama", "--tokens", tmp_path / "one.ids", "-n", 1, "-o", tmp_path / "run.h5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].endswith(", 2 layers, 1 prompt token, 1 captured query")
    assert result.stderr.startswith("prefill: 1 token in ")


def test_token_ids_are_taken_as_given(tmp_path):
    folder = FAMILIES / "mistral"
    with h5py.File(folder / "expected.h5") as file:
        expected = file["generated_ids"][:].tolist()
    result = command("-m", folder, "--tokens", folder / "prompt.ids", "-n", len(expected), "--dtype", "float32",
                     "--queries", "window:16", "--prefill-chunk", 10, "--attn-implementation", "eager", "-o",
                     tmp_path / "run.h5")
    assert result.returncode == 0, result.stderr
    # There is no tokenizer.
    assert result.stdout.splitlines()[1] == f"generated 8 tokens: {' '.join(map(str, expected))}"
    trace = Trace(tmp_path / "run.h5")
    assert trace.pieces is None
    assert trace.prompt_length == 71
    assert len(trace.positions) == 16 + 7


@pytest.mark.parametrize("name", ["gemma", "qwen2"])
def test_no_tokenizer_is_made_up(name, tmp_path):
    """transformers makes an empty one for some classes where the folder has none."""
    folder = FAMILIES / name
    result = command("-m", folder, "--tokens", folder / "prompt.ids", "-n", 3, "-o", tmp_path / "run.h5")
    assert result.returncode == 0, result.stderr
    assert Trace(tmp_path / "run.h5").pieces is None
    assert len(result.stdout.splitlines()[1].removeprefix("generated 3 tokens: ").split()) == 3


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (2, 2), (8, 2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_odd_shapes(heads, kv_heads, attention, kvreplay, tmp_path):
    """One head, many heads on one KV head; prompts shorter than the window; nothing, one or two tokens generated."""
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=2, head_dim=6,
                                      num_attention_heads=heads, num_key_value_heads=kv_heads)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for tokens in ("7", "7 9 11 5"):
        (tmp_path / "ids").write_text(tokens)
        for generate in (0, 1, 2):
            length = len(tokens.split()) + max(0, generate - 1)
            result = command("-m", tmp_path / "model", "--tokens", tmp_path / "ids", "-n", generate, "--queries", "window:64",
                             "--attention-mass", "--attn-implementation", attention, "-o", tmp_path / "run.h5")
            assert result.returncode == 0, result.stderr
            trace = Trace(tmp_path / "run.h5")
            assert len(trace.ids) == len(trace.positions) == length
            for number, layer in enumerate(trace.layers):
                assert distance(layer["outputs"], trace.attention(number)[0]) < 2e-6
            inspected = subprocess.run([kvreplay, "inspect", tmp_path / "run.h5"], capture_output=True, text=True)
            assert inspected.returncode == 0, inspected.stderr


def test_nothing_generated(tmp_path):
    folder = FAMILIES / "llama"
    result = command("-m", folder, "--tokens", folder / "prompt.ids", "-o", tmp_path / "run.h5")
    assert result.returncode == 0, result.stderr
    assert "note: the trace has no query after the prompt" in result.stderr
    assert "--max-new-tokens 2 or more adds some" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert len(Trace(tmp_path / "run.h5").ids) == 47


def test_end_of_the_sequence_at_once(tmp_path):
    folder = FAMILIES / "llama"
    options = ("--tokens", folder / "prompt.ids", "-n", 50, "-o", tmp_path / "run.h5")
    result = command("-m", folder, *options)
    assert "note: " not in result.stderr
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = int(result.stdout.splitlines()[1].split(": ")[1].split()[0])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    result = command("-m", tmp_path / "model", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].startswith(f"generated 1 token, ended by token {config['eos_token_id']}: ")
    assert "the first token ended the text; go on with --ignore-stop, or replay it with an earlier --evict-at" in result.stderr
    assert "--max-new-tokens 2" not in result.stderr


def ids_of(output):
    with h5py.File(output) as file:
        return file["tokens/ids"][:].tolist()


def llama_capture(tmp_path, *options, model=FAMILIES / "llama"):
    """Of 24 tokens behind its 47: what it says of them, and the ids in the trace."""
    result = command("-m", model, "--tokens", FAMILIES / "llama" / "prompt.ids", "-n", 24, "-o", tmp_path / "run.h5", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[1], ids_of(tmp_path / "run.h5")


def test_tokens_are_drawn_where_asked_to(tmp_path):
    def drawn(*options):
        return llama_capture(tmp_path, *options)[1]

    greedy = drawn()
    assert len(greedy) == 47 + 23
    one = drawn("--temperature", 1.5, "--seed", 3)
    assert one == drawn("--temperature", 1.5, "--seed", 3) != greedy
    assert one != drawn("--temperature", 1.5, "--seed", 4)
    assert drawn("--temperature", 1.5) == drawn("--temperature", 1.5, "--seed", 0)
    assert drawn("--temperature", 1.5, "--top-k", 1) == greedy == drawn("--temperature", 1.5, "--top-p", 1e-9)
    assert drawn("--temperature", 1e4) != drawn("--temperature", 1e4, "--top-k", 50), "all tokens unless said otherwise"
    drawn("--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--seed", 5, "--ignore-stop")
    assert ("prompt prompt.ids, sampling at temperature 0.7, top-k 40, top-p 0.9, seed 5, the model's stop tokens ignored; "
            in Trace(tmp_path / "run.h5").attributes["source"])


def model_with_stops(tmp_path, **stops):
    """The tiny llama, of whose files these name those ids."""
    shutil.copytree(FAMILIES / "llama", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    for name, ids in stops.items():
        path = tmp_path / "model" / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "eos_token_id": ids}))
    return tmp_path / "model"


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_all_files_say_where_a_model_stops(place, tmp_path):
    _, free = llama_capture(tmp_path)
    end = free[47 + 3]
    stopped = free[: free.index(end, 47)]  # what ends it is not fed back
    ids = {"config": 5, "generation_config": 5, place: [6, end]}
    assert not {5, 6} & set(free[47:])
    model = model_with_stops(tmp_path, **ids)
    said, found = llama_capture(tmp_path, model=model)
    assert found == stopped
    assert said.startswith(f"generated {len(stopped) - 46} token") and f", ended by token {end}: " in said
    assert llama_capture(tmp_path, "--ignore-stop", model=model)[1] == free
    assert llama_capture(tmp_path, "--ignore-stop", "--stop", end, model=model)[1] == stopped


def test_what_else_a_model_asks_for_is_not_done(tmp_path):
    _, free = llama_capture(tmp_path)
    model = model_with_stops(tmp_path)
    content = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "min_new_tokens": 24}
    (model / "generation_config.json").write_text(json.dumps(content))
    assert llama_capture(tmp_path, model=model)[1] == free
    assert llama_capture(tmp_path, "--stop", free[49], model=model)[1] == free[: free.index(free[49], 47)]


def test_further_tokens_to_stop_after(tmp_path):
    _, free = llama_capture(tmp_path)
    assert llama_capture(tmp_path, "--stop", free[50])[1] == free[: free.index(free[50], 47)]
    options = ["-m", DEMO, "-p", PROMPTS / "needle.txt", "-n", 12, "-o", tmp_path / "run.h5"]
    assert command(*options).returncode == 0
    trace = Trace(tmp_path / "run.h5")
    at = next(at for at in range(trace.prompt_length, len(trace.ids)) if trace.pieces[at].strip().isalpha())
    result = command(*options, "--stop", trace.pieces[at])
    assert result.returncode == 0, result.stderr
    assert f", ended by {trace.pieces[at]} (token {trace.ids[at]}): " in result.stdout
    message = one_line(command(*options, "--stop", "falcon is"), 1)
    assert message.startswith("--stop falcon is: is no single token of the model, but ")
    message = one_line(command(*options, "--stop", 2048), 1)
    assert message == "--stop 2048: is not in the model's vocabulary of 2048"


def test_chunks_are_laid_out_for_the_longest_run(kvreplay, tmp_path):
    """So that they are few where the run goes on to its end, and waste little where it does not."""
    _, free = llama_capture(tmp_path)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["layers/0/keys"].chunks[1] == 16
    options = ["-m", FAMILIES / "llama", "--tokens", FAMILIES / "llama" / "prompt.ids", "-n", 6000, "--stop", free[50], "-o",
               tmp_path / "run.h5"]
    roads = (command, lambda *given: subprocess.run([kvreplay, "capture", *map(str, given)], capture_output=True, text=True))
    for road in roads:
        assert road(*options).returncode == 0
        with h5py.File(tmp_path / "run.h5") as file:
            for name in ("keys", "values", "queries", "outputs"):
                tensor = file[f"layers/0/{name}"]
                assert tensor.shape[1] < 60
                assert 40 <= tensor.chunks[1] <= 60, "128 of them at most"


def test_both_roads_stop_alike(kvreplay, tmp_path):
    """At the end of a turn that nothing but the tokenizer's files names."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=905, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    folder, output = tmp_path / "model", tmp_path / "run.h5"
    (tmp_path / "ids").write_text("5 6 7 8 9")
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    free = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)[0].tolist()
    # What ends turns is then more likely than the seventh token that was generated.
    end = 902
    with torch.no_grad():
        model.lm_head.weight[end] = 1.01 * model.lm_head.weight[free[11]]
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tests/tracer/tokenizer/qwen2/tokenizer.json", folder)
    roads = ((command, "--max-new-tokens"), (lambda *options: subprocess.run(
        [kvreplay, "capture", *map(str, options)], capture_output=True, text=True), "--generate"))
    expected = free[: free.index(free[11], 5)]
    for content, stops in (({}, False), ({"chat_template": "{{ message['content'] + '<|im_end|>' }}"}, True),
                           ({"eos_token": "<|im_end|>"}, True)):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **content}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for road, tokens in roads:
            result = road("--model", folder, "--tokens", tmp_path / "ids", tokens, 12, "-o", output)
            assert result.returncode == 0, result.stderr
            assert (", ended by <|im_end|> (token 902): " in result.stdout) == stops
            assert result.stdout.count("<|im_end|>") == stops, "the text is without it"
            assert (ids_of(output) == expected) == stops


def test_what_is_generated_is_a_turn(tmp_path):
    def turns(*entries):
        (tmp_path / "turns.json").write_text(json.dumps(entries))
        llama_capture(tmp_path, "--turns", tmp_path / "turns.json")
        with h5py.File(tmp_path / "run.h5") as file:
            starts = file["tokens/turn_starts"]
            return starts[:].tolist(), list(starts.attrs.get("roles", ()))

    assert turns(0, 9) == ([0, 9, 47], [])
    assert turns({"position": 9, "role": "user"}, {"position": 0, "role": "system"}) == (
        [0, 9, 47], ["system", "user", "assistant"])


def test_a_chat_may_leave_its_last_turn_open(tmp_path):
    prompt = [int(word) for word in (FAMILIES / "llama" / "prompt.ids").read_text().split()]
    end = prompt[8]
    last = len(prompt) - prompt[::-1].index(end)
    model = model_with_stops(tmp_path, config=end)
    for starts, found in (([0, last], [0, last]), ([0, 1, last], [0, 1, last, 47])):
        (tmp_path / "turns.json").write_text(json.dumps(starts))
        llama_capture(tmp_path, "--turns", tmp_path / "turns.json", "--ignore-stop", model=model)
        with h5py.File(tmp_path / "run.h5") as file:
            assert file["tokens/turn_starts"][:].tolist() == found


def test_longer_than_the_context_is_a_warning(tmp_path):
    folder = FAMILIES / "llama"
    (tmp_path / "long.ids").write_text("5 6 7 8 " * 32)
    result = command("-m", folder, "--tokens", tmp_path / "long.ids", "-n", 2, "-o", tmp_path / "run.h5")
    assert result.returncode == 0, result.stderr
    assert "warning: the run may take 129 positions" in result.stderr
    assert len(Trace(tmp_path / "run.h5").ids) == 129


USAGE = {
    "no prompt": (["-m", DEMO], "needs a prompt"),
    "two prompts": (["-m", DEMO, "--tokens", "a", "--prompt-file", "b"], "needs a prompt"),
    "no model": (["--prompt-file", PROMPTS / "facts.txt"], "--model"),
    "queries": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "--queries", "window:0"],
                '--queries window:0: must be "all" or "window:N" with N at least 1'),
    "dtype": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "--dtype", "float64"], "--dtype float64"),
    "generate": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "-n", "-1"], "must not be negative"),
    "temperature": (["-m", DEMO, "-p", "a", "-n", "2", "--temperature", "-1"], "--temperature -1.0: must be a number"),
    "temperature nan": (["-m", DEMO, "-p", "a", "-n", "2", "--temperature", "nan"], "--temperature nan: must be a number"),
    "top-p": (["-m", DEMO, "-p", "a", "-n", "2", "--temperature", "1", "--top-p", "1.1"], "--top-p 1.1: must be above 0"),
    "top-k": (["-m", DEMO, "-p", "a", "-n", "2", "--temperature", "1", "--top-k", "0"], "--top-k 0: must be at least 1"),
    "seed": (["-m", DEMO, "-p", "a", "-n", "2", "--temperature", "1", "--seed", "-1"], "--seed -1: must be from 0"),
    "seed alone": (["-m", DEMO, "-p", "a", "-n", "2", "--seed", "1"], "--seed is of tokens that are drawn: ask for that with"),
    "top-p alone": (["-m", DEMO, "-p", "a", "-n", "2", "--top-p", "0.9"], "--top-p is of tokens that are drawn"),
    "nothing drawn": (["-m", DEMO, "-p", "a", "--temperature", "1"], "--temperature is of what the model generates"),
    "nothing stopped": (["-m", DEMO, "-p", "a", "--stop", "4"], "--stop is of what the model generates: ask for that with"),
    "no stop": (["-m", DEMO, "-p", "a", "-n", "2", "--stop", ""], "--stop: an empty text is no token"),
    "templated": (["-m", DEMO, "--tokens", "a", "--templated"], "--templated says how a --prompt-file is written"),
    "chunk": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "--prefill-chunk", "0"], "--prefill-chunk 0"),
    "no number": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "-n", "many"], "many"),
    "unknown option": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "--quantize"], "--quantize"),
    "overwrites the prompt": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "-o", PROMPTS / "facts.txt"], "would overwrite"),
    "overwrites the model": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "-o", DEMO / "config.json"], "would overwrite"),
    "empty name": (["-m", DEMO, "-p", PROMPTS / "facts.txt", "-o", ""], "name is empty"),
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_usage(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = USAGE[what]
    assert message in one_line(command(*arguments), 2)
    assert not list(tmp_path.iterdir())


def test_failures_are_one_line_and_leave_nothing(tmp_path):
    ids = FAMILIES / "llama" / "prompt.ids"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "words.ids").write_text("1 2 three")
    (tmp_path / "large.ids").write_text("1 2 9999")
    (tmp_path / "spans.json").write_text('[{"label": "a", "text": "nowhere"}]')
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "turns.json").write_text('[{"text": "nowhere"}]')
    output = tmp_path / "run.h5"
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
            ([DEMO, "-p", tmp_path / "missing.txt"], "missing.txt: cannot be read: No such file"),
            ([DEMO, "-p", tmp_path / "latin.txt"], "latin.txt: byte 3 is not UTF-8 text"),
            ([DEMO, "-p", tmp_path / "empty.txt"], "empty.txt: the prompt is empty"),
            ([FAMILIES / "llama", "--tokens", tmp_path / "words.ids"], 'words.ids: "three" is not a token id'),
            ([FAMILIES / "llama", "--tokens", tmp_path / "large.ids"], "token id 9999 at position 2 is not in the model's"),
            ([FAMILIES / "llama", "-p", PROMPTS / "facts.txt"], "tokenizer cannot be loaded"),
            ([FAMILIES / "gemma", "-p", PROMPTS / "facts.txt"], "tokenizer cannot be loaded"),
            ([FAMILIES / "qwen2", "-p", PROMPTS / "facts.txt"], "tokenizer cannot be loaded"),
            ([DEMO, "-p", PROMPTS / "facts.txt", "--spans", tmp_path / "spans.json"], "does not occur in the prompt"),
            ([DEMO, "-p", PROMPTS / "facts.txt", "--spans", tmp_path / "broken.json"], "is not a JSON list"),
            ([DEMO, "-p", PROMPTS / "facts.txt", "--turns", tmp_path / "turns.json"], "does not occur in the prompt"),
            ([FAMILIES / "llama", "--tokens", ids, "--turns", tmp_path / "broken.json"], "is not a JSON list"),
            ([FAMILIES / "llama", "--tokens", ids, "--spans", tmp_path / "spans.json"], "only be found in a text prompt"),
            ([tmp_path / "missing", "--tokens", ids], "is neither a folder nor"),
            ([tmp_path, "--tokens", ids], "the model cannot be loaded"),
            ([FAMILIES / "gemma2", "--tokens", ids, "--attn-implementation", "sdpa"],
             "does not support an attention implementation"),
            ([FAMILIES / "llama", "--tokens", ids, "-o", tmp_path], "is a folder")):
        arguments = ["-m", *arguments] if "-o" in arguments else ["-m", *arguments, "-o", output]
        assert message in one_line(command(*arguments), 1)
        assert sorted(tmp_path.iterdir()) == before


def needle_bytes(tmp_path):
    output = tmp_path / "whole.h5"
    assert command("-m", DEMO, "-p", PROMPTS / "needle.txt", "-n", "4", "-o", output).returncode == 0
    size = output.stat().st_size
    output.unlink()
    return size


@pytest.mark.parametrize("place", ["early", "as it is closed"])
def test_disk_full_leaves_nothing(place, tmp_path):
    # A limit on the size of files fails a write as a full disk does.
    limit = 300_000 if place == "early" else needle_bytes(tmp_path) - 20_000
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
            "from kvtrace.command import main; sys.exit(main())")
    result = subprocess.run(
        [sys.executable, "-c", code, "-m", DEMO, "-p", PROMPTS / "needle.txt", "-n", "4", "-o", tmp_path / "run.h5"],
        capture_output=True, text=True, env=ENVIRONMENT)
    message = one_line(result, 1)
    assert message == f"{tmp_path / 'run.h5'}: cannot be written: File too large"
    assert not list(tmp_path.iterdir())


# A capture that goes on until it is ended: every layer of every step waits a little.
ENDLESS = """
import sys, time, torch, kvtrace, transformers
from kvtrace.command import main
forward = torch.nn.Linear.forward
def slow(self, hidden):
    time.sleep(0.002)
    return forward(self, hidden)
torch.nn.Linear.forward = slow
sys.exit(main(sys.argv[1:]))
"""


def grown(folder):
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a name is tried out before the run
            if file.stat().st_size > 1_000_000:
                return True
    return False


def heed_signals():
    """nohup, and shells without job control that run something in the background, leave some ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def interrupted(tmp_path, *numbers, program=ENDLESS):
    """Ends a capture by signals when its file has begun to grow. The exit code and what was on standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-m", DEMO, "-p", PROMPTS / "needle.txt", "-n", "800", "-o", tmp_path / "run.h5"],
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=heed_signals)
    deadline = time.monotonic() + 120
    while not grown(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number in numbers:
        time.sleep(0.5)
        process.send_signal(number)
    message = process.stderr.read()
    return process.wait(), message


def test_kill_leaves_no_file_that_a_reader_accepts(tmp_path, request):
    code, _ = interrupted(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "run.h5").exists()
    [unfinished] = tmp_path.iterdir()
    try:
        with h5py.File(unfinished) as file:
            assert "complete" not in file.attrs
    except OSError:
        pass  # not even HDF5
    program = os.environ.get("KVREPLAY")
    if program:
        result = subprocess.run([program, "inspect", unfinished], capture_output=True, text=True)
        assert result.returncode == 1
        assert len(result.stderr.strip().splitlines()) == 1
    unfinished.unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_can_be_caught_leave_nothing(number, tmp_path):
    code, message = interrupted(tmp_path, number)
    assert code == 128 + number
    assert message.strip().splitlines()[-1] == "kvtrace-capture: interrupted"
    assert not list(tmp_path.iterdir())


# Writing lags behind from the second layer on.
LAGGING = """
import time
from kvtrace.trace_file import TraceFile
append = TraceFile.append
def lagging(*arguments):
    time.sleep(2 if arguments[1] == 1 else 0)
    append(*arguments)
TraceFile.append = lagging
""" + ENDLESS


def test_second_signal_does_not_keep_the_first_from_cleaning_up(tmp_path):
    code, message = interrupted(tmp_path, signal.SIGINT, signal.SIGINT, signal.SIGTERM, program=LAGGING)
    assert code == 128 + signal.SIGINT
    assert message.strip().splitlines()[-1] == "kvtrace-capture: interrupted"
    assert not list(tmp_path.iterdir())
