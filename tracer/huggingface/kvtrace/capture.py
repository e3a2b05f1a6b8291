"""Records a run of a Hugging Face model into a kvtrace file."""

import contextlib
import pathlib
import platform
import re
import warnings

import h5py
import torch
import transformers

from . import __version__, interface
from .attention_mass import attention_mass as mass_of
from .errors import CaptureError, UsageError
from .spans import locate_spans, locate_turns, read_spans, read_turns
from .text import encode, token_pieces
from .trace_file import FLOAT_TYPES, TraceFile
from .transfer import Transfer

# Names that attention modules give to what follows the heads.
_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")


def parse_queries(text):
    """N of "window:N", or None for "all"."""
    if text == "all":
        return None
    match = re.fullmatch(r"window:(\d{1,9})", text) if isinstance(text, str) else None
    if match is None or int(match[1]) < 1:
        raise UsageError(f'--queries {text}: must be "all" or "window:N" with N at least 1')
    return int(match[1])


class capture:
    """Records what happens to `model` inside a `with` block into the kvtrace file `path`.

        with kvtrace.capture(model, "run.h5", queries="window:64"):
            model.generate(**inputs, max_new_tokens=64)

    One run of one sequence: a prompt in one piece or several, then one token at a time. The model computes what it
    would have computed; its code and weights stay as they are. The file appears when the block ends, and does not when
    it ends with an exception.

    queries            "all", or "window:N" for the last N of the prompt and all after it
    attention_mass     also how much attention each key received from all prompt queries, for policies that accumulate
                       it (h2o); computed anew in float32, which takes time quadratic in the prompt
    output_projection  also every layer's o_proj weight
    prompt_length      tokens of the prompt; by default those before the first token that runs alone
    tokenizer          stores the text of each token
    prompt             the prompt's text, with `tokenizer`, to find spans and turns in
    spans              what to follow: a file as for `kvreplay capture --spans`, or the list that stands in it
    turn_starts        where the turns of a conversation begin: token positions, or what else `kvreplay capture --turns`
                       takes, as a list or its file
    source             a few words on where the prompt comes from
    """

    def __init__(self, model, path, *, queries="all", attention_mass=False, output_projection=True, prompt_length=None,
                 tokenizer=None, prompt=None, spans=(), turn_starts=(), source=""):
        self._window = parse_queries(queries)
        if prompt_length is not None and prompt_length < 1:
            raise UsageError("the prompt's length must be at least 1")
        if prompt is not None and tokenizer is None:
            raise UsageError("to find spans and turns in the prompt's text, give the tokenizer as well")
        self._model, self._path = model, path
        self._queries, self._wants_mass, self._wants_projection = queries, attention_mass, output_projection
        self._given_prompt_length, self._tokenizer, self._source = prompt_length, tokenizer, source
        self._spans = read_spans(spans) if isinstance(spans, (str, pathlib.Path)) else list(spans)
        self._turns = read_turns(turn_starts) if isinstance(turn_starts, (str, pathlib.Path)) else list(turn_starts)
        self._encoding = encode(tokenizer, prompt) if prompt is not None else None
        if self._encoding and prompt_length is None:
            self._given_prompt_length = len(self._encoding.ids)

        self._config = model.config.get_text_config(decoder=True)
        if getattr(model.config, "is_encoder_decoder", False):
            raise CaptureError(f"{self._config.model_type}: only decoder-only models can be captured")
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        modules = (decoder or model).modules()
        self._modules = [module for module in modules if getattr(module, "layer_idx", None) is not None]
        self._implementation = self._config._attn_implementation
        self._num_layers = self._config.num_hidden_layers

    # The block.

    def __enter__(self):
        self._ids = []  # one tensor [n] for each forward pass
        self._tokens = 0  # in them
        self._prompt_length = self._given_prompt_length  # None while it is not known
        self._layers = [_Layer() for _ in range(self._num_layers)]
        self._common = None  # what must be the same in all layers
        self._device = None
        self._failure = None  # what recording ended with, though the block may have caught it
        with contextlib.ExitStack() as undo:
            self._file = TraceFile(self._path)
            undo.callback(self._file.abandon)
            self._transfer = Transfer()
            undo.callback(self._transfer.abandon)
            self._hook = self._model.get_input_embeddings().register_forward_hook(self._on_tokens)
            undo.callback(self._hook.remove)
            interface.listen(self._implementation, self._modules, self._on_attention)
            undo.pop_all()
        return self

    def __exit__(self, kind, problem, trace):
        finished = False
        try:
            try:
                self._hook.remove()
            finally:
                interface.stop_listening(self._implementation, self._modules)
            if kind is None:
                self._finish()
                finished = True
        finally:
            if not finished:
                # The name first: what is being written may take its time, and waiting for it may be interrupted.
                self._file.remove_name()
                self._transfer.abandon()
                self._file.abandon()
        return False

    # What the run tells.

    def _on_tokens(self, module, arguments, result):
        with self._recording():
            self._record_tokens(arguments[0])

    def _on_attention(self, *call):
        with self._recording(), torch.no_grad():
            self._record_attention(*call)

    @contextlib.contextmanager
    def _recording(self):
        try:
            yield
        except BaseException as problem:
            self._failure = (str(problem) if isinstance(problem, CaptureError)
                             else f"the run was cut short by {type(problem).__name__}")
            raise

    def _record_tokens(self, ids):
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise CaptureError(f"a trace holds one sequence, but the batch has {ids.shape[0]}; run with batch size 1 "
                               "and one beam")
        count = ids.shape[1]
        if self._prompt_length is None and count == 1 and self._tokens > 0:
            self._end_prompt(self._tokens)
        self._ids.append(ids[0].detach().clone())
        self._tokens += count

    def _record_attention(self, module, query, key, value, mask, output, options):
        number = module.layer_idx
        if not 0 <= number < self._num_layers:
            raise CaptureError(f"layer {number} is none of the model's {self._num_layers}")
        layer, count = self._layers[number], query.shape[2]
        first = layer.tokens
        window = options.get("sliding_window") or 0
        self._check_shapes(number, query, key, value, output)
        if window == 1:
            # The cache would keep the last 0 tokens, and does keep all.
            raise CaptureError(f"layer {number}: a sliding window of 1 is not what transformers computes; 2 and more are "
                               "supported")
        self._check_cache(number, first, count, key.shape[2], window)
        self._check_kind(number, module, options)
        self._check_mask(number, mask, count, key.shape[2], window)
        layer.window, layer.tokens = window, first + count
        self._device = query.device

        job = _Job(self._file, number, layer, self._window)
        job.rows("keys", first, key[0, :, -count:])
        job.rows("values", first, value[0, :, -count:])
        queries, outputs = query[0], output[0].transpose(0, 1)
        if self._window is None or self._prompt_length is not None:
            wanted = 0 if self._window is None else max(0, self._prompt_length - self._window)
            skipped = max(0, wanted - first)
            if skipped < count:
                job.rows("queries", first + skipped, queries[:, skipped:])
                job.rows("outputs", first + skipped, outputs[:, skipped:])
        else:
            # Any piece may be the prompt's last.
            job.hold("queries", queries[:, -self._window:])
            job.hold("outputs", outputs[:, -self._window:])
        if self._wants_projection and not layer.projection_done:
            layer.projection_done = True
            weight = self._projection_weight(number, module, query.shape[1] * query.shape[3])
            if weight is not None:
                job.whole("output_projection", weight)
        if self._wants_mass and (self._prompt_length is None or first < self._prompt_length):
            job.add_mass(*self._mass(queries, key[0], first, options, window))
            if layer.tokens >= (self._prompt_length or layer.tokens + 1):
                job.write_mass()
        job.submit(self._transfer)

    def _end_prompt(self, length):
        """The prompt is the first `length` tokens, all of which have been seen."""
        self._prompt_length = length
        for number, layer in enumerate(self._layers):
            job = _Job(self._file, number, layer, self._window)
            if self._window is not None:
                job.write_held(length)
            if self._wants_mass:
                job.write_mass()
            job.submit(self._transfer)

    def _mass(self, queries, keys, first, options, window):
        """The attention that the prompt's queries among `queries` pay: where its keys begin, and [H, m] of it."""
        end = first + queries.shape[1]
        beyond = max(0, end - self._prompt_length) if self._prompt_length is not None else 0
        first_key = end - keys.shape[1]
        mass = mass_of(queries[:, : queries.shape[1] - beyond], keys[:, : keys.shape[1] - beyond], first, first_key,
                       scale=self._common["softmax_scale"], softcap=self._common["attn_logit_softcapping"],
                       window=window)
        return first_key, mass

    def _projection_weight(self, number, module, width):
        """The weight [C, H·D], or None where the file has to do without."""
        projection = next((getattr(module, name) for name in _PROJECTIONS if hasattr(module, name)), None)
        weight = getattr(projection, "weight", None)
        reason = None
        if weight is None:
            reason = f"{type(module).__name__} has none under a known name"
        elif hasattr(projection, "base_layer"):
            reason = "it has an adapter; merge it into the model first"
        elif weight.device.type == "meta":
            reason = "it is not in memory"
        elif weight.dtype not in FLOAT_TYPES or weight.dim() != 2 or weight.shape[1] != width:
            reason = f"it is {weight.dtype} of shape {tuple(weight.shape)}"
        if reason is None:
            return weight.detach()
        if number == 0:
            warnings.warn(f"the trace goes without output projections: {reason}", stacklevel=2)
        return None

    # What cannot be recorded.

    def _check_shapes(self, number, query, key, value, output):
        def fail(reason):
            raise CaptureError(f"layer {number}: {reason}")

        if query.shape[0] != 1:
            fail(f"a trace holds one sequence, but the batch has {query.shape[0]}; run with batch size 1 and one beam")
        if query.dtype not in FLOAT_TYPES:
            fail(f"a trace holds float32, float16 or bfloat16, and not {query.dtype}")
        heads, dim = query.shape[1], query.shape[3]
        if heads % key.shape[1] or key.shape[3] != dim or value.shape != key.shape:
            fail(f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} are not those "
                 "of grouped-query attention")
        if tuple(output.shape) != (1, query.shape[2], heads, dim):
            fail(f"the attention's output has the shape {tuple(output.shape)} for queries {tuple(query.shape)}")
        self._check_common(number, num_attention_heads=heads, num_key_value_heads=key.shape[1], head_dim=dim)

    def _check_common(self, number, **values):
        self._common = self._common or {}
        for name, value in values.items():
            if self._common.setdefault(name, value) != value:
                raise CaptureError(
                    f"layer {number}: {name} is {value}, but {self._common[name]} in a layer before; the format has one "
                    "for all")

    def _check_cache(self, number, first, count, length, window):
        end = first + count
        if self._tokens < end:
            raise CaptureError("the model was given embeddings, and a trace needs token ids")
        if length == end or (window and length == min(first, window - 1) + count):
            return
        if length == count:
            raise CaptureError("a second run began, or one without a cache; a trace holds one run, so use a block for "
                               "each, with use_cache=True")
        raise CaptureError(f"layer {number}: attention reads {length} keys after {end} tokens; use transformers' default "
                           "cache (DynamicCache)")

    def _check_kind(self, number, module, options):
        for name in ("s_aux", "sinks", "position_bias"):
            if options.get(name) is not None:
                raise CaptureError(f"layer {number}: attention with {name} cannot be replayed from a trace")
        if options.get("dropout"):
            raise CaptureError("attention drops out at random; call model.eval() before")
        if not getattr(module, "is_causal", True):
            raise CaptureError(f"layer {number}: its attention is not causal")
        scale = options.get("scaling")
        softcap = options.get("softcap") or 0.0
        dim = self._common["head_dim"]
        self._check_common(number, softmax_scale=dim**-0.5 if scale is None else float(scale),
                           attn_logit_softcapping=float(softcap))

    def _check_mask(self, number, mask, count, length, window):
        """The first and the last query of the piece must see what causal attention with this window shows them."""
        if not isinstance(mask, torch.Tensor):
            return
        if mask.dim() == 2:
            seen = [(length, mask[0, -length:] != 0)]
        elif mask.dim() == 4:
            allowed = mask[0, 0, :, :length] if mask.dtype == torch.bool else mask[0, 0, :, :length] > -1
            seen = [(length - count + 1 + row, allowed[row]) for row in {0, count - 1}]
        else:
            return
        for end, allowed in seen:
            expected = torch.zeros(length, dtype=torch.bool, device=mask.device)
            expected[max(0, end - window) if window and mask.dim() == 4 else 0 : end] = True
            if not torch.equal(allowed, expected):
                raise CaptureError(f"layer {number}: the attention mask hides or shows other positions than causal "
                                   "attention over all tokens does; run without padding")

    # The end.

    def _finish(self):
        if self._failure is not None:
            raise CaptureError(self._failure)
        if self._tokens == 0:
            raise CaptureError("the model did not run inside the block, so there is nothing to write")
        if self._prompt_length is None:
            self._end_prompt(self._tokens)
        length = self._prompt_length
        if length > self._tokens:
            raise CaptureError(f"the prompt should have {length} tokens, but only {self._tokens} ran")
        for number, layer in enumerate(self._layers):
            if layer.tokens != self._tokens:
                raise CaptureError(
                    f"layer {number} was seen at {layer.tokens} of {self._tokens} tokens; its attention does not go "
                    "through transformers' attention interface, or the run was cut short")
        ids = torch.cat([ids.cpu() for ids in self._ids]).tolist()
        if self._encoding is not None and self._encoding.ids != ids[:length]:
            raise CaptureError("the prompt's text does not give the token ids that the model was run on")
        spans = locate_spans(self._spans, self._encoding, length)
        turn_starts = locate_turns(self._turns, self._encoding, len(ids))
        pieces = token_pieces(self._tokenizer, ids) if self._tokenizer is not None else None
        self._transfer.close()

        windows = [layer.window for layer in self._layers]
        window = windows[0] if len(set(windows)) == 1 else 0
        name = self._config._name_or_path or self._model.config._name_or_path or self._config.model_type
        if pathlib.Path(name).is_dir():
            name = pathlib.Path(name).resolve().name
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        self._file.finish(
            model={"name": name, "architecture": self._config.model_type, "num_layers": self._num_layers,
                   "hidden_size": self._config.hidden_size, "rope_theta": _rope_theta(self._config),
                   "sliding_window": window, **self._common},
            layers=[{"sliding_window": layer.window} if layer.window != window else {} for layer in self._layers],
            ids=ids, prompt_length=length, pieces=pieces, spans=spans,
            turn_starts=turn_starts,
            query_positions=range(0 if self._window is None else max(0, length - self._window), len(ids)),
            source=f"model {name}" + (f", {self._source}" if self._source else "") +
                   f"; {dtype}, attention by {self._implementation}, transformers {transformers.__version__} on {device}",
            provenance={"kvtrace": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__),
                        "h5py": h5py.__version__, "python": platform.python_version(), "dtype": dtype,
                        "attn_implementation": self._implementation, "device": device, "queries": self._queries})


