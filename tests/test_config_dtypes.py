"""What an error says is allowed for a dtype is what is allowed, no more and no less."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

import normuon_fn as nm

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
FIELDS = [f.name for f in dataclasses.fields(nm.Config) if f.name.endswith("_dtype")]


def taken(field: str, value: Any) -> bool:
    try:
        nm.Config(**{field: value})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("field", FIELDS)
def test_the_error_of_a_dtype_lists_exactly_what_is_taken(field: str) -> None:
    refused = [*(x for x in DTYPES if not taken(field, x)), "int4", "float32", 3]
    if field == "momentum_dtype":
        assert torch.float16 in refused
    allowed = {str(x) for x in DTYPES if taken(field, x)} | {"None"}
    allowed |= {repr(x) for x in ("int8",) if taken(field, x)}
    assert len(allowed) > 3
    for value in refused:
        with pytest.raises(ValueError, match=f"Config.{field}: ") as error:
            nm.Config(**{field: value})
        text = str(error.value).partition("got")[0]
        assert set(re.findall(r"torch\.\w+|None|'int8'", text)) == allowed, text
