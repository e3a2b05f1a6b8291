"""What a layer's attention is handed as its cache."""

import transformers
from torch.multiprocessing.reductions import StorageWeakRef


class Storage:
    """Tells whether a tensor begins where another did that may be gone."""

    def __init__(self, tensor):
        # The reference keeps its number from being given to others.
        self._reference, self._place = StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()

    def is_of(self, tensor):
        return tensor.untyped_storage()._cdata == self._reference.cdata and tensor.data_ptr() == self._place


class NoCache(transformers.DynamicCache):
    """Takes the place of no cache, and holds of each layer what would have been cached until that has been looked at."""

    def __init__(self, config):
        super().__init__(config=config)  # layers that do not attend keep something else, and of a run without a cache nothing
        self.states = {}

    def update(self, key_states, value_states, layer_idx, *arguments, **options):
        self.states[layer_idx] = key_states, value_states
        return key_states, value_states


def held_by(cache, number):
    """The keys and values that a cache holds of a layer; None, None where it holds none."""
    cache = getattr(cache, "self_attention_cache", cache)
    if isinstance(cache, NoCache):
        return cache.states.get(number, (None, None))
    if hasattr(cache, "key_cache"):  # those that some hybrids had before transformers 5.2
        return cache.key_cache[number], cache.value_cache[number]
    layers = getattr(cache, "layers", None) or []
    held = layers[number] if number < len(layers) else None
    return getattr(held, "keys", None), getattr(held, "values", None)
