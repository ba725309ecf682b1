"""The study of QK-clip, as short as it shows what it is about."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")


def test_logits_explode_without_the_clip_and_not_with_it() -> None:
    from examples.study.qk_clip import TAU, trained

    plain, clipped = (trained(clip, 60)["largest logit"] for clip in (False, True))
    assert max(plain[-20:]) > 4 * TAU  # 208 was seen
    assert max(clipped[-20:]) < 2 * TAU  # 48 was seen: a step adds to what the last clip left
    assert all(map(math.isfinite, plain))
