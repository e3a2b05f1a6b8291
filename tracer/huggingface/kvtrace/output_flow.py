"""What becomes of the heads' outputs before a projection takes them: gates and norms, found by what is done to them, whatever
a model calls its parts."""

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .residual import RmsNorm, rms_norm

_ATEN = torch.ops.aten

# Operations whose result has the same numbers in another order or shape.
_RESHAPING = {_ATEN.view, _ATEN._unsafe_view, _ATEN.reshape, _ATEN._reshape_alias}
_MOVING = {_ATEN.transpose, _ATEN.permute, _ATEN.t, _ATEN.unsqueeze, _ATEN.squeeze, _ATEN.expand}
_COPYING = {_ATEN.alias, _ATEN.detach, _ATEN.clone, _ATEN.contiguous, _ATEN._to_copy, _ATEN.lift_fresh}

# Rows of a norm that are looked at.
_ROWS = 3


@dataclasses.dataclass(frozen=True)
class Reached:
    """A tensor that holds the outputs, and what they went through."""

    tensor: torch.Tensor  # kept, so that its identity is no other's
    factor: torch.Tensor | None = None  # of the tensor's shape: what they were multiplied by
    norm: RmsNorm | None = None  # over all heads, behind the factor
    fault: str | None = None  # what of it a trace has no place for


class OutputFlow(TorchDispatchMode):
    """Follows the heads' outputs from one operation to the next, from begin() to end()."""

    def __init__(self, output):
        super().__init__()
        self._reached = {id(output): Reached(output)}
        self._derived = {}  # other tensors that depend on the outputs, by identity
        self._active = False
        self._inside = None  # a module that is taken as a whole, and what entered it
        self._behind = False  # whether the projection has run
        self.paused = False
        self.goes_elsewhere = False  # whether something was made of the outputs then

    def begin(self):
        self._active = True
        self.__enter__()

    def end(self):
        if self._active:
            self._active = False
            self.__exit__(None, None, None)

    def find(self, tensor):
        """What a tensor holds of the outputs; None if it holds none of them."""
        return self._reached.get(id(tensor)) if self._inside is None else None

    def enter(self, module, reached):
        """A module is given what was reached; what it does is not followed."""
        self._inside = module, reached

    def leave_projection(self, result):
        """The projection gave a result, and nothing else is to be made of the outputs."""
        self._inside, self._behind = None, True
        self._derived.pop(id(result), None)

    def leave_norm(self, norm, result):
        if self._inside is None or self._inside[0] is not norm:
            return
        reached, self._inside = self._inside[1], None
        if not isinstance(result, torch.Tensor) or result.shape != reached.tensor.shape:
            self._derive(result)
            return
        fault, found = reached.fault, None
        if reached.norm is not None or result.shape[-1] * result.shape[-2] != result.numel():
            fault = fault or f"it goes through several norms, or one of each head ({type(norm).__name__})"
        else:
            before, after = (states.detach().reshape(-1, states.shape[-1])[:_ROWS].cpu().double()
                             for states in (reached.tensor, result))
            found = rms_norm(norm, before, after, 2 * torch.finfo(result.dtype).eps)
            fault = fault or (None if found else f"it goes through {type(norm).__name__}, which is no norm by the root mean "
                                                 "square that is known")
        self._reach(Reached(result, reached.factor, found, fault))

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        if self.paused:
            return result
        given = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
        if any(id(tensor) in self._reached or id(tensor) in self._derived for tensor in given):
            self.goes_elsewhere |= self._behind
            self._follow(function, arguments, given, result)
        return result

    def _follow(self, function, arguments, given, result):
        """Of an operation that is `given` tensors of which some depend on the outputs, or hold them."""
        operation, held = function.overloadpacket, [self._reached.get(id(tensor)) for tensor in given]
        one = next((each for each in held if each is not None), None)
        depending = sum(id(tensor) in self._reached or id(tensor) in self._derived for tensor in given)
        whole = isinstance(result, torch.Tensor) and one is not None and result.numel() == one.tensor.numel()
        if self._inside is not None or depending > 1 or not whole:
            self._derive(result)
        elif operation in _COPYING:
            self._reach(Reached(result, one.factor, one.norm, one.fault))
        elif operation in _RESHAPING:
            self._reach(Reached(result, None if one.factor is None else one.factor.reshape(result.shape), one.norm, one.fault))
        elif operation in _MOVING:
            factor = None if one.factor is None else function(one.factor, *arguments[1:])
            self._reach(Reached(result, factor, one.norm, one.fault))
        elif operation in (_ATEN.mul, _ATEN.mul_):
            other = arguments[1] if arguments[0] is one.tensor else arguments[0]
            factor = torch.as_tensor(other, device=result.device).detach().to(result.dtype).expand(result.shape)
            if one.factor is not None:
                factor = one.factor.reshape(result.shape) * factor
            self._reach(Reached(result, factor, one.norm, one.fault or (one.norm and "a gate stands behind a norm")))
        else:
            self._derive(result)

    def _reach(self, reached):
        self._derived.pop(id(reached.tensor), None)
        self._reached[id(reached.tensor)] = reached

    def _derive(self, results):
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._reached.pop(id(result), None)
                self._derived[id(result)] = result
