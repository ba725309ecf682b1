"""What is kept between steps: a declaration that everything else reads."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ..types import Config


class State(NamedTuple):
    """One tensor of the flat state per parameter, named ``"<parameter>.<name>"``."""

    name: str
    # Shaped as the parameter; or one number per row, or per column: see `per_row`; or one per block
    # of columns of every row: see ops/codes.py.
    per: Literal["entry", "line", "block"]
    dtype: Literal["wide", "momentum"] | torch.dtype = (
        "wide"  # "wide": float32, of float64 parameters float64
    )
    starts_as: Literal["zeros", "parameter"] = "zeros"

    def dtype_for(self, config: Config, parameter: torch.dtype) -> torch.dtype:
        """The dtype that it has for a parameter of that dtype."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        chosen = config.momentum_dtype if self.dtype == "momentum" else None
        assert not isinstance(chosen, str)  # Config has made a dtype of it
        return chosen or (torch.float64 if parameter == torch.float64 else torch.float32)


# What makes a float32 master of a parameter in 16 bits: see ops/rounding.py.
MASTERS = {
    "mantissa": State("mantissa", "entry", torch.int16),
    "fp32": State("master", "entry", torch.float32, starts_as="parameter"),
}
