"""Records a run of a Hugging Face model into a kvtrace file."""

import collections
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

from . import __version__, checks, interface
from .attention_mass import attention_mass as mass_of
from .attention_rule import AttentionRule
from .cache_forms import AsCached, Copied, form_of
from .caches import NoCache, Storage, held_by
from .errors import CaptureError, UsageError
from .growing import GrowingTensor
from .layers import Job, Layer
from .masks import Masks
from .modules import decoder_config, decoder_of, is_innermost, numbered, visibilities, weight_shapes_digest
from .plain_attention import plain_attention
from .projections import Projection, scope_of
from .residual import ResidualStream, layer_of
from .rotary import UnturnedKeys, tables_of, turning_table
from .spans import leaves_turn_open, locate_spans, locate_turns, read_spans, read_turns
from .stop_tokens import model_stop_ids
from .text import encode, token_pieces
from .trace_file import FLOAT_TYPES, TraceFile
from .transfer import Transfer

# Names that modules give to the cache they are handed.
_CACHES = ("cache", "past_key_values", "past_key_value")

# How far, in parts of its norm, a recorded output may be from what queries, keys and values give: above what rounding in
# the type and in the many ways to compute attention makes up.
_ROUNDING = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}

_SEVERAL_CALLS = "it calls attention several times for the same tokens, and a trace holds one attention for each layer"
_UNCACHED = "it has no keys and values in the cache, and those that it reads are of no layer before"

# What attention is handed learned logits as that stand in the softmax's denominator.
_SINKS = ("s_aux", "sinks")

