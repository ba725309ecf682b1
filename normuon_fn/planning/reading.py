"""How a parameter is read as matrices, by its route; and its variance beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..ops.codes import blocks_of
from ..routing.routes import Route
from ..routing.uses import is_window
from .layout import View, size_of


def read_as_matrices(name: str, tensor: Tensor, route: Route) -> list[tuple[View, int, int, int]]:
    shape = tuple(tensor.shape)
    if len(shape) < 2:
        raise ValueError(
            f"params[{name!r}]: NorMuon needs at least 2 dimensions, got shape {shape}; route it "
            "to 'adamw'"
        )
    if len(shape) == 2 and route.flatten:
        route = replace(route, flatten=False)
    _check_parts_of_a_window(name, shape, route)
    if len(shape) > 2 and route.heads is not None and not route.flatten:
        raise ValueError(
            f"params[{name!r}]: heads and splits need a 2-D parameter, got shape {shape}; a stack "
            "can have splits, and a convolution has both with Route(flatten=True)"
        )
    # In a stack, `Route.dim` counts from its matrices on.
    at = route.dim if route.flatten else len(shape) - 2 + route.dim
    size = shape[at]
    splits = None if route.splits is None else tuple(route.splits)
    if splits is not None and sum(splits) != size:
        raise ValueError(
            f"params[{name!r}]: splits {splits} add up to {sum(splits)}, dimension {at} is {size} "
            f"(of {shape}: Route(dim={route.dim}) splits the "
            f"{'columns' if route.dim else 'rows'} of its matrices)"
        )
    parts = splits or (size,)
    heads: tuple[int | None, ...]
    if isinstance(route.heads, Sequence):
        if len(route.heads) != len(parts):
            raise ValueError(f"params[{name!r}]: {len(route.heads)} heads for {len(parts)} splits")
        heads = tuple(route.heads)
    else:
        heads = (route.heads,) * len(parts)
    for part, count in zip(parts, heads, strict=True):
        if count is not None and part % count:
            raise ValueError(
                f"params[{name!r}]: {part} along dimension {route.dim} cannot be cut into {count} "
                "equal heads"
            )
    return matrices(shape, flatten=route.flatten, heads=heads, splits=splits, dim=route.dim)


def _check_parts_of_a_window(name: str, shape: tuple[int, ...], route: Route) -> None:
    """Refuses heads or splits of what is a convolution, and is not read as one."""
    parts = route.splits is not None or route.heads is not None
    if not parts or route.flatten or len(shape) < 3 or not is_window(shape):
        return
    if route.splits is not None and sum(route.splits) == shape[len(shape) - 2 + route.dim]:
        return  # a stack of matrices whose shape is a window's too
    given = ", ".join(
        f"{field}={getattr(route, field)!r}"
        for field in ("splits", "heads", "dim", "transposed")
        if getattr(route, field) not in (None, 0, False)
    )
    raise ValueError(
        f"params[{name!r}]: heads and splits along the window of a convolution, of shape {shape}; "
        f"write Route(flatten=True, {given}) to cut its {'inputs' if route.dim else 'outputs'}"
    )


def matrices(
    shape: tuple[int, ...],
    *,
    flatten: bool,
    heads: tuple[int | None, ...],
    splits: tuple[int, ...] | None,
    dim: int,
) -> list[tuple[View, int, int, int]]:
    """(view, count, rows, cols) of every block of a parameter. ``heads``: one entry per split."""
    if flatten and len(shape) > 2:
        each = size_of(shape[2:])
        if splits is not None and dim == 1:
            splits = tuple(size * each for size in splits)
        flat = matrices(
            (shape[0], shape[1] * each), flatten=False, heads=heads, splits=splits, dim=dim
        )
        return [(view.of_tensor(shape), n, rows, cols) for view, n, rows, cols in flat]
    if len(shape) > 2 and splits is not None:
        return _split_stack(shape, splits, dim)
    if len(shape) > 2:
        count, rows, cols = size_of(shape[:-2]), *shape[-2:]
        return [(View(shape, (count, rows, cols)), count, rows, cols)]
    blocks, start = [], 0
    whole = splits is None
    for length, cut in zip(splits or (shape[dim],), heads, strict=True):
        count = 1 if cut is None else cut
        rows, cols = (length, shape[1]) if dim == 0 else (shape[0], length)
        rows, cols = (rows // count, cols) if dim == 0 else (rows, cols // count)
        read = (
            (rows, cols)
            if cut is None
            else (count, rows, cols)
            if dim == 0
            else (rows, count, cols)
        )
        view = View(
            shape, read, dim, start, None if whole else length, swap=cut is not None and dim == 1
        )
        blocks.append((view, count, rows, cols))
        start += length
    return blocks


def _split_stack(
    shape: tuple[int, ...], splits: tuple[int, ...], dim: int
) -> list[tuple[View, int, int, int]]:
    """Of every matrix of a stack the same parts."""
    blocks, start, count = [], 0, size_of(shape[:-2])
    for length in splits:
        rows, cols = (length, shape[-1]) if dim == 0 else (shape[-2], length)
        blocks.append(
            (
                View(shape, (count, rows, cols), len(shape) - 2 + dim, start, length),
                count,
                rows,
                cols,
            )
        )
        start += length
    return blocks


def scale_views(
    blocks: Sequence[tuple[View, int, int, int]],
) -> tuple[tuple[int, ...], list[View]]:
    """The shape of a state with one number per block of columns of every row (ops/codes.py), and
    the view of it that belongs to each block of the parameter.

    It is the parameter's shape with so many columns as there are blocks; every head or split has
    its own.
    """
    return line_views(blocks, [True] * len(blocks), [blocks_of(cols) for *_, cols in blocks])


def line_views(
    blocks: Sequence[tuple[View, int, int, int]],
    per_row: Sequence[bool],
    each: Sequence[int] | None = None,  # numbers of a row or column of each block; None: one
) -> tuple[tuple[int, ...], list[View]]:
    """The shape of a parameter's variance in the state, and the view of it that belongs to each
    block.

    It is the parameter's shape with the reduced axis 1 (every head or split its own), where that
    can be said; blocks of one parameter that reduce different axes lie one behind the other in a
    vector.
    """
    each = [1] * len(blocks) if each is None else each
    blocks = [(view.of_flattened, n, r, c) for view, n, r, c in blocks]
    first, count, rows, cols = blocks[0]
    parts = (
        len(blocks) > 1
        or first.length is not None
        or (len(first.base) == 2 and count > 1)
        or first.swap
    )
    if not parts:
        lead = first.base[:-2]
        across = (rows, each[0]) if per_row[0] else (1, cols)
        base = (*lead, *across)
        return base, [View(base, (count, *across) if len(first.shape) == 3 else across)]
    if len(first.base) > 2 and len(set(per_row)) == 1:
        return _stack_line_views(blocks, per_row[0], each)
    if not any(per_row) and first.dim == 1:  # one a column, and the columns are what is split
        base = (1, first.base[1])
        return base, [
            View(
                base, (1, n, c) if len(view.shape) == 3 else (1, c), 1, view.start, n * c, view.swap
            )
            for view, n, _, c in blocks
        ]
    if not all(per_row):
        sizes = [
            n * (r if by_row else c) for (_, n, r, c), by_row in zip(blocks, per_row, strict=True)
        ]
        base, views = (sum(sizes),), []
        for k, ((view, n, r, c), by_row) in enumerate(zip(blocks, per_row, strict=True)):
            across = (r, 1) if by_row else (1, c)
            stacked = len(view.shape) == 3
            views.append(
                View(base, (n, *across) if stacked else across, 0, sum(sizes[:k]), sizes[k])
            )
        return base, views
    dim = first.dim
    along = sum(n * own for (_, n, _, _), own in zip(blocks, each, strict=True))
    base = (first.base[0], each[0] if dim == 0 else along)
    views, start = [], 0
    for (view, n, r, _), own in zip(blocks, each, strict=True):
        length = n * r if dim == 0 else n * own
        shape = (length, own) if len(view.shape) == 2 else (n, r, own) if dim == 0 else (r, n, own)
        if dim == 1 and len(view.shape) == 2:
            shape = (r, own)
        views.append(View(base, shape, dim, start, length, swap=view.swap))
        start += length
    return base, views


def _stack_line_views(
    blocks: Sequence[tuple[View, int, int, int]], per_row: bool, each: Sequence[int]
) -> tuple[tuple[int, ...], list[View]]:
    """Of a stack with splits: the stack's shape with the reduced axis 1, or one for every split."""
    first = blocks[0][0]
    lead, along = first.base[:-2], first.dim - len(first.base) + 2  # the dimension that is split
    sized = zip(blocks, each, strict=True)
    lengths = [(r, own) if per_row else (1, c) for (_, _, r, c), own in sized]
    total = sum(across[along] for across in lengths)
    base = (*lead, total, lengths[0][1]) if along == 0 else (*lead, lengths[0][0], total)
    views, start = [], 0
    for (_, count, _, _), across in zip(blocks, lengths, strict=True):
        views.append(View(base, (count, *across), first.dim, start, across[along]))
        start += across[along]
    return base, views
