"""Which parts of a model are its decoder and its attention."""

import transformers
import xxhash

from . import checks
from .errors import CaptureError


def decoder_config(model):
    """The configuration of the language model in a model."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model):
    """The part of a decoder-only model that all layers are in; an error where it has none that say which layer they are."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(f"{decoder_config(model).model_type}: only decoder-only models can be captured")
    decoder = (model.get_decoder() if hasattr(model, "get_decoder") else None) or model
    # What some models name their decoder is what comes after it.
    decoder = decoder if numbered(decoder) else model
    if not numbered(decoder):
        raise CaptureError(checks.unseen_fault([0], [_attentions(decoder)]))
    return decoder


def _attentions(module):
    """The kinds of modules in it that are named attention and have no such parts."""
    named = [part for part in module.modules() if "attention" in type(part).__name__.lower()]
    return {type(part).__name__ for part in named if not any(other in named for other in part.modules() if other is not part)}


def visibilities(config, number_of_layers):
    """Of each layer what the configuration says of what a query sees: its sliding window and the size of its chunks, 0 where
    there are none. As transformers makes its caches by them."""
    kinds = getattr(config, "layer_types", None)
    has_windows = getattr(config, "sliding_window", None) is not None
    found = []
    for number, layer in enumerate(transformers.DynamicCache(config=config).layers[:number_of_layers]):
        size = int(getattr(layer, "sliding_window", None) or 0)
        in_chunks = kinds[number] == "chunked_attention" if kinds is not None else not has_windows
        found.append((0, size) if in_chunks else (size, 0))
    return found + [(0, 0)] * (number_of_layers - len(found))


def weight_shapes_digest(decoder):
    """Of the names and shapes of its weights, as tracer/model.cpp computes it (docs/trace-format.md); None where some are
    quantized, and so shaped otherwise than the model's."""
    weights = list(decoder.named_parameters())
    if not all(weight.is_floating_point() for _, weight in weights):
        return None
    digest = xxhash.xxh64(seed=0)
    for line in sorted(f"{name} {','.join(map(str, weight.shape))}" for name, weight in weights):
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()


def numbered(module):
    """The modules in it that should say which layer they belong to."""
    return [part for part in module.modules() if hasattr(part, "layer_idx")]


def is_innermost(module):
    """Whether no other module in a numbered one is numbered: it is no layer around them."""
    return len(numbered(module)) == 1
