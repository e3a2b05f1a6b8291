"""The place where transformers' models call attention, and who listens there."""

import sys
import threading

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import CaptureError

_lock = threading.RLock()
_listeners = {}  # by the attention module's identity: a function called after each of its attention calls
_users = {}  # by the name of an attention implementation: how many listen to it, and what stood there before


def _eager(module):
    """The eager attention of the file that defines the module's class: it has no entry in the interface."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise CaptureError(
        f"{type(module).__name__}: its eager attention cannot be found; load the model with attn_implementation='sdpa'")


def _dispatch(name, previous, inherited):
    """A function in the place of the attention implementation `name` that calls it and tells who listens."""

    def attention(module, query, key, value, attention_mask=None, *args, **kwargs):
        function = previous if previous is not None else inherited or _eager(module)
        result = function(module, query, key, value, attention_mask, *args, **kwargs)
        listener = _listeners.get(id(module))
        if listener is not None:
            listener(module, query, key, value, attention_mask, result[0], kwargs)
        return result

    attention.__name__ = f"kvtrace_{name}"
    return attention


def listen(name, modules, listener):
    """Has `listener` called after every attention of one of `modules`, whose implementation is `name`."""
    with _lock:
        if any(id(module) in _listeners for module in modules):
            raise CaptureError("the model is being captured already")
        count, previous = _users.get(name, (0, None))
        if count == 0:
            # What was set on this object and not for all; what it stands before is found again by its absence.
            previous = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            inherited = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
            if previous is None and inherited is None and name != "eager":
                raise CaptureError(f"transformers has no attention implementation named {name}")
            ALL_ATTENTION_FUNCTIONS[name] = _dispatch(name, previous, inherited)
        _users[name] = (count + 1, previous)
        for module in modules:
            _listeners[id(module)] = listener


def stop_listening(name, modules):
    """Undoes listen()."""
    with _lock:
        for module in modules:
            _listeners.pop(id(module), None)
        count, previous = _users.pop(name)
        if count > 1:
            _users[name] = (count - 1, previous)
        elif previous is not None:
            ALL_ATTENTION_FUNCTIONS[name] = previous
        else:
            del ALL_ATTENTION_FUNCTIONS[name]
