"""The residual stream behind a layer's attention: found by what is added to what, whatever a model calls its parts."""

import dataclasses

import torch

from .growing import GrowingTensor

# How many roundings of the type may lie between what a model computes of two or three numbers and what is computed of them
# here, and what rounding in float32 may make up besides where a norm goes over many.
_ROUNDINGS = 2
_NORM_ROUNDING = 2e-6

# Names that norms give to what is added to the mean square.
_EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """A norm by the root mean square: what it multiplies by, float32 [C] on the CPU, and what it adds to the mean square."""

    weight: torch.Tensor
    epsilon: float


def layer_of(decoder, attention):
    """The module of a list of modules that the attention is a part of, or None."""
    modules = dict(decoder.named_modules())
    path = next((path for path, module in modules.items() if module is attention), "")
    while "." in path:
        path = path.rpartition(".")[0]
        if isinstance(modules.get(path.rpartition(".")[0]), torch.nn.ModuleList):
            return modules[path]
    return None


class ResidualStream:
    """Reads ‖x‖ of the residual stream after a layer's attention was added to it, pass by pass; before, where attention and
    MLP are added to it together.

    Until the first token that runs alone, a few rows of what enters and leaves each part of the layer are looked at: x is
    what first enters one as the layer's input with the attention's output added, which may have gone through a norm by the
    root mean square. Where none does, and the layer gives its input with that output and another part's added, x is its
    input.
    """

    def __init__(self, layer, attention, recording):
        """`layer`: the decoder layer, or None where it is not known; `recording`: makes a context to record in."""
        self.fault = None if layer is not None else "its attention is in no list of layers"
        self.output_norm = None  # the RmsNorm that the attention's output goes through before it is added
        self._recording = recording
        self._norms = GrowingTensor()  # of all passes, float32
        self._place = None  # where x is read: a module, and whether it enters or leaves it
        self._passes = 0
        self._entered = None  # the layer's input [1, n, C] while it runs
        self._hooks = []
        if layer is None:
            return
        self._watch(layer.register_forward_pre_hook, self._begin)
        self._watch(attention.register_forward_hook, self._on_attention)
        inside = set(attention.modules())
        for part in layer.modules():
            if part is not layer and part not in inside and attention not in part.modules():
                self._watch(part.register_forward_pre_hook, self._on_entering)
                self._watch(part.register_forward_hook, self._on_leaving)
        self._watch(layer.register_forward_hook, self._end)

    def norms(self, count):
        """‖x‖ of the `count` tokens that ran, float32 [count] on the CPU; None, with `fault` set, where it is not known."""
        if self.fault is None and len(self._norms) != count:
            self.fault = "not all of its passes could be read"
        return self._norms.tensor() if self.fault is None else None

    def remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watch(self, register, function):
        """`function` is given the module, what it was given and, where it has run, what it gave."""
        def hook(module, arguments, options, *result):
            with self._recording(), torch.no_grad():
                function(module, _first_floats((*arguments, *options.values())), *map(_first_floats, result))

        self._hooks.append(register(hook, with_kwargs=True))

    # Passes that are looked at.

    def _begin(self, layer, states):
        self._attention = self._found = None
        self._added = []  # what may be added to the stream: rows, and the part that made them of the attention's output
        self._others = []  # rows of what other parts gave
        self._roundings = 0.0
        self._entered = states if states is not None and states.dim() == 3 else None
        if self._entered is not None:
            count = states.shape[1]
            self._chosen = torch.tensor(sorted({0, count // 2, count - 1}))
            self._before = self._rows_of(states)

    def _on_attention(self, attention, _, output):
        rows = self._rows_of(output)
        if rows is not None:
            self._attention = rows
            self._added.append((rows, None))

    def _on_entering(self, part, states):
        if self._attention is None or self._found is not None:
            return
        rows = self._rows_of(states)
        if rows is None:
            return
        for added, norm in self._added:
            if self._is_sum(rows, self._before, added):
                self._find((part, True), states, added, norm)
                return

    def _on_leaving(self, part, states, output):
        rows = self._rows_of(output) if self._found is None else None
        if rows is None:
            return
        self._others.append(rows)
        given = self._rows_of(states) if self._attention is not None else None
        # What changes nothing, as dropout, is not looked at.
        if given is not None and torch.equal(given, self._attention) and not torch.equal(given, rows):
            self._added.append((rows, part))

    def _end(self, layer, _, output):
        rows = self._rows_of(output)
        if rows is not None and self._attention is not None and self._found is None:
            if self._is_sum(rows, self._before, self._attention):
                self._find((layer, False), output, self._attention, None)
            elif any(self._is_sum(rows, self._before, self._attention, other) for other in self._others):
                self._find((layer, True), self._entered, self._attention, None)
        count = self._entered.shape[1] if self._entered is not None else 0
        self._entered = self._attention = self._added = self._others = None
        if self.fault is None and self._found is None:
            self._fail(f"no part of it ({type(layer).__name__}) is given the residual stream with what the attention gave "
                       "added to it, and nothing else")
        elif self.fault is None and count == 1 and self._passes > 0:
            self._settle()
        self._passes += 1

    def _find(self, place, states, added, norm):
        self._found = place
        output_norm = rms_norm(norm, self._attention, added, self._roundings) if norm is not None else None
        if norm is not None and output_norm is None:
            self._fail(f"what the attention gives goes through {type(norm).__name__} before it is added, which is no norm by "
                       "the root mean square that is known")
        elif self._place is not None and (self._place != place or (self.output_norm is None) != (output_norm is None)):
            self._fail("single tokens take another way through it than the prompt")
        else:
            self._place, self.output_norm = place, output_norm
            self._read(states)

    def _rows_of(self, states):
        """A few rows [r, C], in float64 on the CPU, of states of all tokens of the pass; None where they are none."""
        if self._entered is None or states is None:
            return None
        count, width = self._entered.shape[1:]
        if states.shape[-1] != width or states.numel() != count * width:
            return None
        self._roundings = max(self._roundings, _ROUNDINGS * torch.finfo(states.dtype).eps)
        return states.detach().reshape(count, width)[self._chosen.to(states.device)].cpu().double()

    def _is_sum(self, rows, *parts):
        distance = (rows - sum(parts)).abs()
        return bool((distance <= self._roundings * sum(part.abs() for part in parts)).all())

    # All others.

    def _settle(self):
        """Nothing is looked at any more but x."""
        self.remove_hooks()
        module, enters = self._place
        if enters:
            self._watch(module.register_forward_pre_hook, lambda _, states: self._read(states))
        else:
            self._watch(module.register_forward_hook, lambda _, states, output: self._read(output))

    def _read(self, states):
        if states is not None:
            rows = states.detach().reshape(-1, states.shape[-1])
            self._norms.append(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32))

    def _fail(self, reason):
        self.fault = reason
        self._norms.clear()
        self.remove_hooks()


def _first_floats(values):
    """The first tensor of floats among what a module is given or gives."""
    values = values if isinstance(values, tuple) else (values,)
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


def rms_norm(norm, before, after, roundings):
    """The RmsNorm that turned the rows `before` into `after`; None where the module is none."""
    epsilon = next((getattr(norm, name) for name in _EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    weight = getattr(norm, "weight", None)
    if epsilon is None or weight is not None and weight.shape != after.shape[1:]:
        return None
    weight = torch.ones(after.shape[1]) if weight is None else weight.detach().float().cpu()
    unit = before * torch.rsqrt(before.square().mean(-1, keepdim=True) + epsilon)
    # Some models store what is multiplied by less 1.
    for factor in (weight, 1 + weight):
        expected = unit * factor.double()
        if bool(((after - expected).abs() <= (roundings + _NORM_ROUNDING) * expected.abs()).all()):
            return RmsNorm(factor, epsilon)
    return None
