"""Whether a function of the user's own can be a stage of the step: `check_stage`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Stage = Callable[[Tensor], Tensor]
CLOSE = 1e-3  # between two results that would be the same without rounding
SCALES = (2.0**-60, 2.0**30)  # of a gradient; both keep its squares out of the question


def check_stage(
    function: Stage, *, rows: int = 8, cols: int = 12, device: torch.device | str = "cpu"
) -> None:
    """Nothing, if ``function`` can be `Config.orthogonalizer`; otherwise an error says why not.

    It calls the function on a few small stacks and waits for the device: write it into a test, or
    once before a run.

    Shapes: the function is given [3, rows, cols] with rows <= cols, in float32.

    Raises:
        TypeError: it is no function, does not return a floating-point tensor, or cannot be traced
            into one graph (``.item()``, a branch on values, ``print``).
        ValueError: it returns another shape, writes into what it was given, returns something else
            the next time, depends on the size of a gradient or on other matrices of the stack,
            makes NaN of zeros, hides a NaN from the guard, or raises an error of its own for one of
            these. All that was found is named.
    """
    if not callable(function):
        raise TypeError(f"function: expected a callable, got {function!r}")
    if not 1 <= rows <= cols:
        raise ValueError(f"rows, cols: expected 1 <= rows <= cols, got {rows} and {cols}")
    generator = torch.Generator("cpu").manual_seed(0)
    stack = torch.randn(3, rows, cols, generator=generator, device="cpu").to(device)
    with torch.no_grad():
        given = stack.clone()
        try:
            found = function(given)
        except Exception as error:
            where = f"{list(stack.shape)} normal numbers"
            raise ValueError(f"function: {_raises(error, where)}") from error
        _check_result(found, stack)
        _check_traced(function, stack)
        faults = [] if torch.equal(given, stack) else [_WRITES]
        faults += _faults(function, stack, found.clone())
    if faults:
        raise ValueError(f"function: {'; '.join(faults)}")


_WRITES = "it writes into the stack that it is given; write x = x * y in the place of x *= y"


def _check_result(found: object, stack: Tensor) -> None:
    if not isinstance(found, Tensor) or not found.dtype.is_floating_point:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"function: expected it to return a floating-point tensor, got {kind}")
    if found.shape != stack.shape:
        raise ValueError(
            f"function: expected it to return {tuple(stack.shape)}, the shape that it is given, "
            f"got {tuple(found.shape)}"
        )


def _check_traced(function: Stage, stack: Tensor) -> None:
    try:
        torch.compile(function, fullgraph=True, dynamic=False, backend="eager")(stack.clone())
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TypeError(
            "function: cannot be traced into the graph of the step; leave out .item(), branches on "
            f"the values of tensors, and calls of other libraries: {reason}"
        ) from error


def _faults(function: Stage, stack: Tensor, found: Tensor) -> list[str]:
    broken = stack.clone()
    broken[1, 0, 0] = float("nan")
    calls: list[tuple[str, Tensor, Callable[[Tensor], str | None]]] = [
        ("the same matrices again", stack.clone(), lambda again: _of_again(again, found)),
        *(
            (f"{scale:.0e} times the same matrices", stack * scale, _of_scale(scale, found))
            for scale in SCALES
        ),
        ("one matrix of the stack alone", stack[1:2].clone(), lambda one: _of_one(one, found)),
        ("matrices of zeros", torch.zeros_like(stack), _of_zeros),
        ("a matrix with a NaN in it", broken, _of_nan),
    ]
    faults: list[str | None] = []
    for given, x, fault_of in calls:
        try:
            result = function(x)
        except Exception as error:
            needs = (
                "; the guard needs a NaN in the place of an error" if given.endswith("it") else ""
            )
            faults.append(_raises(error, given) + needs)
        else:
            faults.append(fault_of(result))
    return [fault for fault in faults if fault is not None]


def _raises(error: Exception, given: str) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"it raises {type(error).__name__.lstrip('_')} for {given}: {reason}"


def _of_again(again: Tensor, found: Tensor) -> str | None:
    if torch.equal(again, found):
        return None
    return "it returns something else the next time: it has a state, or chances"


def _of_scale(scale: float, found: Tensor) -> Callable[[Tensor], str | None]:
    def fault(scaled: Tensor) -> str | None:
        off = _distance(scaled, found)
        if off <= CLOSE:
            return None
        return (
            f"it depends on the size of the gradient: with {scale:.0e} times the same one its "
            f"result is off by {off:.1%}; divide by a norm, without an eps beside it"
        )

    return fault


def _of_one(one: Tensor, found: Tensor) -> str | None:
    if _distance(one, found[1:2]) <= CLOSE:
        return None
    return "what it does to one matrix depends on the others of the stack"


def _of_zeros(result: Tensor) -> str | None:
    if result.isfinite().all():
        return None
    return "it makes NaN of a matrix of zeros; write torch.where(norm == 0, 0, x / norm)"


def _of_nan(result: Tensor) -> str | None:
    if not result[1].isfinite().all():
        return None
    return "it hides a NaN of the gradient, which the guard then cannot see"


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
