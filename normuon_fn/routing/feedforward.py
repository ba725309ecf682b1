"""The first layer of a feed-forward: one matrix, or gate and up fused in one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from .attributes import get, is_layer, kind_of, outputs_and_inputs
from .mixers import Cut

GATE_UP = re.compile(
    r"^(gate_up_proj|up_gate_proj|gate_up|gate_and_up|w13|w1w3|w12|w1_w3|Wi|input_linear|fc1_gate_up"
    r"|gate_up_linear|proj_up_gate|up_and_gate|wi_fused|gu_proj)$"
)  # T5's `wi` is one matrix
# First layers of a feed-forward: gate and up, if the second takes in half of their outputs.
FIRST = re.compile(
    r"^(fc1|w_?in|wi|linear_?(in|1)|lin1|c_fc|ff_proj|proj|proj_in|up_proj|dense_h_to_4h|net|w1|fc_in"
    r"|in_linear|linear_fc1|mlp_in|input_projection|in_proj|up|gate_proj|0|intermediate|wide)$"
)
_SECOND = (
    "output_linear", "down_proj", "fc2", "w2", "w3", "wo", "Wo", "w_out", "linear_out", "linear2",
    "linear_2", "lin2", "c_proj", "ff_out", "proj_out", "dense_4h_to_h", "fc_out", "out_linear",
    "linear_fc2", "mlp_out", "output_projection", "out_proj", "down", "output", "proj_down", "out",
)  # fmt: skip
_TURNS_ROW_BY_ROW = ("GptOss",)

_MANY = 64  # children: a list of blocks, not the layers of one feed-forward


def gate_up(owners: Sequence[nn.Module], outputs: int, reason: str = "gate and up") -> Cut | None:
    where = kind_of(owners[0]) if owners else ""
    turns = where.startswith(_TURNS_ROW_BY_ROW)
    if get(owners[0], "is_concatenated") is False or turns:
        return Cut(None, None, f"gate and up, left whole: in {where} they take turns row by row")
    if outputs % 2:
        return Cut(None, None, f"gate and up, left whole: {outputs} outputs are not two halves")
    second = second_inputs(owners)
    if second is not None and second == outputs:
        return None  # the next layer takes in all of the outputs: one matrix
    return Cut((outputs // 2,) * 2, None, reason)


def second_inputs(owners: Sequence[nn.Module]) -> int | None:
    """How many inputs the layer has that takes in what this one puts out."""
    for k, owner in enumerate(owners[:3]):
        if len(owner._modules) > _MANY:
            continue
        children = dict(owner.named_children())
        if type(owner) in (nn.ModuleList, nn.Sequential):  # the next layer in the list
            listed, inside = list(children.values()), owners[k - 1] if k else None
            at = next((n for n, child in enumerate(listed) if child is inside), len(listed))
            layers = [child for child in listed[at + 1 :] if is_layer(child)]
            if layers:
                return outputs_and_inputs(layers[0])[1]
        for name in _SECOND:
            module = children.get(name)
            if isinstance(module, nn.Sequential) and len(module):
                module = module[-1]
            if module is None or module is owners[0]:
                continue
            if is_layer(module):
                return outputs_and_inputs(module)[1]
            stack = get(module, "weight")  # experts, [n, outputs, inputs]
            if isinstance(stack, nn.Parameter) and stack.ndim == 3:
                return stack.shape[2]
    return None
