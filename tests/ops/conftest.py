from __future__ import annotations

from normuon_fn.ops import launch
from tests.ops import masks

if launch.INTERPRETED:
    masks.must_be_bool()
