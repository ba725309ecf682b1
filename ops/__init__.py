"""The operators of the step: kernels, their twins in plain PyTorch, and how one is chosen.

Shipped as ``normuon_fn.ops``, and imports nothing of ``normuon_fn``.

Read operators.py first: it is what the step calls. Then lists.py (what a list is), reference.py
(what is computed), and per operation one file with kernel, launch and registration: advance.py,
gather.py, apply.py, adamw.py, orient.py, repack.py; product*.py for Newton-Schulz, with a second
kernel in warp_specialized.py. They stand on launch.py, tables.py, registration.py and
implementations.py.

A device, a dtype and memory are all that an operator knows: nothing of names, plans or ranks.
"""

from __future__ import annotations

from . import measured, staging
from .handles import Graph, Handle, Like, Table, input_for, inputs, is_handle, lists_outside
from .launch import kernels_for
from .lion import lion, lion_, lion_wide, lion_wide_
from .lists import all_finite, chained, cut, stack
from .operators import (
    AdamWRates,
    Advanced,
    Measures,
    MomentumRule,
    Operators,
    measure,
    scale_and_cast,
)
from .orient import orient, orientation
from .products import LIBRARY, SYMMETRIC, Products
from .reference import part_of, per_matrix, power_of_two
from .reinterpret import reinterpret
from .repack import repack
from .rounding import joined_with

__all__ = [
    "LIBRARY",
    "SYMMETRIC",
    "AdamWRates",
    "Advanced",
    "Graph",
    "Handle",
    "Like",
    "Measures",
    "MomentumRule",
    "Operators",
    "Products",
    "Table",
    "all_finite",
    "chained",
    "cut",
    "input_for",
    "inputs",
    "is_handle",
    "joined_with",
    "kernels_for",
    "lion",
    "lion_",
    "lion_wide",
    "lion_wide_",
    "lists_outside",
    "measure",
    "measured",
    "orient",
    "orientation",
    "part_of",
    "per_matrix",
    "power_of_two",
    "reinterpret",
    "repack",
    "scale_and_cast",
    "stack",
    "staging",
]
