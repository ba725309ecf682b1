"""Masks of loads and stores as Triton's interpreter sees them.

It gives a block that is combined with a scalar condition (``block & scalar``) the dtype int32. That
went unnoticed until Triton 3.9, whose interpreter refuses such a mask. Here every version does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def must_be_bool() -> None:
    """From now on the interpreter of this process refuses a mask that is not bool."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, _strict(getattr(InterpreterBuilder, name), position))


def _strict(method: Callable[..., Any], position: int) -> Callable[..., Any]:
    def checked(builder: Any, *arguments: Any, **named: Any) -> Any:
        dtype = getattr(arguments[position].data, "dtype", "bool")  # a descriptor's has none
        assert str(dtype) == "bool", f"a mask of {dtype}, not of bool"
        return method(builder, *arguments, **named)

    return checked
