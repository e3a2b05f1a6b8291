"""A layer's output projection, and what stands before it."""

import contextlib
import dataclasses

import torch

from .output_flow import OutputFlow
from .residual import RmsNorm
from .trace_file import FLOAT_TYPES

# How far, in parts of its norm, what enters a projection may be from what outputs, gate and norm give, and what leaves it
# from the product with its weight.
_ENTERING = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 5e-3}
_NORMED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_LEAVING = 0.05


@dataclasses.dataclass(frozen=True)
class Passage:
    """How outputs come to a projection."""

    gate_width: int = 0  # factors of a head's output: 0 none, 1, or Dv
    norm: RmsNorm | None = None  # over all heads, behind the gate


class Projection:
    """Finds the module that takes the heads' outputs of a layer and has a matrix, among the parts of `scope`; of every pass
    that is followed, what they went through on the way there.

    `found` is called when they come there, with the gate [H, n] or [H, n, Dv] or None, and with a reason where a pass differs
    from the first; `recording` makes a context to record in.
    """

    def __init__(self, scope, recording, found):
        self.fault = None  # why the trace has none, nor what stands before it
        self.weight = None  # [C, H·Dv], as PyTorch stores that of a linear layer
        self.passage = None  # once it is known
        self.scope, self._recording, self._found = scope, recording, found
        self._hooks = []
        self._flow = None
        self._arrived = None  # the module, and what reached it
        self._verdict = None  # of the pass
        self._watched = False

    @property
    def follows_all(self):
        """Whether every pass has something to tell."""
        return self.passage is not None and self.passage.gate_width > 0

    def follow(self, output, fully):
        """From `output` [1, n, H, Dv], which attention gave just now; `fully`: checking the numbers, and that the projection
        alone takes it."""
        if self.fault is not None:
            return
        if not self._watched:
            self._watched = True
            for part in self.scope.modules():
                if isinstance(getattr(part, "weight", None), torch.Tensor):
                    self._hooks.append(part.register_forward_pre_hook(self._on_entering, with_kwargs=True))
                    self._hooks.append(part.register_forward_hook(self._on_leaving))
        self._output, self._version, self._fully = output, _version(output), fully
        self._arrived = self._verdict = None
        self._flow = OutputFlow(output)
        self._flow.begin()

    @contextlib.contextmanager
    def pause(self):
        """What is computed meanwhile is not the model's."""
        flow = self._flow
        if flow is None or flow.paused:
            yield
            return
        flow.paused = True
        try:
            yield
        finally:
            flow.paused = False

    def end(self):
        """What comes now is behind it."""
        if self._flow is None:
            return
        flow, self._flow, self._output, self._arrived = self._flow, None, None, None
        flow.end()
        passage, fault, gate = self._verdict or (
            None, "what its attention gives enters no module with a weight that is known to multiply by it", None)
        if fault is None and flow.goes_elsewhere:
            passage, fault, gate = None, "it is not the only one that takes what attention gives", None
        before = self.passage
        if before is None:
            self.passage, self.fault = passage, fault
        elif fault is None and (passage.gate_width, passage.norm is None) != (before.gate_width, before.norm is None):
            fault = "something else stands before its projection"
        if fault is not None:
            self.remove_hooks()
        with self._recording():
            self._found(gate, fault if before is not None else None)

    def remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _on_entering(self, part, arguments, options):
        if self._flow is None or self._arrived is not None:
            return
        entered = next((value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)), None)
        reached = self._flow.find(entered)
        if reached is None:
            return
        if part.weight.dim() != 1:
            self._arrived = part, reached
        if part.weight.dim() == 1 or self._fully:
            self._flow.enter(part, reached)
        else:
            self._flow.end()

    def _on_leaving(self, part, arguments, result):
        if self._flow is None or self._verdict is not None:
            return
        with self._recording(), torch.no_grad():
            if self._arrived is None:
                self._flow.leave_norm(part, result)
            elif self._arrived[0] is part:
                self._verdict = self._judge(part, self._arrived[1], arguments[0] if arguments else None, result, self._output)
                self._flow.leave_projection(result)

    def _judge(self, part, reached, entered, result, output):
        """The Passage, or None and why there is none, and the gate where there is one."""
        heads, width = output.shape[2:]
        fault = reached.fault
        gate = reached.factor.reshape(-1, heads, width) if reached.factor is not None else None
        if fault is None and self._fully:
            fault = self._weight_fault(part, heads * width) or self._entry_fault(part, reached, gate, entered, result, output)
        if fault is not None:
            return None, fault, None
        if gate is None:
            return Passage(0, reached.norm), None, None
        if self.passage.gate_width == 1 if self.passage else bool((gate == gate[..., :1]).all()):
            return Passage(1, reached.norm), None, gate[..., 0].transpose(0, 1)
        return Passage(width, reached.norm), None, gate.transpose(0, 1)

    # What is checked.

    def _weight_fault(self, part, width):
        weight = part.weight
        if any(hasattr(around, "base_layer") and part in around.modules() for around in self.scope.modules()):
            return "it has an adapter; merge it into the model first"
        if weight.device.type == "meta":
            return "it is not in memory"
        if weight.dtype not in FLOAT_TYPES or weight.dim() != 2 or width not in weight.shape:
            return f"it is {weight.dtype} of shape {tuple(weight.shape)}"
        return None

    def _entry_fault(self, part, reached, gate, entered, result, output):
        """Why a projection that turned `entered` into `result` is not what follows outputs, gate and norm, or None."""
        name = type(part).__name__
        if not isinstance(entered, torch.Tensor) or entered.numel() != output.numel():
            return f"what enters it ({name}) is not the heads' outputs"
        if self._version != _version(output):
            return "what attention gave is written over before it enters it"
        expected = (output.reshape(-1, *output.shape[2:]) * gate if gate is not None else output).reshape(entered.shape)
        allowed = _ENTERING
        if reached.norm is not None:
            states = expected.float()
            unit = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + reached.norm.epsilon)
            expected, allowed = unit * reached.norm.weight.to(unit.device), _NORMED
        if not torch.equal(entered, expected):
            apart = float((entered.float() - expected.float()).norm() / expected.float().norm())
            if apart > allowed[output.dtype]:
                return (f"what enters it is not what attention gave ({apart:.0%} apart): something stands between that a trace "
                        "has no place for")
        return self._product_fault(part, entered, result, name)

    def _product_fault(self, part, entered, result, name):
        row = entered.reshape(-1, entered.shape[-1])[-1:]
        if not isinstance(result, torch.Tensor) or result.numel() % (entered.numel() // entered.shape[-1]):
            return f"it is no product with its weight alone ({name})"
        given = result.reshape(entered.numel() // entered.shape[-1], -1)[-1:]
        # Some are stored transposed.
        for weight in (part.weight.detach(), part.weight.detach().T):
            if weight.shape != (given.shape[1], row.shape[1]):
                continue
            expected = torch.nn.functional.linear(row.to(weight.dtype), weight, getattr(part, "bias", None))
            if float((given - expected).float().norm()) <= _LEAVING * float(expected.float().norm()):
                self.weight = weight
                return None
        return f"it is no product with its weight alone ({name})"


def scope_of(attention, layer):
    """Where a layer's output projection is looked for: in its attention's module or, where that is a part of another than the
    layer, in that one."""
    if layer is None or layer is attention:
        return attention
    path = next(path for path, module in layer.named_modules() if module is attention)
    return layer.get_submodule(path.rpartition(".")[0]) if "." in path else attention


def _version(tensor):
    """Changes when the tensor is written over."""
    return None if tensor.is_inference() else tensor._version
