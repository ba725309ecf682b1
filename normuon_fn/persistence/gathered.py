"""The state of all ranks together, where ranks share it (``Config(replicas="share")``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import outside_inference_mode
from ..distributed.owned import write_from_owner
from ..planning.checks import check_tensors
from ..planning.plan import Plan, check_plan
from ..types import Tensors


@outside_inference_mode
@torch.no_grad()
def gather_state(state: Tensors, plan: Plan) -> dict[str, Tensor]:
    """The state of all ranks, as it would be with ``Config(replicas="each")``.

    For one file (`save`, ``torch.save``). A collective: all ranks call it, and all get the state,
    in copies on the host; one tensor at a time passes through the device. `load` takes from the
    file what a rank owns, on any number of ranks. torch.distributed.checkpoint needs no gathering:
    it saves and loads the dict of every rank as it is.

    Where no other rank has a part of the state, it comes back as it is.

    Shapes: as `init`, of all parameters.

    Raises:
        TypeError: ``plan`` is not a Plan.
        ValueError: ``state`` is not that of the plan on this rank.
    """
    check_plan(plan)
    check_tensors(plan, "state", state, plan.state)
    if plan.owned.group is None:
        return dict(state)
    found: dict[str, Tensor] = {}
    for key, spec in plan.whole_state.items():
        name, _, kind = key.rpartition(".")
        owner = plan.owned.owners.get(name)
        if owner is None or kind not in plan.owned.kinds:
            found[key] = state[key].detach().to("cpu", copy=True)
            continue
        tensor = state[key].detach().contiguous() if key in state else None
        if tensor is None:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=plan.device)
        write_from_owner(tensor, owner, plan.owned.group)
        found[key] = tensor.to("cpu", copy=True)
    return found
