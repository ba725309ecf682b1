"""A plan that was made before the process group: there were no other ranks to decide with."""

from __future__ import annotations

import os
from typing import Literal

from ..compat import Ranks
from ..distributed.placements import rank_and_world_size
from ..types import Config
from .plan import Plan

OF_TRAINER = (
    "make TrainingArguments first, which makes the process group, and then "
    "nm.for_trainer(model, ..., mesh=torch.distributed.group.WORLD)"
)


def asks_for_ranks(config: Config) -> bool:
    """Whether a guard decides, or replicas keep state, together with other ranks."""
    return config.guard != "off" or config.replicas == "share"


def is_before_ranks(mesh: Ranks | Literal["alone"] | None, guard_mesh: Ranks | None) -> bool:
    """Whether there is no process group, and nobody has said that there will be none.

    ``torch.distributed.group.WORLD`` is ``None`` then.
    """
    return mesh is None and guard_mesh is None and rank_and_world_size()[1] == 1


def check_ranks(plan: Plan) -> None:
    """Refuses a plan that was made before the ranks which are there now.

    Raises:
        ValueError: with what to write.
    """
    if not plan.before_ranks or (world := rank_and_world_size()[1]) == 1:
        return
    guard, what = plan.config.guard, f"replicas={plan.config.replicas!r}"
    lost = "no other rank shares the state with this one"
    if guard != "off":
        what = f"guard={guard!r}"
        lost = "each rank would decide alone whether it skips a step, and their parameters differ"
    raise ValueError(
        f"{what}: the plan or the optimizer was made before torch.distributed.init_process_group, "
        f"when torch.distributed.group.WORLD was None; now there are {world} ranks, and {lost}. "
        "Make it after init_process_group, with mesh=torch.distributed.group.WORLD; with "
        f"transformers.Trainer {OF_TRAINER}. Or write mesh='alone' if each rank is meant to decide "
        "alone"
    )


def launch_doubt(plan: Plan) -> str | None:
    """The warning about a launcher that started several processes, which have no group yet."""
    world = os.environ.get("WORLD_SIZE", "")
    if not plan.before_ranks or not world.isdigit() or int(world) < 2:
        return None
    what = "replicas='share'" if plan.config.guard == "off" else f"guard={plan.config.guard!r}"
    return (
        f"{what}: the launcher's WORLD_SIZE is {world} and there is no process group yet, so this "
        "is planned for one rank, and torch.distributed.group.WORLD is None. Make the plan or the "
        "optimizer after torch.distributed.init_process_group, with "
        f"mesh=torch.distributed.group.WORLD; with transformers.Trainer {OF_TRAINER}; or write "
        "mesh='alone' if each rank is meant to decide alone"
    )
