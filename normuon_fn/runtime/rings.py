"""The rings through which momentums in host memory pass: one per plan, whichever graph runs.

A captured graph reads and writes the slots at every replay. Whoever captured it has the plan, as a
`GraphedStep` does, and with the plan the ring stays.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..ops.staging import Ring, Transfers
from ..planning.plan import Plan

_rings: WeakKeyDictionary[Plan, Ring] = WeakKeyDictionary()


def transfers_of(plan: Plan) -> Transfers | None:
    """The copies of one run of a graph; None: the plan has no momentums in host memory."""
    streaming = plan.streaming
    if streaming is None:
        return None
    ring = _rings.get(plan)
    if ring is None:
        ring = _rings.setdefault(plan, Ring(streaming.slots, streaming.size, plan.device))
    return Transfers(ring)
