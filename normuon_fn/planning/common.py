"""What ranks that have parts or copies of the same parameters must give to a step alike.

Which gradients are None, and whether there is a ``found_inf``, is static: ranks that differ in it
would wait for each other, or their copies would drift apart. So the hosts agree on it at the first
step of a plan, and whenever it changes on a rank. As long as nothing changes, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from weakref import WeakKeyDictionary

from torch import Tensor

from ..algorithm.guard import Rule
from ..compat import Ranks, process_group
from ..distributed.agreement import agree
from ..distributed.placements import ShardedLayout
from ..types import Grads
from .before_ranks import check_ranks
from .plan import Plan
from .same_gradients import warn_of_own_gradients

Said = dict[str, list[str]]  # by process group, what a rank has that another might not
_FOUND = "found_inf"
_agreed: WeakKeyDictionary[Plan, tuple[object, Said]] = WeakKeyDictionary()


def common_of(
    layouts: Mapping[str, ShardedLayout | None],
    copies: Ranks | None,
    rule: Rule | None,
    guard_mesh: Ranks | None,
) -> dict[str, tuple[str, ...]]:
    """By process group, the names of the parameters that its ranks have parts or copies of.

    ``copies``: the ranks that have the plain tensors.
    """
    plain: str | None = None
    if copies is not None:
        plain = process_group(copies).group_name if process_group(copies).size() > 1 else None
    elif guard_mesh is not None and rule is not None and rule.alike:
        plain = rule.group
    found: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        group: str | None = plain
        if layout is not None:
            group = layout.group if len(layout.parts) > 1 else None
        if group is not None:
            found.setdefault(group, []).append(name)
    return {group: tuple(names) for group, names in found.items()}


def agree_on_gradients(
    common: Mapping[str, Sequence[str]], lacking: Set[str], before: Set[str] | None
) -> None:
    """Checks that ranks which share parameters lack the same gradients.

    ``common``: by process group; ``before``: what was agreed on, ``None`` at first.

    Raises:
        ValueError: as `agree_on_step`.
    """
    said = {
        group: [name for name in names if name in lacking]
        for group, names in common.items()
        if before is None or any((name in lacking) != (name in before) for name in names)
    }
    agree(said, first=before is None, explain=explain)


def agree_on_step(plan: Plan, grads: Grads, found_inf: Tensor | None) -> None:
    """Checks that ranks which share parameters give the same gradients and ``found_inf``, or None.

    A collective of hosts, if this is the plan's first step or something has changed.

    Raises:
        ValueError: on every rank, naming what each of them lacks; or, of a change on this rank
            alone, on this rank; or the plan was made before there were ranks.
    """
    check_ranks(plan)
    if not (plan.common or plan.guard.group) or not isinstance(grads, Mapping):
        return
    lacks = [grad is None for grad in grads.values()]
    key = lacks, found_inf is None, [*grads] if any(lacks) else None
    last = _agreed.get(plan)
    if last is not None and last[0] == key:
        return
    said = _said(plan, grads, found_inf)
    if last is None or last[1] != said:
        # A matrix that ranks share needs its gradient on all of them: `check_step` will say so.
        if last is not None and any(grads.get(name) is None for name in _shared(plan)):
            return
        changed = {g: x for g, x in said.items() if last is None or last[1].get(g) != x}
        agree(changed, first=last is None, explain=explain)
    if last is None:
        warn_of_own_gradients(plan, grads)
    _agreed[plan] = key, said


def _said(plan: Plan, grads: Grads, found_inf: Tensor | None) -> Said:
    said: Said = {}
    if plan.config.missing_grads == "skip":
        own = {b.name for bucket in plan.buckets if not bucket.shared_by for b in bucket.blocks}
        for group, names in plan.common.items():
            said[group] = [n for n in names if n not in own and grads.get(n) is None]
    if plan.guard.group is not None and plan.guard.alike:
        given = [] if found_inf is None else [_FOUND]
        said[plan.guard.group] = said.get(plan.guard.group, []) + given
    return said


def _shared(plan: Plan) -> list[str]:
    if plan.config.missing_grads != "skip":
        return []
    return [block.name for bucket in plan.buckets if bucket.shared_by for block in bucket.blocks]


def explain(said: Mapping[int, Sequence[str]]) -> str:
    """What each rank lacks that another has, and what to write. ``said``: by rank."""
    everything = dict.fromkeys(x for lines in said.values() for x in lines)
    texts = []
    for x in [x for x in everything if len(said) == 1 or any(x not in said[r] for r in said)]:
        with_it = [rank for rank in said if x in said[rank]]
        without = [rank for rank in said if x not in said[rank]]
        if x == _FOUND:
            is_there, others = "found_inf is given", "None"
        else:
            is_there, others = f"the gradient of {x!r} is None", "a tensor"
        rest = f", {others} on {_ranks(without)}" if without else ""
        texts.append(f"{is_there} on {_ranks(with_it)}{rest}")
    shown = "; ".join(texts[:8]) or "all gradients are tensors, and found_inf is None"
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    hints = []
    if any(x != _FOUND for x in everything):
        hints.append(
            "give zeros on every rank that lacks a gradient: Config(missing_grads='zeros')"
        )
    if _FOUND in everything:
        hints.append("give found_inf on every rank, zeros where nothing was found")
    return "; ".join([shown + more, *hints])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
