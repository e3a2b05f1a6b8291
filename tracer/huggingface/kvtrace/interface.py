"""The place where transformers' models call attention, and who stands there."""

import sys
import threading

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .errors import CaptureError

_lock = threading.RLock()
_in_place = {}  # by the attention module's identity: a function that is called in the place of its attention
_users = {}  # by the identity of a table and the name of an implementation: how many stand there, and what stood there before


def _eager(module):
    """The eager attention of the file that defines the module's class: it has no entry in the interface."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise CaptureError(
        f"{type(module).__name__}: its eager attention cannot be found; load the model with attn_implementation='sdpa'")


def _dispatch(name, previous, inherited):
    """A function in the place of the attention implementation `name` that calls it, or lets who stands there call it."""

    def attention(module, query, key, value, attention_mask=None, *args, **kwargs):
        function = previous if previous is not None else inherited or _eager(module)
        in_place = _in_place.get(id(module))
        if in_place is None:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        return in_place(function, module, query, key, value, attention_mask, *args, **kwargs)

    attention.__name__ = f"kvtrace_{name}"
    return attention


def _interfaces(modules):
    """Where modules ask for their attention: transformers' table, and those of the models that have their own."""
    own = (getattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS", None)
           for kind in {type(module) for module in modules})
    found = {id(table): table for table in own if isinstance(table, AttentionInterface)}
    return [ALL_ATTENTION_FUNCTIONS, *(table for table in found.values() if table is not ALL_ATTENTION_FUNCTIONS)]


def stand_in(name, modules, function):
    """Has `function` called in the place of every attention of one of `modules`, whose implementation is `name`: with that
    implementation, and with what it would have been called with."""
    with _lock:
        if any(id(module) in _in_place for module in modules):
            raise CaptureError("the model is being captured already, or its cache evicted; leave that block first")
        inherited = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
        if inherited is None and name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
            raise CaptureError(f"transformers has no attention implementation named {name}")
        for table in _interfaces(modules):
            count, previous = _users.get((id(table), name), (0, None))
            if count == 0:
                # What was set on this object and not for all; what it stands before is found again by its absence.
                previous = table._local_mapping.get(name)
                table[name] = _dispatch(name, previous, inherited)
            _users[id(table), name] = (count + 1, previous)
        for module in modules:
            _in_place[id(module)] = function


def listen(name, modules, listener):
    """Has `listener` called after every attention of one of `modules`, whose implementation is `name`."""

    def attention(function, module, query, key, value, attention_mask, *args, **kwargs):
        result = function(module, query, key, value, attention_mask, *args, **kwargs)
        listener(module, query, key, value, attention_mask, result[0], kwargs)
        return result

    stand_in(name, modules, attention)


def leave(name, modules):
    """Undoes stand_in() and listen()."""
    with _lock:
        for module in modules:
            _in_place.pop(id(module), None)
        for table in _interfaces(modules):
            count, previous = _users.pop((id(table), name))
            if count > 1:
                _users[id(table), name] = (count - 1, previous)
            elif previous is not None:
                table[name] = previous
            else:
                del table[name]