# What of a layer's attributes is its AttentionRule.
_RULE = ("softmax_scale", "attn_logit_softcapping", "sliding_window", "attention_chunk_size")


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
    output_projection  also every layer's output projection
    prompt_length      tokens of the prompt; by default those before the first token that runs alone
    tokenizer          stores the text of each token
    prompt             the prompt's text, with `tokenizer`, to find spans and turns in
    templated          the text is a chat that a template has written out: the tokenizer added nothing to it
    spans              what to follow: a file as for `kvreplay capture --spans`, or the list that stands in it
    turn_starts        where the turns of a conversation begin: token positions, or what else `kvreplay capture --turns`
                       takes, as a list or its file; what is generated begins one too, unless one is given there or the
                       prompt leaves its last turn open, the others having a stop token of the model in them
    most_tokens        how many tokens may run at most, where that is known: what the file's chunks are laid out for
    source             a few words on where the prompt comes from
    """

    def __init__(self, model, path, *, queries="all", attention_mass=False, output_projection=True, prompt_length=None,
                 tokenizer=None, prompt=None, templated=False, spans=(), turn_starts=(), most_tokens=None, source=""):
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
        self._most_tokens = most_tokens or 0
        self._encoding = encode(tokenizer, prompt, templated) if prompt is not None else None
        if self._encoding and prompt_length is None:
            self._given_prompt_length = len(self._encoding.ids)

        self._config = decoder_config(model)
        self._decoder = decoder_of(model)
        self._modules = numbered(self._decoder)
        self._implementation = self._config._attn_implementation
        self._num_layers = self._config.num_hidden_layers
        self._visibilities = visibilities(self._config, self._num_layers)

    # The block.

    def __enter__(self):
        self._ids = GrowingTensor()
        self._tokens = 0  # in them
        self._passes = 0  # of the decoder
        self._positions = GrowingTensor()  # of each pass that told some
        self._positions_of = None  # the pass that told the last of them
        self._checked_positions = 0  # of those
        self._last_position = None  # of what was checked
        self._prompt_length = self._given_prompt_length  # None while it is not known
        self._next_token = None  # the most likely id after the prompt, as far as it is known, and its logit
        self._layers = [Layer() for _ in range(self._num_layers)]
        self._residuals = {}  # by the attention module's identity: a ResidualStream
        self._attending_kinds = set()  # of modules that called attention
        self._scopes = {}  # by the attention module's identity: where its output projection is
        self._numbers = {}  # by the identity of a module that serves several layers: the one that it runs as
        self._rotary = tables_of(self._decoder)  # what could turn keys
        self._masks = Masks(self._implementation)
        self._suspected = None  # the layer whose attention reads what its cache does not hold, and what that is
        self._followed = None  # the Projection that a layer's outputs are on the way to
        self._device = None
        self._failure = None  # what recording ended with, though the block may have caught it
        self._hooks = []
        with contextlib.ExitStack() as undo:
            self._file = TraceFile(self._path, self._most_tokens)
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
                scope = scope_of(module, layer_of(self._decoder, module))
                self._scopes[id(module)] = scope
                self._hooks.append(scope.register_forward_hook(self._on_scope_end, always_call=True))
            for module in self._modules:
                if not self._has(module.layer_idx):
                    self._hooks.append(module.register_forward_pre_hook(self._on_shared_module, with_kwargs=True))
                else:
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
        self._end_following()
        for hook in (*self._hooks, *(hook for layer in self._layers for hook in layer.all_hooks())):
            hook.remove()
        for layer in self._layers:
            if layer.projection is not None:
                layer.projection.remove_hooks()
        for residual in self._residuals.values():
            residual.remove_hooks()

    # What the run tells.

    def _on_tokens(self, module, arguments, result):
        with self._recording():
            self._record_tokens(arguments[0])

    def _on_pass(self, module, arguments, options):
        """Of the decoder. Some compute their last layers for the last token alone where only its logits are asked for; a
        trace needs all, and what comes behind takes the last of them."""
        with self._recording():
            self._passes += 1
            self._record_positions(options.get("position_ids"))
        if type(options.get("logits_to_keep")) is int and options["logits_to_keep"] > 0:
            return arguments, {**options, "logits_to_keep": 0}
        return None

    def _on_logits(self, module, arguments, result):
        with self._recording(), torch.no_grad():
            self._record_logits(getattr(result, "logits", None))

    def _on_rotary(self, module, arguments, options):
        with self._recording():
            for value in (*arguments, *options.values()):
                if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
                    self._record_positions(value)

    def _on_shared_module(self, module, arguments, options):
        """Before one that does not know its layer, but is told."""
        with self._recording():
            number = options.get("layer_idx")
            self._numbers[id(module)] = number
            return self._find_cache(self._layers[number], module, arguments, options) if self._has(number) else None

    def _on_cache(self, module, arguments, options):
        with self._recording():
            return self._find_cache(self._layers[module.layer_idx], module, arguments, options)

    def _find_cache(self, layer, module, arguments, options):
        """Before a layer's first attention: which cache it is handed. Without one, one that keeps nothing: what the layer
        would have cached is what a trace holds."""
        known = [options[name] for name in _CACHES if options.get(name) is not None]
        for value in (*arguments, *options.values()):
            if isinstance(value, transformers.Cache) or any(value is one for one in known):
                layer.cache = weakref.ref(value)  # not to be kept from being freed
                return None
        taken = inspect.signature(module.forward).parameters
        name = next((name for name in _CACHES if name in taken), None)
        if name is None or list(taken).index(name) < len(arguments):
            return None
        cache = NoCache(self._config)
        layer.cache = weakref.ref(cache)
        return arguments, {**options, name: cache}

    def _on_attention(self, *call):
        with self._recording(), torch.no_grad():
            self._record_attention(*call)

    def _on_scope_end(self, scope, *_):
        if self._followed is not None and self._followed.scope is scope:
            self._end_following()

    @contextlib.contextmanager
    def _recording(self):
        if self._failure is not None:
            raise CaptureError(self._failure)
        try:
            with self._followed.pause() if self._followed is not None else contextlib.nullcontext():
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
        self._ids.append(ids[0])
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
        self._positions.append(axes[0])

    def _check_positions(self):
        positions = self._positions.tensor(self._checked_positions).tolist()
        if not positions:
            return
        reason = checks.positions_fault(positions, self._last_position)
        if reason:
            raise CaptureError(reason)
        self._last_position = positions[-1]
        self._checked_positions = len(self._positions)

    def _record_attention(self, module, query, key, value, mask, output, options):
        number = module.layer_idx if self._has(module.layer_idx) else self._numbers.get(id(module))
        self._end_following()
        self._check_suspicion(number)
        if not self._has(number):
            raise CaptureError(f"an attention of the model does not say which of its {self._num_layers} layers it is "
                               f"(layer_idx is {number}); such models cannot be captured")
        layer, count = self._layers[number], query.shape[2]
        first = layer.tokens
        self._check_first_call(number)
        if query.shape[0] != 1:
            raise CaptureError(f"layer {number}: a trace holds one sequence, but the batch has {query.shape[0]}; run with "
                               "batch size 1 and one beam")
        # Once for the prompt and once for what is generated, which may take other paths through the model's code.
        fresh = first == 0 or (count == 1 and not layer.checked_decoding)
        layer.checked_decoding = layer.checked_decoding or (first > 0 and count == 1)
        self._refuse(number, checks.options_fault(options))
        rule = self._rule(number, query, options)
        window, chunk = rule.sliding_window, rule.attention_chunk_size
        reason = checks.length_fault(first, count, key.shape[2], window or chunk, self._original_length())
        if reason is None and first + count != self._tokens:
            reason = f"its attention was given queries of {count} of the {self._tokens - first} tokens that came in"
        reason = reason or self._masks.fault(module, mask, options, first, count, key.shape[2], window, chunk)
        if reason is not None:
            kinds = {type(part).__name__ for part in module.modules()}
            self._refuse(number, checks.parts_fault(kinds, reason))
        if count > 1:  # those of tokens that run alone at the end: a GPU would have to be waited for
            self._check_positions()
        if fresh:
            self._suspected = self._cache_fault(number, module, query, key, value, window or chunk)
            if self._suspected is not None:
                return  # what comes next tells whether that is all
        self._check_shapes(number, query, key, value, output)
        cached = self._cached(number, layer) if layer.form.reads_cache else None
        keys, values = layer.form.rows(key, value, cached)
        first_key = first + count - keys.shape[1]
        if fresh:
            self._check_output(number, query, keys, values, output, first, first_key)
        if first == 0:
            self._find_rotary(layer, keys)
        layer.tokens, layer.residual = first + count, self._residuals.get(id(module))
        self._attending_kinds.add(type(module).__name__)
        self._device = query.device

        job = Job(self._file, number, layer, self._window)
        if layer.cache_of is None:
            job.rows("keys", first, keys[:, -count:])
            if "values_in_keys" not in layer.attributes:
                job.rows("values", first, values[:, -count:])
        if first == 0 and rule.sinks is not None:
            job.whole("sinks", rule.sinks)
        skipped = self._not_captured(first, count)
        if skipped < count:
            queries = layer.form.queries(query[:, :, skipped:])
            positions = torch.arange(first + skipped, first + count, device=query.device)
            outputs = layer.form.outputs(output[:, skipped:], queries, keys, values, positions, first_key, rule)
            self._of_queries(job, first + skipped, queries=queries, outputs=outputs)
        if self._wants_mass and (self._prompt_length is None or first < self._prompt_length):
            job.add_mass(*self._mass(layer, query[0], key[0], first))
            if layer.tokens >= (self._prompt_length or layer.tokens + 1):
                job.write_mass()
        job.submit(self._transfer)
        if fresh or layer.projection.follows_all:
            self._follow(number, module, output, first, fresh)

    def _not_captured(self, first, count):
        """How many of `count` tokens from position `first` on come before the captured queries, as far as that is known."""
        if self._window is None:
            return 0
        if self._prompt_length is None:
            return max(0, count - self._window)  # any piece may be the prompt's last
        return max(0, self._prompt_length - self._window - first)

    def _of_queries(self, job, first, **tensors):
        """What is stored of captured queries alone: [H, n, ...] of those at positions `first`..., by name."""
        for name, tensor in tensors.items():
            skipped = self._not_captured(first, tensor.shape[1])
            if skipped >= tensor.shape[1]:
                continue
            if self._window is None or self._prompt_length is not None:
                job.rows(name, first + skipped, tensor[:, skipped:])
            else:
                job.hold(name, tensor[:, skipped:])

    def _end_prompt(self, length):
        """The prompt is the first `length` tokens, all of which have been seen."""
        self._prompt_length = length
        for number, layer in self._attending():
            job = Job(self._file, number, layer, self._window)
            if self._window is not None:
                job.write_held(length)
            if self._wants_mass:
                job.write_mass()
            job.submit(self._transfer)

    def _mass(self, layer, queries, keys, first):
        """The attention that the prompt's queries among `queries` pay: where its keys begin, and [H, m] of it."""
        end = first + queries.shape[1]
        beyond = max(0, end - self._prompt_length) if self._prompt_length is not None else 0
        first_key = end - keys.shape[1]
        mass = mass_of(queries[:, : queries.shape[1] - beyond], keys[:, : keys.shape[1] - beyond], first, first_key, layer.rule)
        return first_key, layer.form.of_heads(mass)

    # The output projection, and what stands before it.

    def _follow(self, number, module, output, first, fresh):
        """The heads' outputs to the projection."""
        layer = self._layers[number]
        if layer.projection is None:
            layer.projection = Projection(self._scopes[id(module)], self._recording, lambda gate, fault:
                                          self._record_passage(number, gate, fault))
        layer.following = first
        self._followed = layer.projection
        layer.projection.follow(output, fresh)

    def _end_following(self):
        if self._followed is not None:
            followed, self._followed = self._followed, None
            followed.end()

    def _record_passage(self, number, gate, fault):
        """Of the outputs that came to the projection, or did not."""
        layer = self._layers[number]
        if fault is not None:
            raise CaptureError(f"layer {number}: {fault}, though it was otherwise with the prompt")
        projection = layer.projection
        if projection.fault is None:
            projection.fault = layer.form.gate_fault(projection.passage.gate_width, projection.passage.norm is not None)
        if projection.fault is not None:
            projection.remove_hooks()
            return
        job = Job(self._file, number, layer, self._window)
        if not layer.passed:
            layer.passed = True
            if projection.passage.norm is not None:
                job.whole("projection_norm", projection.passage.norm.weight, epsilon=projection.passage.norm.epsilon)
            if self._wants_projection:
                job.whole("output_projection", layer.form.projection(projection.weight))
        if gate is not None:
            self._of_queries(job, layer.following, output_gate=layer.form.of_heads(gate))
        job.submit(self._transfer)
        if layer.checked_decoding and not projection.follows_all:
            projection.remove_hooks()

    def _tell_missing_projections(self):
        self._tell_missing("output projections", {number: layer.projection.fault for number, layer in self._attending()
                                                  if layer.projection.fault is not None})

    def _tell_missing(self, what, missing):
        """`missing`: why, by the layer's number."""
        if not missing:
            return
        where = ""
        if len(missing) < len(self._attending()):
            where = f" in layer{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        warnings.warn(f"the trace goes without {what}{where}: {next(iter(missing.values()))}", stacklevel=5)

    # The residual stream.

    def _write_residuals(self, start):
        """Of the queries from position `start` on, where it could be read."""
        missing = {}
        for number, layer in self._attending():
            residual = layer.residual
            norms = residual.norms(self._tokens) if residual is not None else None
            if norms is None:
                missing[number] = residual.fault if residual is not None else "its attention serves several layers"
                continue
            self._file.write(number, "residual_norm", norms[start:])
            if residual.output_norm is not None:
                self._file.write(number, "projection_output_norm", residual.output_norm.weight,
                                 epsilon=residual.output_norm.epsilon)
        self._tell_missing("norms of the residual stream", missing)

    # What cannot be recorded.

    def _has(self, number):
        return type(number) is int and 0 <= number < self._num_layers

    def _attending(self):
        """The layers that were seen to attend, by number."""
        return [(number, layer) for number, layer in enumerate(self._layers) if layer.tokens > 0]

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

    def _kinds(self):
        """The kinds of modules in each layer that could have been seen."""
        kinds = [set() for _ in self._layers]
        for module in self._modules:
            if self._has(module.layer_idx) and is_innermost(module):
                kinds[module.layer_idx].add(type(module).__name__)
        return kinds

    def _check_layers(self):
        """Layers that were not seen have no attention."""
        tokens, kinds = [layer.tokens for layer in self._layers], self._kinds()
        if not any(tokens) and self._passes == 0:
            return
        reason = checks.unseen_fault(tokens, kinds)
        if reason is not None:
            raise CaptureError(reason)
        for number in checks.unattended(tokens, kinds, self._attending_kinds):
            caches = (layer.cache() for layer in self._layers if layer.cache is not None)
            self._refuse(number, checks.unseen_cache_fault([held_by(cache, number)[0] for cache in caches], kinds[number]))

    def _original_length(self):
        parameters = getattr(self._config, "rope_parameters", None) or {}
        if parameters.get("rope_type") != "longrope":
            return None
        return parameters.get("original_max_position_embeddings",
                              getattr(self._config, "original_max_position_embeddings", None))

    def _owner(self, number, key):
        """The layer before that has read these keys; None if none has."""
        return next((other for other, layer in enumerate(self._layers[:number])
                     if layer.storage is not None and layer.storage.is_of(key)), None)

    def _cached(self, number, layer):
        """What the layer's cache holds as its keys and values."""
        cache = layer.cache() if layer.cache is not None else None
        keys, values = held_by(cache, number)
        if keys is None:
            self._refuse(number, _UNCACHED)
        return keys, values

    def _cache_fault(self, number, module, query, key, value, window):
        """The layer's number and a reason where its attention reads anything but what its cache holds, what is made of it in
        a known way, or what that of a layer before holds; else None. What it reads becomes the layer's."""
        layer, length = self._layers[number], key.shape[2]
        owner = self._owner(number, key)
        if layer.tokens > 0 and owner != layer.cache_of:
            return number, "it reads another layer's keys and values while decoding than with the prompt"
        layer.cache_of = owner
        if layer.checked_decoding and not layer.form.reads_cache:
            layer.remove_cache_hooks()
        if owner is not None:
            layer.form = self._layers[owner].form
            return None
        layer.storage = Storage(key)
        cache = layer.cache() if layer.cache is not None else None
        if cache is None:
            return None
        keys, values = held_by(cache, number)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            return number, _UNCACHED
        # A cache of a window holds what the next query sees beside itself.
        expected = length if keys.shape[2] == length or not window else min(length, window - 1)
        widths = [tuple((tensor.shape[1], tensor.shape[3]) for tensor in pair) for pair in ((key, value), (keys, values))]
        form = form_of(module, query.shape[1], key, value, keys, values)
        if isinstance(form, Copied) and layer.rule.sinks is not None:
            form = None
        if form is None or keys.shape[2] != expected:
            return number, checks.cache_fault(*widths, expected, keys.shape[2])
        if layer.tokens == 0:
            layer.form = form
        elif type(form) is not type(layer.form):
            return number, "its attention reads its cache in another way while decoding than with the prompt"
        if type(form) is AsCached:
            for given, kept in ((key, keys), (value, values)):
                if given.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr() and not torch.equal(
                        given[:, :, -1], kept[:, :, -1]):
                    return number, ("its attention reads other keys and values than its cache holds, of which they were made; a "
                                    "trace holds the cache's")
        return None

    def _check_shapes(self, number, query, key, value, output):
        if query.dtype not in FLOAT_TYPES:
            self._refuse(number, f"a trace holds float32, float16 or bfloat16, and not {query.dtype}")
        heads, width = query.shape[1], query.shape[3]
        if heads % key.shape[1] or key.shape[3] != width or value.shape[:3] != key.shape[:3]:
            self._refuse(number, f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} are "
                                 "not those of grouped-query attention")
        if tuple(output.shape) != (1, query.shape[2], heads, value.shape[3]):
            self._refuse(number, f"the attention's output has the shape {tuple(output.shape)} for queries "
                                 f"{tuple(query.shape)} and values {tuple(value.shape)}")
        self._note(number, **{"num_attention_heads": heads, "num_key_value_heads": key.shape[1], "key_dim": width,
                              "value_dim": value.shape[3], **self._layers[number].form.attributes})

    def _note(self, number, **attributes):
        """What the trace says of the layer, for all of the run."""
        noted = self._layers[number].attributes
        for name, value in attributes.items():
            if noted.setdefault(name, value) != value:
                self._refuse(number, f"{name} is {value}, but was {noted[name]} before in the same run")

    def _rule(self, number, query, options):
        """The layer's AttentionRule."""
        if options.get("dropout"):
            raise CaptureError("attention drops out at random; call model.eval() before")
        layer = self._layers[number]
        scale = options.get("scaling")
        window, chunk = options.get("sliding_window") or 0, 0
        if not window:  # not all models pass it
            window, chunk = self._visibilities[number]
        if window == 1:
            # The cache would keep the last 0 tokens, and does keep all.
            raise CaptureError(f"layer {number}: a sliding window of 1 is not what transformers computes; 2 and more are "
                               "supported")
        self._note(number, softmax_scale=query.shape[3]**-0.5 if scale is None else float(scale),
                   attn_logit_softcapping=float(options.get("softcap") or 0.0), sliding_window=window,
                   **({"attention_chunk_size": chunk} if chunk else {}))
        sinks = next((options[name] for name in _SINKS if options.get(name) is not None), None)
        if sinks is not None and sinks.numel() != query.shape[1]:
            self._refuse(number, f"its softmax has {sinks.numel()} learned sinks for {query.shape[1]} heads, and a trace has "
                                 "one for each")
        if layer.rule is None:
            sinks = None if sinks is None else sinks.detach().reshape(-1).float()
            layer.rule = AttentionRule(**{name: layer.attributes[name] for name in _RULE if name in layer.attributes}, sinks=sinks)
        elif (sinks is None) != (layer.rule.sinks is None):
            self._refuse(number, "its softmax has learned sinks in a part of the run alone")
        return layer.rule

    def _check_output(self, number, query, keys, values, output, first, first_key):
        """The first, the middle and the last query's output is that of their attention to keys and values."""
        layer, count = self._layers[number], query.shape[2]
        rows = torch.tensor(sorted({0, count // 2, count - 1}), device=query.device)
        outputs = plain_attention(layer.form.queries(query[:, :, rows]), keys, values, first + rows, first_key, layer.rule)
        expected, given = layer.form.expand(outputs), output[0][rows].float()
        distance = float((given - expected).norm() / expected.norm())
        if distance > _ROUNDING[query.dtype]:  # what is not finite is told by its place
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
        used = {}
        for number, layer in self._attending():
            table = layer.rotary
            now = still.get((table.name, table.layout)) if table is not None else None
            same = now is not None and torch.equal(now.inverse_frequencies, table.inverse_frequencies)
            used[number] = table if same and now.attention_scaling == table.attention_scaling else None
        for number, layer in self._attending():
            if layer.cache_of is not None:
                used[number] = used[layer.cache_of]
        tables = {table.name: table for table in used.values() if table is not None}
        return tables.values(), {number: table.name for number, table in used.items() if table is not None}

    def _describe(self):
        """The attributes of /model that layers have, and of each attending layer's group those that are others."""
        turned_by = self._rotary_tables()[1]
        described = {}
        for number, layer in self._attending():
            described[number] = {**layer.attributes, **({"rotary": turned_by[number]} if number in turned_by else {}),
                                 **({"cache_of": layer.cache_of} if layer.cache_of is not None else {})}
        most = {name: _most_common(each[name] for each in described.values())
                for name in ("num_attention_heads", "num_key_value_heads", "softmax_scale", "attn_logit_softcapping")}
        most["head_dim"] = _most_common(each["key_dim"] for each in described.values())
        # What may be absent from a layer is only said of all.
        for name in ("sliding_window", "rotary"):
            values = {each.get(name) for each in described.values()}
            if len(values) == 1 and None not in values:
                most[name], = values
        most.setdefault("sliding_window", 0)
        of_model = {**most, "key_dim": most["head_dim"], "value_dim": most["head_dim"]}
        return most, {number: {name: value for name, value in each.items() if of_model.get(name) != value}
                      for number, each in described.items()}

    # The end.

    def _located_turns(self, ids, length):
        """The turns among `ids`, that of what follows the prompt included."""
        turns = locate_turns(self._turns, self._encoding, len(ids))
        if turns and turns[-1][0] < length < len(ids):
            bos = self._model.config.get_text_config(decoder=True).bos_token_id
            ends = {token for token in model_stop_ids(self._model, self._tokenizer) if token != bos}
            if not leaves_turn_open(turns, ids[:length], ends):
                turns.append((length, "assistant" if turns[0][1] is not None else None))
        return turns

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
        self._end_following()
        self._check_suspicion()
        self._check_layers()
        without = checks.unattended([layer.tokens for layer in self._layers], self._kinds(), self._attending_kinds)
        for number, layer in enumerate(self._layers):
            if layer.tokens != self._tokens and number not in without:
                raise CaptureError(f"layer {number} was seen at {layer.tokens} of {self._tokens} tokens; the run was cut short")
        self._check_positions()
        ids = self._ids.tensor().tolist()
        if self._encoding is not None and self._encoding.ids != ids[:length]:
            raise CaptureError("the prompt's text does not give the token ids that the model was run on")
        spans = locate_spans(self._spans, self._encoding, length)
        turns = self._located_turns(ids, length)
        pieces = token_pieces(self._tokenizer, ids) if self._tokenizer is not None else None
        self._transfer.close()
        if self._wants_projection:
            self._tell_missing_projections()
        start = 0 if self._window is None else max(0, length - self._window)
        self._write_residuals(start)

        shapes = weight_shapes_digest(self._decoder)
        of_model, of_layers = self._describe()
        name = self._config._name_or_path or self._model.config._name_or_path or self._config.model_type
        if pathlib.Path(name).is_dir():
            name = pathlib.Path(name).resolve().name
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        self._file.finish(
            model={"name": name, "architecture": self._config.model_type, "num_layers": self._num_layers,
                   "hidden_size": self._config.hidden_size, "rope_theta": _rope_theta(self._config),
                   **({"weight_shapes_digest": shapes} if shapes else {}), **of_model},
            layers=of_layers,
            rotary=self._rotary_tables()[0],
            ids=ids, prompt_length=length, next_token=self._next_token, pieces=pieces, spans=spans,
            turns=turns,
            query_positions=range(start, len(ids)),
            source=f"model {name}" + (f", {self._source}" if self._source else "") +
                   f"; {dtype}, attention by {self._implementation}, transformers {transformers.__version__} on {device}",
            provenance={"kvtrace": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__),
                        "h5py": h5py.__version__, "python": platform.python_version(), "dtype": dtype,
                        "attn_implementation": self._implementation, "device": device, "queries": self._queries})


def _most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def _rope_theta(config):
    """Of the layers that see everything, where kinds of layers differ; 0 where there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in parameters:
        parameters = parameters["full_attention"] or {}  # None: those layers have no rotary embedding
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 0.0)
