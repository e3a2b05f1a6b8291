"""How far the capture of a layer is, and what is to be written of it."""

import torch

from .cache_forms import AsCached


class Layer:
    """How far a layer is, and what of its run is not in the file yet. The latter belongs to the thread that writes."""

    def __init__(self):
        self.tokens = 0
        self.attributes = {}  # of its group in the file
        self.rule = None  # its AttentionRule
        self.form = AsCached()
        self.cache_of = None  # the number of the layer before whose keys and values it reads
        self.pass_ = 0  # of the decoder, in which it was seen last
        self.checked_decoding = False
        self.cache = None  # a reference to what it was handed last as such
        self.storage = None  # of its keys at that attention
        self.hooks = []  # that wait for the cache
        self.unturned = None  # its first keys before they are turned
        self.rotary = None  # the table that turned them
        self.projection = None  # a Projection
        self.following = 0  # the position of the first of the outputs that are on the way there
        self.passed = False  # whether some came there
        self.residual = None  # a ResidualStream
        self.held = {}  # the last rows of what is stored of queries, of a prompt whose end has not come, by name
        self.mass = None  # [H, tokens], float64

    def remove_cache_hooks(self):
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def all_hooks(self):
        return [*self.hooks, *(self.unturned.hooks if self.unturned is not None else [])]


class Job:
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
        """Writes the rows [heads, n, ...] of the positions from `first` on."""
        self._steps.append((lambda rows: self._write_rows(name, first, rows), tensor))

    def whole(self, name, tensor, **attributes):
        """Writes a tensor that comes in one piece."""
        self._steps.append((lambda rows: self._file.write(self._number, name, rows, **attributes), tensor))

    def hold(self, name, tensor):
        """Keeps the last rows of the window, of which [heads, n, ...] are the latest."""
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
        captured = name in ("queries", "outputs", "output_gate") and self._window
        expected = min(self._window, self._tokens) if captured else self._tokens
        self._file.append(self._number, name, rows, first, expected)
