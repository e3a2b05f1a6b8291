"""Records a run of a Hugging Face model into a kvtrace file."""

import contextlib
import inspect
import pathlib
import platform
import re
import warnings
import weakref

import h5py
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from . import __version__, checks, interface
from .attention_mass import attention_mass as mass_of
from .errors import CaptureError, UsageError
from .masks import Masks
from .modules import decoder_config, decoder_of, is_innermost, numbered, weight_shapes_digest
from .plain_attention import plain_attention
from .residual import ResidualStream, layer_of
from .rotary import UnturnedKeys, tables_of, turning_table
from .spans import locate_spans, locate_turns, read_spans, read_turns
from .text import encode, token_pieces
from .trace_file import FLOAT_TYPES, TraceFile
from .transfer import Transfer

# Names that attention modules give to what follows the heads.
_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "Wo")

# Names that modules give to the cache they are handed.
_CACHES = ("cache", "past_key_values", "past_key_value")

# How far, in parts of its norm, a recorded output may be from what queries, keys and values give: above what rounding in
# the type and in the many ways to compute attention makes up.
_ROUNDING = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_SEVERAL_CALLS = "it calls attention several times for the same tokens, and a trace holds one attention for each layer"
_SHARED = "it has no keys and values of its own in the cache; shared ones are not in this format yet"


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

        self._config = decoder_config(model)
        self._decoder = decoder_of(model)
        self._modules = numbered(self._decoder)
        self._implementation = self._config._attn_implementation
        self._num_layers = self._config.num_hidden_layers

    # The block.

    def __enter__(self):
        self._ids = []  # one tensor [n] for each forward pass
        self._tokens = 0  # in them
        self._passes = 0  # of the decoder
        self._positions = []  # of each pass that told some, one tensor [n]
        self._positions_of = None  # the pass that told the last of them
        self._checked_positions = 0  # of those tensors
        self._last_position = None  # of what was checked
        self._prompt_length = self._given_prompt_length  # None while it is not known
        self._next_token = None  # the most likely id after the prompt, as far as it is known, and its logit
        self._layers = [_Layer() for _ in range(self._num_layers)]
        self._residuals = {}  # by the attention module's identity: a ResidualStream
        self._common = None  # what must be the same in all layers
        self._rotary = tables_of(self._decoder)  # what could turn keys
        self._masks = Masks(self._implementation)
        self._suspected = None  # the layer whose attention reads what its cache does not hold, and what that is
        self._entering = None  # what should enter the projection next: layer number, output, its version
        self._device = None
        self._failure = None  # what recording ended with, though the block may have caught it
        self._hooks = []
        with contextlib.ExitStack() as undo:
            self._file = TraceFile(self._path)
            undo.callback(self._file.abandon)
            self._transfer = Transfer()
            undo.callback(self._transfer.abandon)
            undo.callback(self._remove_hooks)
            self._hooks.append(self._model.get_input_embeddings().register_forward_hook(self._on_tokens))
            self._hooks.append(self._decoder.register_forward_pre_hook(self._on_pass, with_kwargs=True))
            self._hooks.append(self._model.register_forward_hook(self._on_logits))
            for module in self._decoder.modules():
                if "Rotary" in type(module).__name__:
                    self._hooks.append(module.register_forward_pre_hook(self._on_rotary, with_kwargs=True))
            for module in self._modules:
                if self._has(module.layer_idx):
                    layer = self._layers[module.layer_idx]
                    layer.hooks.append(module.register_forward_pre_hook(self._on_cache, with_kwargs=True))
                    if self._rotary and layer.unturned is None:
                        layer.unturned = UnturnedKeys.of(module)
                    if is_innermost(module):
                        self._residuals[id(module)] = ResidualStream(layer_of(self._decoder, module), module, self._recording)
            interface.listen(self._implementation, self._modules, self._on_attention)
            undo.pop_all()
        return self

    def __exit__(self, kind, problem, trace):
        finished = False
        try:
            try:
                self._remove_hooks()
            finally:
                interface.leave(self._implementation, self._modules)
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

    def _remove_hooks(self):
        for hook in (*self._hooks, *(hook for layer in self._layers for hook in layer.all_hooks())):
            hook.remove()
        for residual in self._residuals.values():
            residual.remove_hooks()

    # What the run tells.

    def _on_tokens(self, module, arguments, result):
        with self._recording():
            self._record_tokens(arguments[0])

    def _on_pass(self, module, arguments, options):
        with self._recording():
            self._passes += 1
            self._record_positions(options.get("position_ids"))

    def _on_logits(self, module, arguments, result):
        with self._recording(), torch.no_grad():
            self._record_logits(getattr(result, "logits", None))

    def _on_rotary(self, module, arguments, options):
        with self._recording():
            for value in (*arguments, *options.values()):
                if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
                    self._record_positions(value)

    def _on_cache(self, module, arguments, options):
        """Before a layer's first attention: which cache it is handed. Without one, one that keeps nothing: what the layer
        would have cached is what a trace holds."""
        with self._recording():
            layer = self._layers[module.layer_idx]
            for value in (*arguments, *options.values()):
                if isinstance(value, transformers.Cache):
                    layer.cache = weakref.ref(value)  # not to be kept from being freed
                    return None
            taken = inspect.signature(module.forward).parameters
            name = next((name for name in _CACHES if name in taken), None)
            if name is None or list(taken).index(name) < len(arguments):
                return None
            cache = _NoCache()
            layer.cache = weakref.ref(cache)
            return arguments, {**options, name: cache}

    def _on_attention(self, *call):
        with self._recording(), torch.no_grad():
            self._record_attention(*call)

    def _on_projection(self, projection, arguments, result):
        with self._recording(), torch.no_grad():
            self._record_projection(projection, arguments, result)

    @contextlib.contextmanager
    def _recording(self):
        if self._failure is not None:
            raise CaptureError(self._failure)
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
        if self._tokens > 0:
            self._check_suspicion()
            self._check_layers()
        count = ids.shape[1]
        if self._prompt_length is None and count == 1 and self._tokens > 0:
            self._end_prompt(self._tokens)
        self._ids.append(ids[0].detach().clone())
        self._tokens += count

    def _record_logits(self, logits):
        """Of the last tokens that ran [1, n, V]. As long as the prompt's end is not known, any may be its last."""
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            return
        last = (self._prompt_length or self._tokens) - 1
        row = last - (self._tokens - logits.shape[1])
        if 0 <= row < logits.shape[1]:
            logit, token = logits[0, row].float().max(-1)
            self._next_token = int(token), float(logit)

    def _record_positions(self, positions):
        """The first that a pass tells: of each token [1, n] or, where images have several axes, [axes, 1, n]."""
        if not isinstance(positions, torch.Tensor) or self._positions_of == self._passes:
            return
        axes = positions.reshape(-1, positions.shape[-1]) if positions.dim() else positions[None, None]
        if axes.shape[0] > 1 and not bool((axes == axes[:1]).all()):
            return  # an image's
        self._positions_of = self._passes
        self._positions.append(axes[0].detach().clone())

    def _check_positions(self):
        for positions in self._positions[self._checked_positions :]:
            positions = positions.tolist()
            reason = checks.positions_fault(positions, self._last_position)
            if reason:
                raise CaptureError(reason)
            self._last_position = positions[-1]
        self._checked_positions = len(self._positions)

    def _record_attention(self, module, query, key, value, mask, output, options):
        number = module.layer_idx
        self._entering = None
        self._check_suspicion(number)
        if not self._has(number):
            raise CaptureError(f"an attention of the model does not say which of its {self._num_layers} layers it is "
                               f"(layer_idx is {number}), as where layers without attention share one; such models cannot be "
                               "captured yet")
        layer, count = self._layers[number], query.shape[2]
        first = layer.tokens
        window = options.get("sliding_window") or 0
        self._check_first_call(number)
        if query.shape[0] != 1:
            raise CaptureError(f"layer {number}: a trace holds one sequence, but the batch has {query.shape[0]}; run with "
                               "batch size 1 and one beam")
        if window == 1:
            # The cache would keep the last 0 tokens, and does keep all.
            raise CaptureError(f"layer {number}: a sliding window of 1 is not what transformers computes; 2 and more are "
                               "supported")
        # Once for the prompt and once for what is generated, which may take other paths through the model's code.
        fresh = first == 0 or (count == 1 and not layer.checked_decoding)
        layer.checked_decoding = layer.checked_decoding or (first > 0 and count == 1)
        self._refuse(number, checks.options_fault(options))
        reason = checks.length_fault(first, count, key.shape[2], window, self._original_length())
        if reason is not None:
            self._refuse(number, self._shared_fault(number, key) or reason)
        self._refuse(number, self._masks.fault(module, mask, options, first, count, key.shape[2], window))
        if count > 1:  # those of tokens that run alone at the end: a GPU would have to be waited for
            self._check_positions()
        if fresh:
            self._suspected = self._cache_fault(number, key, value, window)
            if self._suspected is not None:
                return  # what comes next tells whether that is all
        self._check_shapes(number, query, key, value, output)
        self._check_kind(number, options)
        if fresh:
            self._check_output(number, query, key, value, output, first, window)
        if first == 0:
            self._find_rotary(layer, key[0])
        layer.window, layer.tokens, layer.residual = window, first + count, self._residuals.get(id(module))
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
        if self._wants_projection and fresh:
            self._await_projection(number, module, output)
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

    # The output projection: stored where what enters it is what attention gave.

    def _await_projection(self, number, module, output):
        layer = self._layers[number]
        if layer.projection is None:
            projection = next((getattr(module, name) for name in _PROJECTIONS if hasattr(module, name)), None)
            layer.no_projection = _projection_fault(module, projection, output.shape[2] * output.shape[3])
            if layer.no_projection is not None:
                return
            layer.projection = projection
            layer.projection_hook = projection.register_forward_hook(self._on_projection)
            layer.no_projection = "its attention does not call it as a module"
        if layer.projection_hook is not None:
            self._entering = number, output, _version(output)

    def _record_projection(self, projection, arguments, result):
        if self._entering is None or self._layers[self._entering[0]].projection is not projection:
            return
        number, output, version = self._entering
        self._entering = None
        layer = self._layers[number]
        reason = _entry_fault(projection, arguments[0] if arguments else None, result, output, version)
        first = not layer.projection_written
        if reason is None and first:
            job = _Job(self._file, number, layer, self._window)
            job.whole("output_projection", projection.weight.detach())
            job.submit(self._transfer)
            layer.projection_written, layer.no_projection = True, None
        elif reason is not None and first:
            layer.no_projection = reason
        elif reason is not None:
            raise CaptureError(f"layer {number}: {reason}, though it was with the prompt")
        if reason is not None or layer.checked_decoding:
            layer.projection_hook.remove()
            layer.projection_hook = None

    def _tell_missing_projections(self):
        self._tell_missing("output projections", {number: layer.no_projection for number, layer in enumerate(self._layers)
                                                  if not layer.projection_written})

    def _tell_missing(self, what, missing):
        """`missing`: why, by the layer's number."""
        if not missing:
            return
        where = ""
        if len(missing) < self._num_layers:
            where = f" in layer{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        warnings.warn(f"the trace goes without {what}{where}: {next(iter(missing.values()))}", stacklevel=5)

    # The residual stream.

    def _write_residuals(self, start):
        """Of the queries from position `start` on, where it could be read."""
        missing = {}
        for number, layer in enumerate(self._layers):
            residual = layer.residual
            norms = residual.norms(self._tokens) if residual is not None else None
            if norms is None:
                missing[number] = residual.fault if residual is not None else "its attention is not known"
                continue
            self._file.write(number, "residual_norm", norms[start:])
            if residual.output_norm is not None:
                self._file.write(number, "projection_output_norm", residual.output_norm.weight,
                                 epsilon=residual.output_norm.epsilon)
        self._tell_missing("norms of the residual stream", missing)

    # What cannot be recorded.

    def _has(self, number):
        return type(number) is int and 0 <= number < self._num_layers

    def _refuse(self, number, reason):
        if reason is not None:
            raise CaptureError(f"layer {number}: {reason}")

    def _check_suspicion(self, number=None):
        """`number`: the layer that calls attention next, if one does."""
        if self._suspected is not None:
            suspect, reason = self._suspected
            self._refuse(suspect, _SEVERAL_CALLS if number == suspect else reason)

    def _check_first_call(self, number):
        """New tokens came since the layer's last attention."""
        layer = self._layers[number]
        if layer.tokens == self._tokens:
            if layer.tokens > 0 and layer.pass_ == self._passes:
                self._refuse(number, _SEVERAL_CALLS)
            raise CaptureError("the model was given embeddings, and a trace needs token ids")
        layer.pass_ = self._passes

    def _check_layers(self):
        """Every layer has seen what ran so far."""
        tokens = [layer.tokens for layer in self._layers]
        if any(tokens) or self._passes > 0:
            kinds = [set() for _ in self._layers]
            for module in self._modules:
                if self._has(module.layer_idx) and is_innermost(module):
                    kinds[module.layer_idx].add(type(module).__name__)
            reason = checks.unseen_fault(tokens, kinds)
            if reason is not None:
                raise CaptureError(reason)

    def _original_length(self):
        parameters = getattr(self._config, "rope_parameters", None) or {}
        if parameters.get("rope_type") != "longrope":
            return None
        return parameters.get("original_max_position_embeddings",
                              getattr(self._config, "original_max_position_embeddings", None))

    def _shared_fault(self, number, key):
        """A reason where another layer has read these keys."""
        for other, layer in enumerate(self._layers):
            if other != number and layer.storage is not None and layer.storage.is_of(key):
                return f"it reads the keys and values of layer {other}; shared ones are not in this format yet"
        return None

    def _cache_fault(self, number, key, value, window):
        """The layer's number and a reason where its attention reads anything but what its cache holds, and no other layer
        reads; else None."""
        layer, length = self._layers[number], key.shape[2]
        shared = self._shared_fault(number, key)
        if shared is not None:
            return number, shared
        layer.storage = _Storage(key)
        cache = layer.cache() if layer.cache is not None else None
        cache = getattr(cache, "self_attention_cache", cache)
        if layer.checked_decoding:
            for hook in layer.hooks:
                hook.remove()
            layer.hooks.clear()
        if cache is None:
            return None
        if isinstance(cache, _NoCache):
            keys, values = cache.states.pop(number, (None, None))
        else:
            layers = getattr(cache, "layers", None) or []
            held = layers[number] if number < len(layers) else None
            keys, values = getattr(held, "keys", None), getattr(held, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            return number, _SHARED
        # A cache of a window holds what the next query sees beside itself.
        expected = length if keys.shape[2] == length or not window else min(length, window - 1)
        reason = checks.cache_fault(*(tuple((tensor.shape[1], tensor.shape[3]) for tensor in pair)
                                      for pair in ((key, value), (keys, values))), expected, keys.shape[2])
        if reason is not None:
            return number, reason
        for given, kept in ((key, keys), (value, values)):
            if given.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr() and not torch.equal(
                    given[:, :, -1], kept[:, :, -1]):
                return number, ("its attention reads other keys and values than its cache holds, of which they were made; a "
                                "trace holds the cache's")
        return None

    def _check_shapes(self, number, query, key, value, output):
        if query.dtype not in FLOAT_TYPES:
            self._refuse(number, f"a trace holds float32, float16 or bfloat16, and not {query.dtype}")
        heads, dim = query.shape[1], query.shape[3]
        if heads % key.shape[1] or key.shape[3] != dim or value.shape != key.shape:
            self._refuse(number, f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} are "
                                 "not those of grouped-query attention")
        if tuple(output.shape) != (1, query.shape[2], heads, dim):
            self._refuse(number, f"the attention's output has the shape {tuple(output.shape)} for queries "
                                 f"{tuple(query.shape)}")
        self._check_common(number, num_attention_heads=heads, num_key_value_heads=key.shape[1], head_dim=dim)

    def _check_common(self, number, **values):
        self._common = self._common or {}
        for name, value in values.items():
            if self._common.setdefault(name, value) != value:
                self._refuse(number, f"{name} is {value}, but {self._common[name]} in a layer before; the format has one for "
                                     "all")

    def _check_kind(self, number, options):
        if options.get("dropout"):
            raise CaptureError("attention drops out at random; call model.eval() before")
        scale = options.get("scaling")
        softcap = options.get("softcap") or 0.0
        dim = self._common["head_dim"]
        self._check_common(number, softmax_scale=dim**-0.5 if scale is None else float(scale),
                           attn_logit_softcapping=float(softcap))

    def _check_output(self, number, query, key, value, output, first, window):
        """The first, the middle and the last query's output is that of their attention to keys and values."""
        count = query.shape[2]
        rows = torch.tensor(sorted({0, count // 2, count - 1}), device=query.device)
        expected = plain_attention(query[0][:, rows], key[0], value[0], first + rows, first + count - key.shape[2],
                                   scale=self._common["softmax_scale"], softcap=self._common["attn_logit_softcapping"],
                                   window=window).transpose(0, 1)
        given = output[0][rows].float()
        distance = float((given - expected).norm() / expected.norm())
        if distance > _ROUNDING[query.dtype]:
            self._refuse(number, f"its attention's output is {distance:.0%} apart from what queries, keys and values give; "
                                 "it computes something that a trace has no place for")

    def _find_rotary(self, layer, keys):
        """Of the prompt's first piece, whose keys [K, n, D] are in the cache; of one position nothing can be told."""
        if layer.unturned is None:
            return
        before, layer.unturned = layer.unturned.take(keys.shape), None
        count = keys.shape[1]
        if count < 2:
            return
        rows = torch.tensor(sorted({1, count // 2, count - 1}), device=keys.device)
        layer.rotary = turning_table(self._rotary, [some[:, rows] for some in before], keys[:, rows], rows)

    def _rotary_tables(self):
        """Those that turned the keys of layers, and of each layer its table's name or None."""
        # Some change with the length of what runs; of such keys no table tells.
        still = {(table.name, table.layout): table for table in tables_of(self._decoder)}
        used = []
        for layer in self._layers:
            table = layer.rotary
            now = still.get((table.name, table.layout)) if table is not None else None
            same = now is not None and torch.equal(now.inverse_frequencies, table.inverse_frequencies)
            used.append(table if same and now.attention_scaling == table.attention_scaling else None)
        tables = {table.name: table for table in used if table is not None}
        return tables.values(), [table.name if table is not None else None for table in used]

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
        self._check_suspicion()
        self._check_layers()
        for number, layer in enumerate(self._layers):
            if layer.tokens != self._tokens:
                raise CaptureError(f"layer {number} was seen at {layer.tokens} of {self._tokens} tokens; the run was cut short")
        self._check_positions()
        ids = torch.cat([ids.cpu() for ids in self._ids]).tolist()
        if self._encoding is not None and self._encoding.ids != ids[:length]:
            raise CaptureError("the prompt's text does not give the token ids that the model was run on")
        spans = locate_spans(self._spans, self._encoding, length)
        turn_starts = locate_turns(self._turns, self._encoding, len(ids))
        pieces = token_pieces(self._tokenizer, ids) if self._tokenizer is not None else None
        self._transfer.close()
        if self._wants_projection:
            self._tell_missing_projections()
        start = 0 if self._window is None else max(0, length - self._window)
        self._write_residuals(start)

        shapes = weight_shapes_digest(self._decoder)
        tables, turned_by = self._rotary_tables()
        turns_all = turned_by[0] if len(set(turned_by)) == 1 else None
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
                   "sliding_window": window, **({"rotary": turns_all} if turns_all else {}),
                   **({"weight_shapes_digest": shapes} if shapes else {}), **self._common},
            layers=[{**({"sliding_window": layer.window} if layer.window != window else {}),
                     **({"rotary": name} if name and not turns_all else {})}
                    for layer, name in zip(self._layers, turned_by)],
            rotary=tables,
            ids=ids, prompt_length=length, next_token=self._next_token, pieces=pieces, spans=spans,
            turn_starts=turn_starts,
            query_positions=range(start, len(ids)),
            source=f"model {name}" + (f", {self._source}" if self._source else "") +
                   f"; {dtype}, attention by {self._implementation}, transformers {transformers.__version__} on {device}",
            provenance={"kvtrace": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__),
                        "h5py": h5py.__version__, "python": platform.python_version(), "dtype": dtype,
                        "attn_implementation": self._implementation, "device": device, "queries": self._queries})


def _rope_theta(config):
    """Of the layers that see everything, where kinds of layers differ; 0 where there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in parameters:
        parameters = parameters["full_attention"] or {}  # None: those layers have no rotary embedding
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 0.0)


def _version(tensor):
    """Changes when the tensor is written over."""
    return None if tensor.is_inference() else tensor._version


def _projection_fault(module, projection, width):
    """Why the weight [C, H·D] cannot be had, or None."""
    weight = getattr(projection, "weight", None)
    if weight is None:
        return f"{type(module).__name__} has none under a known name"
    if hasattr(projection, "base_layer"):
        return "it has an adapter; merge it into the model first"
    if weight.device.type == "meta":
        return "it is not in memory"
    if weight.dtype not in FLOAT_TYPES or weight.dim() != 2 or weight.shape[1] != width:
        return f"it is {weight.dtype} of shape {tuple(weight.shape)}"
    return None


def _entry_fault(projection, entered, result, output, version):
    """Why a projection that turned `entered` into `result` is not what follows the attention's `output`, or None."""
    name = type(projection).__name__
    if not isinstance(entered, torch.Tensor) or entered.numel() != output.numel():
        return f"what enters it ({name}) is not the heads' outputs"
    given = output.reshape(-1)
    same = version == _version(output) and torch.equal(entered.reshape(-1).to(given), given)
    if not same:
        apart = float((entered.reshape(-1).to(given) - given).float().norm() / given.float().norm())
        if version != _version(output) or apart > _ROUNDING[output.dtype] / 10:
            return (f"what enters it is not what attention gave{f' ({apart:.0%} apart)' if apart else ''}: a gate, a norm or "
                    "something else stands between, which a trace has no place for yet")
    row = entered.reshape(-1, projection.weight.shape[1])[-1:].to(projection.weight.dtype)
    expected = torch.nn.functional.linear(row, projection.weight, getattr(projection, "bias", None))
    given = result.reshape(-1, expected.shape[1])[-1:] if isinstance(result, torch.Tensor) else None
    if given is None or not float((given - expected).float().norm()) <= 0.05 * float(expected.float().norm()):
        return f"it is no product with its weight alone ({name})"
    return None


class _Storage:
    """Tells whether a tensor begins where another did that may be gone."""

    def __init__(self, tensor):
        # The reference keeps its number from being given to others.
        self._reference, self._place = StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()

    def is_of(self, tensor):
        return tensor.untyped_storage()._cdata == self._reference.cdata and tensor.data_ptr() == self._place


class _NoCache(transformers.DynamicCache):
    """Takes the place of no cache, and holds of each layer what would have been cached until that has been looked at."""

    def __init__(self):
        super().__init__()
        self.states = {}

    def update(self, key_states, value_states, layer_idx, *arguments, **options):
        self.states[layer_idx] = key_states, value_states
        return key_states, value_states


class _Layer:
    """How far a layer is, and what of its run is not in the file yet. The latter belongs to the thread that writes."""

    def __init__(self):
        self.tokens = 0
        self.window = 0
        self.pass_ = 0  # of the decoder, in which it was seen last
        self.checked_decoding = False
        self.cache = None  # a reference to what it was handed last as such
        self.storage = None  # of its keys at that attention
        self.hooks = []  # that wait for the cache
        self.unturned = None  # its first keys before they are turned
        self.rotary = None  # the table that turned them
        self.projection = None
        self.projection_hook = None
        self.projection_written = False
        self.no_projection = None  # why it is not stored
        self.residual = None  # a ResidualStream
        self.held = {}  # the last queries and outputs of a prompt whose end has not come, by name: [H, n, D]
        self.mass = None  # [H, tokens], float64

    def all_hooks(self):
        return [*self.hooks, *([self.projection_hook] if self.projection_hook is not None else []),
                *(self.unturned.hooks if self.unturned is not None else [])]


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
