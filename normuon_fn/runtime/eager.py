"""A step that runs operation by operation, and what an error says of a step that wrote by half.

Some callers cannot have a graph. A TorchDispatchMode or a transform of torch.func is to see every
operation; under FakeTensorMode compiled code would read memory that is not there; and
``TORCH_COMPILE_DISABLE=1`` or ``torch.compiler.set_stance("force_eager")`` forbid it. They get the
same code, `local_update` or `local_update_`, as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..compat import observers
from ..compat.observers import fake_beside_real, is_observed, is_transformed, value_tracer
from ..distributed import placements
from ..ops.registration import writes
from ..planning.plan import Plan
from ..step import local_update_
from ..types import Grads, Hyper, StepResult, Tensors

StepFunction = Callable[..., StepResult]
HALF_WRITTEN = (
    "The step had begun to write when this error ended it: parameters and state are neither those "
    "from before the step nor those after it. Load both from a checkpoint before the next step; a "
    "second call would apply parts of the step twice."
)


class NotCompiled(Exception):  # noqa: N818 - no error: it never leaves this wing
    """Dynamo did not trace a step, which has not begun."""


def must_be_eager(function: StepFunction, params: Tensors, grads: Grads, state: Tensors) -> bool:
    """Whether a graph would hide the step from somebody, or cannot read its tensors.

    Raises:
        RuntimeError: somebody traces or transforms it who cannot, before anything is written.
    """
    if tracer := value_tracer():
        raise RuntimeError(
            f"step: {tracer} cannot record it; use torch.export, torch.compile or make_fx"
        )
    if function is local_update_ and is_transformed():
        raise RuntimeError(
            "step_: it writes in place, which torch.func (vmap, grad, jvp, functionalize) cannot "
            "transform; write step or update, which return new tensors, in its place"
        )
    return is_observed(map(_first, (params, grads, state)))


def _first(tensors: Grads) -> Tensor | None:
    """The first tensor of a dict, of a DTensor the local part. All are fake, or none is."""
    values = tensors.values() if isinstance(tensors, Mapping) else ()  # checked later
    found = next((x for x in values if isinstance(x, Tensor)), None)
    return None if found is None else placements.local(found)


def run_eagerly(
    function: StepFunction,
    params: Tensors,
    grads: Grads,
    state: Tensors,
    hyper: Hyper,
    plan: Plan,
    found_inf: Tensor | None,
) -> StepResult:
    """The result of ``function``, operation by operation."""
    with fake_beside_real(_first(params)):
        return function(params, grads, state, hyper, plan, found_inf=found_inf)


class saying_what_was_written:  # noqa: N801 - used as a function
    """An error that ends a step in place after it has begun to write says so.

    Every operator counts before it writes. In a graph Inductor's own kernels write too: before the
    graph runs, the versions of all tensors that it writes have been counted up, of which a counter
    of the state is always one. What is captured in a CUDA graph is not executed.
    """

    def __init__(self, plan: Plan, state: Tensors) -> None:
        self.plan, self.state = plan, state

    def __enter__(self) -> None:
        self.before = writes(), self.version()

    def version(self) -> int | None:
        """Of a tensor that every step writes; None where no versions are counted."""
        try:
            return self.state["guard.step"]._version
        except (KeyError, TypeError, AttributeError, RuntimeError):  # checked later; of inference
            return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or (writes(), self.version()) == self.before:
            return
        device = self.plan.device
        if not (device.type == "cuda" and observers.is_capturing(device)):
            _add_note(error, HALF_WRITTEN)


def _add_note(error: BaseException, note: str) -> None:
    """Adds a sentence to what an error says. Python 3.10 has no ``add_note``."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = ("\n".join([*map(str, error.args[:1]), note]), *error.args[1:])