def _rope_theta(config):
    """Of the layers that see everything, where kinds of layers differ; 0 where there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 0.0)


class _Layer:
    """How far a layer is, and what of its run is not in the file yet. The latter belongs to the thread that writes."""

    def __init__(self):
        self.tokens = 0
        self.window = 0
        self.projection_done = False
        self.held = {}  # the last queries and outputs of a prompt whose end has not come, by name: [H, n, D]
        self.mass = None  # [H, tokens], float64


class _Job:
    """What is to be done with one layer's tensors once they are on the host, in order."""

    def __init__(self, file, number, layer, window):
        self._file, self._number, self._layer, self._window = file, number, layer, window
        self._tokens = layer.tokens
        self._steps = []  # functions of the host copy of a tensor, and the tensor (None: there is none to copy)

    def submit(self, transfer):
        # What waits to be done holds the copies alone: the model's tensors are its own to free.
        steps = [(step, tensor is not None) for step, tensor in self._steps]
        tensors = [tensor for _, tensor in self._steps if tensor is not None]
        self._steps = []

        def run(copies):
            copies = iter(copies)
            for step, takes_copy in steps:
                if takes_copy:
                    step(next(copies))
                else:
                    step()

        transfer.submit(run, tensors)

    def rows(self, name, first, tensor):
        """Writes the rows [heads, n, D] of the positions from `first` on."""
        self._steps.append((lambda rows: self._write_rows(name, first, rows), tensor))

    def whole(self, name, tensor):
        """Writes a tensor that comes in one piece."""
        self._steps.append((lambda rows: self._file.write(self._number, name, rows), tensor))

    def hold(self, name, tensor):
        """Keeps the last rows of the window, of which [heads, n, D] are the latest."""
        def step(rows):
            if name in self._layer.held:
                rows = torch.cat([self._layer.held[name], rows], 1)[:, -self._window:]
            self._layer.held[name] = rows.clone()

        self._steps.append((step, tensor))

    def write_held(self, prompt_length):
        def step():
            for name, rows in self._layer.held.items():
                self._write_rows(name, prompt_length - rows.shape[1], rows)
            self._layer.held = {}

        self._steps.append((step, None))

    def add_mass(self, first_key, tensor):
        """Adds the attention [H, m] that the keys from `first_key` on received."""
        def step(mass):
            total = torch.zeros(mass.shape[0], first_key + mass.shape[1], dtype=torch.float64)
            if self._layer.mass is not None:
                total[:, : self._layer.mass.shape[1]] = self._layer.mass
            total[:, first_key:] += mass
            self._layer.mass = total

        self._steps.append((step, tensor))

    def write_mass(self):
        """Writes it, unless that was done."""
        def step():
            if self._layer.mass is not None:
                self._file.write(self._number, "attention_mass", self._layer.mass.float())
                self._layer.mass = None

        self._steps.append((step, None))

    def _write_rows(self, name, first, rows):
        captured = name in ("queries", "outputs") and self._window
        expected = min(self._window, self._tokens) if captured else self._tokens
        self._file.append(self._number, name, rows, first, expected)
