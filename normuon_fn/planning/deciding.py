"""Which ranks decide together what the guard skips: its rule, and what is doubtful in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..algorithm.finishing import needs_of
from ..algorithm.guard import Rule
from ..compat import Ranks, gather_objects, process_group
from ..distributed.placements import covering, rank_and_world_size, ranks_of
from ..routing.doubts import is_called_by, warn_at_caller
from ..types import Config
from .before_ranks import OF_TRAINER, launch_doubt
from .buckets import AnyBucket, Bucket, members_of, parameter_of
from .plan import Parameter, Plan

Alone = Literal["alone"]


def checked_ranks(mesh: Ranks | Alone | None, guard_mesh: Ranks | None) -> Ranks | None:
    """The ranks that have copies of plain tensors.

    Raises:
        TypeError: ``mesh`` or ``guard_mesh`` is of another kind.
    """
    for name, given in (("mesh", mesh), ("guard_mesh", guard_mesh)):
        if given is None or isinstance(given, Ranks) or (name == "mesh" and given == "alone"):
            continue
        or_alone = ", or 'alone'" if name == "mesh" else ""
        raise TypeError(
            f"{name}: expected a DeviceMesh or a ProcessGroup{or_alone}, got {given!r}"
            + ("; write mesh='alone' if this rank decides alone" if name != "mesh" else "")
        )
    return None if isinstance(mesh, str) else mesh


def guard_rule(
    parameters: Sequence[Parameter],
    buckets: Sequence[AnyBucket],
    config: Config,
    device: torch.device,
    mesh: Ranks | Alone | None,
    guard_mesh: Ranks | None,
    alike: bool | None,
) -> Rule:
    """``alike``: whether the ranks of ``guard_mesh`` have the same parameters; ``None``: they ask.

    Raises:
        ValueError: the ranks of ``guard_mesh`` have different guards, or other parameters and a
            guard with scope "bucket".
    """
    group = _deciding_group(parameters, mesh, guard_mesh)
    if group is None or guard_mesh is None:
        # Several meshes are covered by all ranks there are. Whether these have the same parameters
        # was never asked where there is no guard.
        alike = config.guard != "off" or group is None or group in _groups_of(parameters, mesh)
    elif alike is None:
        alike = _have_the_same(parameters, config, group, mesh)
    if not alike and config.guard != "off" and config.guard_scope == "bucket":
        raise ValueError(
            "guard_mesh: its ranks have other parameters, so that buckets mean nothing to them; "
            "write Config(guard_scope='step')"
        )
    names = [p.name for p in parameters]
    # All who share a bucket hear of its updates in its messages: then gradients can be agreed on
    # before anything is written. So it is, too, where nobody else decides. But whether float16 can
    # hold a parameter only the ranks know that have a part of it.
    wide = all(p.spec.dtype != torch.float16 for p in parameters)
    stacks = [bucket for bucket in buckets if isinstance(bucket, Bucket)]
    # And of what ends a step by itself, shards alone know whether their part is finite.
    ends = any(any(needs_of(group, config)) for bucket in stacks for group in bucket.groups)
    return Rule(
        mode=config.guard,
        scope=config.guard_scope,
        parameter_of=parameter_of(buckets, names, device),
        members=members_of(buckets, names, device),
        group=group,
        alike=alike,
        early=group is None
        or (wide and not ends and all(bucket.heard_by == group for bucket in stacks)),
    )


def _deciding_group(
    parameters: Sequence[Parameter], mesh: Ranks | Alone | None, guard_mesh: Ranks | None
) -> str | None:
    ranks = mesh if guard_mesh is None else guard_mesh
    if ranks is not None and not isinstance(ranks, str):
        group = process_group(ranks)
        return group.group_name if group.size() > 1 else None
    return covering([p.spec.sharded for p in parameters])


def _groups_of(parameters: Sequence[Parameter], mesh: Ranks | Alone | None) -> set[str]:
    groups = {p.spec.sharded.group for p in parameters if p.spec.sharded is not None}
    if mesh is not None and not isinstance(mesh, str):
        groups.add(process_group(mesh).group_name)
    return groups


def _have_the_same(
    parameters: Sequence[Parameter], config: Config, group: str, mesh: Ranks | Alone | None
) -> bool:
    """Whether all ranks of a group have copies or parts of the same parameters. A collective."""
    where: Any = None  # of plain tensors: unknown
    if mesh is not None:
        where = [rank_and_world_size()[0]] if isinstance(mesh, str) else ranks_of(mesh)
    lines = [
        (p.name, p.looks, where if p.spec.sharded is None else ranks_of(p.spec.sharded.mesh))
        for p in parameters
    ]
    options = ("guard", "guard_scope")
    found = gather_objects((lines, [getattr(config, name) for name in options]), group)
    for k, name in enumerate(options):
        values = [guard[k] for _, guard in found]
        if len(set(values)) > 1:
            raise ValueError(
                f"guard_mesh: its ranks skip together and need the same Config.{name}, got {values}"
                f", by rank of the group; write Config({name}=...) alike on all of them"
            )
    alike = all(other == found[0][0] for other, _ in found)
    if alike and len(found) > 1 and any(where is None for _, _, where in lines):
        warn_at_caller(
            f"guard_mesh: its {len(found)} ranks have parameters of the same names and shapes, "
            "which are taken for copies: a fault of one rank is reported under its name by all. "
            "If they are different parameters, as of the stages of a pipeline, write mesh='alone' "
            "too; if they are copies, mesh= with the ranks that have them, which then share the "
            "work, or give this warning to warnings.filterwarnings"
        )
    return alike


def alone_doubt(plan: Plan, mesh: Ranks | Alone | None, guard_mesh: Ranks | None) -> str | None:
    """The warning about ranks that decide alone, and probably should not."""
    world = rank_and_world_size()[1]
    if doubt := launch_doubt(plan):
        return doubt
    if plan.config.guard == "off" or world == 1 or mesh is not None or guard_mesh is not None:
        return None
    together = 1 if plan.guard.group is None else len(ranks_of(plan.guard.group))
    if together == world:
        return None
    guard = f"guard={plan.config.guard!r}: there are {world} ranks, and "
    if plan.guard.group is None:
        return (
            f"{guard}each decides alone whether it skips a step, because plain tensors do not tell "
            "which ranks have the same ones. After a fault that only some ranks see, their "
            "parameters differ. Write mesh=torch.distributed.group.WORLD if all ranks have the "
            "same parameters, guard_mesh=torch.distributed.group.WORLD if they have different ones "
            "and skip together, or mesh='alone' if each is meant to decide alone. WORLD is None "
            "before torch.distributed.init_process_group"
            + (f": with transformers.Trainer {OF_TRAINER}" if is_called_by("transformers") else "")
        )
    return (
        f"{guard}the {together} that have parts of the same parameters decide alone whether they "
        "skip a step. Write guard_mesh=torch.distributed.group.WORLD if all ranks skip together, "
        "or guard_mesh= with the mesh of these parameters if they are meant to decide alone"
    )
