"""The only file that knows ranks: who holds which part of a matrix, who orthogonalizes it, and the two exchanges in between.

    parts on every rank  --send, receive-->  whole matrices, each on one rank  --send_back, receive_back-->  parts

A parameter is a DTensor of any placements, or a plain tensor that every rank of ``mesh`` holds. Each matrix has one owner. Its
parts go there in the dtype of the products, scaled by a power of two; the update comes back to everybody who holds a part. Both
ways are one all-to-all a bucket, whatever the placements, over the flattened mesh; replicated matrices need no way there, and
one all-gather back. Matrices that no rank holds in part (experts, heads) are stepped where they lie and go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .compat import Ranks, all_gather, all_to_all, gather_objects, is_strided, process_group, wait
from .layout import Rect, Span

# ---------------------------------------------------------------------------------------------- where the parts of a tensor lie


@dataclass(frozen=True, eq=False)
class Sharded:
    """How a DTensor lies on its mesh. ``parts``: by rank of the group, (start, length) in every dimension."""

    shape: tuple[int, ...]  # of the whole tensor
    mesh: DeviceMesh
    placements: tuple[Any, ...]
    group: str
    rank: int  # this one's in the group
    parts: tuple[tuple[Span, ...], ...]
    replicas: tuple[int, ...]  # by rank of the group: ranks with the same number hold all of the tensor between them

    @property
    def here(self) -> tuple[Span, ...]:
        return self.parts[self.rank]


def sharded(name: str, tensor: Tensor) -> Sharded | None:
    """Of a DTensor; ``None`` for a plain tensor.

    Raises:
        ValueError: placements that are no parts of a tensor (Partial), or that this cannot tell the parts of.
    """
    if not isinstance(tensor, DTensor):
        return None
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    for placement in placements:
        if not (isinstance(placement, Replicate) or placement.is_shard() or is_strided(placement)):
            raise ValueError(f"params[{name!r}]: expected Shard and Replicate placements, got {placements}; redistribute it")
    group = process_group(mesh)
    ranks = mesh.mesh.flatten().tolist()
    places = {rank: tuple((mesh.mesh == rank).nonzero()[0].tolist()) for rank in ranks}
    by_rank = [places[dist.get_global_rank(group, k)] for k in range(group.size())]
    parts = tuple(_part(tuple(tensor.shape), placements, tuple(mesh.mesh.shape), place) for place in by_rank)
    copies = [k for k, p in enumerate(placements) if isinstance(p, Replicate)]
    numbers: dict[tuple[int, ...], int] = {}
    replicas = tuple(numbers.setdefault(tuple(place[k] for k in copies), len(numbers)) for place in by_rank)
    mine = tuple(length for _, length in parts[group.rank()])
    if mine != tuple(tensor.to_local().shape):
        raise ValueError(
            f"params[{name!r}]: {placements} should leave {mine} here, the local tensor is {tuple(tensor.to_local().shape)}"
        )
    return Sharded(tuple(tensor.shape), mesh, placements, group.group_name, group.rank(), parts, replicas)


def _part(
    shape: tuple[int, ...], placements: Sequence[Any], sizes: tuple[int, ...], place: tuple[int, ...]
) -> tuple[Span, ...]:
    """What the rank at ``place`` of a mesh holds. A strided shard (FSDP of what is sharded already) is cut last."""
    part = [(0, size) for size in shape]
    order = sorted(range(len(placements)), key=lambda k: is_strided(placements[k]))
    for k in order:
        if isinstance(placements[k], Replicate):
            continue
        start, length = part[placements[k].dim]
        chunk = -(-length // sizes[k])
        before = min(length, chunk * place[k])
        part[placements[k].dim] = start + before, min(length, chunk * (place[k] + 1)) - before
    return tuple(part)


def local(tensor: Tensor) -> Tensor:
    """The part that lies here; a plain tensor is one already."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else tensor._local_tensor


def local_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: local(tensor) for name, tensor in tensors.items()}


def lies_as(tensor: Tensor, of: Sharded | None) -> bool:
    """Whether a tensor lies as the plan says. A plain tensor counts as the part that lies here."""
    if not isinstance(tensor, DTensor):
        return True
    return of is not None and tuple(tensor.placements) == of.placements and tensor.device_mesh == of.mesh


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.placements)} on {tensor.device_mesh}" if isinstance(tensor, DTensor) else "a plain tensor"


def whole(tensor: Tensor, of: Sharded | None) -> Tensor:
    """The DTensor of which ``tensor`` is the part that lies here."""
    if of is None or isinstance(tensor, DTensor):
        return tensor
    shape = torch.Size(of.shape)
    stride = tuple(torch.Size(shape[k + 1 :]).numel() for k in range(len(shape)))
    return DTensor.from_local(tensor, of.mesh, of.placements, run_check=False, shape=shape, stride=stride)


def reduced(of: Sharded | None, shape: tuple[int, ...]) -> Sharded | None:
    """How a tensor lies that has ``shape`` in the place of ``of.shape``: whole where a dimension is another one."""
    if of is None:
        return None
    if len(shape) == 2 < len(of.shape):  # of a tensor that is read as one matrix
        each = torch.Size(of.shape[2:]).numel()
        flat: list[tuple[Span, ...]] = [(part[0], (part[1][0] * each, part[1][1] * each)) for part in of.parts]
        of = replace(of, shape=(of.shape[0], of.shape[1] * each), parts=tuple(flat))
    if len(shape) != len(of.shape):
        raise ValueError(f"no placements for a state of shape {shape} of a parameter {of.shape} that is sharded")
    kept = [isinstance(p, Replicate) or shape[p.dim] == of.shape[p.dim] for p in of.placements]
    placements = tuple(p if keep else Replicate() for p, keep in zip(of.placements, kept, strict=True))
    parts = tuple(
        tuple(own if size == all_ else (0, size) for own, size, all_ in zip(part, shape, of.shape, strict=True))
        for part in of.parts
    )
    return replace(of, shape=shape, placements=placements, parts=parts)


def covering(lie: Sequence[Sharded | None]) -> str | None:
    """The process group of all ranks that hold a part of one of these: their one mesh, or everybody."""
    meshes = {id(of.mesh): of for of in lie if of is not None}
    groups = {of.group: of for of in meshes.values() if len(of.parts) > 1}
    if len(groups) < 2:
        return next(iter(groups), None)
    return dist.group.WORLD.group_name if dist.group.WORLD is not None else None


def check_alike(lines: Sequence[str], group: str) -> None:
    """That every rank of a group has the same lines. A collective, on the host.

    Raises:
        ValueError: on every rank, naming the first lines that differ.
    """
    mine = list(lines)
    for rank, theirs in enumerate(gather_objects(mine, group)):
        if theirs != mine:
            pairs = [(a, b) for a, b in zip_longest(mine, theirs, fillvalue="nothing") if a != b]
            shown = "; ".join(f"here {a}, there {b}" for a, b in pairs[:3])
            raise ValueError(
                f"the plans of the ranks differ: rank {rank} of the group has another one in {len(pairs)} lines: {shown}"
            )


# --------------------------------------------------------------------------------------------------------- who does which work


@dataclass(frozen=True)
class Spread:
    """How the matrices of one group lie on the ranks of a process group, and who orthogonalizes which."""

    group: str
    rank: int  # this one's
    rects: tuple[Rect, ...]  # by rank: what it holds of every matrix
    replicas: tuple[int, ...]  # by rank: see Sharded
    counts: tuple[int, ...] = ()  # by rank: so many of the matrices, in order

    @staticmethod
    def of(rects: Sequence[Rect], rows: int, cols: int, how: Sharded | Ranks | None) -> Spread | None:
        """``None``: whole matrices on one rank, that nobody shares the work on."""
        if how is None:
            return None
        if isinstance(how, Sharded):
            group, rank, replicas = how.group, how.rank, how.replicas
        else:
            ranks = process_group(how)
            group, rank, replicas = ranks.group_name, ranks.rank(), tuple(range(ranks.size()))
            rects = [Rect(0, rows, 0, cols)] * ranks.size()
        return Spread(group, rank, tuple(rects), replicas) if len(rects) > 1 else None

    @property
    def here(self) -> Rect:
        return self.rects[self.rank]

    @property
    def replicated(self) -> bool:
        """Whether every rank holds every matrix."""
        return len(set(self.replicas)) == len(self.replicas)

    @property
    def own(self) -> slice:
        """The matrices that this rank orthogonalizes."""
        return self.owned(self.rank)

    def owned(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def sends(self, source: int, target: int) -> bool:
        """Whether ``source`` gives ``target`` its parts of the matrices that ``target`` owns: one of several copies does."""
        return self.replicas[source] == self.replicas[target]


def balance(groups: Sequence[Any]) -> dict[int, Spread]:
    """The spreads of these `Group`s by their id, with the work shared out: by what matrices cost, over all groups of the ranks.

    Every rank takes its equal share of each group; what is left over goes to whoever has least to do, the dearest first.
    """
    found: dict[int, Spread] = {}
    load: dict[str, list[float]] = {}

    def cost(group: Any) -> float:
        short, long = sorted((group.rows, group.cols))
        return float(short * short * (short + long))

    for group in sorted((g for g in groups if g.spread is not None), key=cost, reverse=True):
        ranks = len(group.spread.rects)
        busy = load.setdefault(group.spread.group, [0.0] * ranks)
        base, rest = divmod(group.count, ranks)
        extra = sorted(range(ranks), key=lambda rank: (busy[rank], rank))[:rest]
        counts = tuple(base + (rank in extra) for rank in range(ranks))
        load[group.spread.group] = [have + n * cost(group) for have, n in zip(busy, counts, strict=True)]
        found[id(group)] = replace(group.spread, counts=counts)
    return found


# ----------------------------------------------------------------------------------------------------------------- the exchange


class Part(NamedTuple):
    """What a rank sends of the matrices of one group, tall ones transposed; of replicated ones, those that it owns."""

    x: Tensor  # [n, rows, cols] times `power`, in the dtype of the products
    power: Tensor  # [n]
    variance: Tensor | None  # [n, rows or cols]


class Whole(NamedTuple):
    """The matrices of one group that a rank owns."""

    x: Tensor  # [n, rows, cols] times `power`, in the compute dtype
    power: Tensor  # [n]
    squares: Tensor  # [n] sum(x**2), of the same sums as on one device
    variance: Tensor | None  # [n, rows or cols]


class Update(NamedTuple):
    """What an owner sends back of all its matrices, and what a rank has then of its parts of all matrices."""

    x: Tensor  # [n, rows, cols], as the parameter lies
    factor: Tensor  # [n, rows or cols]
    variance: Tensor | None  # [n, rows or cols]
    finite: Tensor  # [n] bool


class Sent(NamedTuple):
    """32-bit words, so many from every rank; on their way unless they have ``arrived``."""

    words: Tensor
    sizes: list[int]
    arrived: bool

    def by_rank(self) -> list[_Reader]:
        words = self.words if self.arrived else wait(self.words)
        return [_Reader(part) for part in words.split(self.sizes)]


@dataclass(frozen=True)
class Exchange:
    """Both ways of one bucket: one collective each, whatever the placements, for all of its groups."""

    spreads: tuple[Spread, ...]  # by group, as are the next two
    tall: tuple[bool, ...]  # the matrices are sent transposed
    by_row: tuple[bool, ...]  # one variance a row; otherwise one a column
    normalize: bool
    dtype: torch.dtype  # of the products
    wide: torch.dtype  # of everything else
    device: torch.device
    overlaps: bool  # several of these may be on their way at once

    @property
    def replicated(self) -> bool:
        return self.spreads[0].replicated

    @property
    def _ranks(self) -> range:
        return range(len(self.spreads[0].rects))

    def _answered(self, k: int, rank: int) -> bool:
        """Whether a rank holds anything of a group: with an empty part of the matrices it may have all of their variances."""
        return self.spreads[k].rects[rank].size > 0 or (self.normalize and self._along(k, rank) > 0)

    def _along(self, k: int, rank: int) -> int:
        """How many variances of a matrix a rank holds."""
        rect = self.spreads[k].rects[rank]
        return rect.rows if self.by_row[k] else rect.cols

    def send(self, parts: Sequence[Part | None]) -> Sent:
        """Every part to the owner of its matrix; ``None`` for a group of which there is nothing here."""
        pieces: list[Tensor] = []
        outgoing = []
        for target in self._ranks:
            before = len(pieces)
            for part, spread in zip(parts, self.spreads, strict=True):
                if part is not None and spread.counts[target] and spread.sends(spread.rank, target):
                    at = spread.owned(target)
                    extra = [part.power[at, None]]
                    extra += [] if part.variance is None else [part.variance[at]]
                    pieces += [_words(part.x[at]), _words(torch.cat([x.to(self.wide) for x in extra], 1))]
            outgoing.append(sum(len(piece) for piece in pieces[before:]))
        incoming = [0] * len(outgoing)
        for k, spread in enumerate(self.spreads):
            n = spread.counts[spread.rank]
            for source in self._ranks:
                if n and spread.rects[source].size and spread.sends(source, spread.rank):
                    extra_size = 1 + (self._along(k, source) if self.normalize else 0)
                    incoming[source] += _size(self.dtype, n * spread.rects[source].size) + _size(self.wide, n * extra_size)
        return self._sent(all_to_all(self._joined(pieces), incoming, outgoing, self.spreads[0].group), incoming)

    def receive(self, sent: Sent) -> list[Whole | None]:
        """The matrices that this rank owns, by group; ``None`` where it owns none."""
        readers = sent.by_rank()
        found: list[Whole | None] = []
        for k, (spread, tall) in enumerate(zip(self.spreads, self.tall, strict=True)):
            n = spread.counts[spread.rank]
            if not n:
                found.append(None)
                continue
            blocks: dict[Rect, tuple[Tensor, Tensor]] = {}
            for source, reader in enumerate(readers):
                rect = spread.rects[source].mT if tall else spread.rects[source]
                if rect.size and spread.sends(source, spread.rank):
                    x = reader.next(self.dtype, n, rect.rows, rect.cols)
                    blocks[rect] = x, reader.next(self.wide, n, 1 + (self._along(k, source) if self.normalize else 0))
            found.append(self._assembled(blocks, self.by_row[k] != tall))
        return found

    def _assembled(self, blocks: dict[Rect, tuple[Tensor, Tensor]], along_rows: bool) -> Whole:
        order = sorted(blocks)
        powers = torch.stack([blocks[rect][1][:, 0] for rect in order], 1)
        power = powers.amin(1)  # that of the largest entry of all; 0 where one is not finite
        shift = power[:, None] / powers
        scaled = {rect: blocks[rect][0].to(self.wide) * shift[:, k, None, None] for k, rect in enumerate(order)}
        bands = [[rect for rect in order if rect.row == row] for row in dict.fromkeys(rect.row for rect in order)]
        x = _cat([_cat([scaled[rect] for rect in band], 2) for band in bands], 1)
        edge = [band[0] for band in bands] if along_rows else bands[0]
        variance = _cat([blocks[rect][1][:, 1:] for rect in edge], 1) if self.normalize else None
        return Whole(x, power, x.square().sum((-2, -1)), variance)

    def send_back(self, updates: Sequence[Update | None]) -> Sent:
        """An owner's updates to whoever holds a part; ``None`` for a group of which this rank owns nothing."""
        incoming = [
            sum(self._answer_size(k, spread.counts[owner]) for k, spread in enumerate(self.spreads)) for owner in self._ranks
        ]
        if self.replicated:  # everybody gets the same
            most = max(incoming)
            words = self._joined(self._answer(updates, 0))
            words = torch.nn.functional.pad(words, (0, most - len(words)))
            return self._sent(all_gather(words, len(incoming), self.spreads[0].group), [most] * len(incoming))
        answers = [self._answer(updates, target) for target in self._ranks]
        outgoing = [sum(map(len, answer)) for answer in answers]
        words = self._joined([piece for answer in answers for piece in answer])
        return self._sent(all_to_all(words, incoming, outgoing, self.spreads[0].group), incoming)

    def _sent(self, words: Tensor, sizes: list[int]) -> Sent:
        return Sent(words, sizes, False) if self.overlaps else Sent(wait(words), sizes, True)

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32, device=self.device)

    def _answer(self, updates: Sequence[Update | None], target: int) -> list[Tensor]:
        pieces: list[Tensor] = []
        for k, (update, spread) in enumerate(zip(updates, self.spreads, strict=True)):
            rect = spread.rects[target]
            if update is not None and self._answered(k, target):
                start, length = (rect.row, rect.rows) if self.by_row[k] else (rect.col, rect.cols)
                extra = [update.finite[:, None], update.factor.narrow(1, start, length)]
                extra += [] if update.variance is None else [update.variance.narrow(1, start, length)]
                x = update.x[:, rect.row : rect.row + rect.rows, rect.col : rect.col + rect.cols]
                pieces += [_words(x), _words(torch.cat([v.to(self.wide) for v in extra], 1))]
        return pieces

    def _answer_size(self, k: int, n: int) -> int:
        rank = self.spreads[k].rank
        if not n or not self._answered(k, rank):
            return 0
        extra_size = 1 + self._along(k, rank) * (1 + self.normalize)
        return _size(self.dtype, n * self.spreads[k].here.size) + _size(self.wide, n * extra_size)

    def receive_back(self, sent: Sent) -> list[Update | None]:
        """This rank's parts of the updates of all matrices, by group; ``None`` where it holds nothing."""
        readers = sent.by_rank()
        found: list[Update | None] = [None] * len(self.spreads)
        for k, spread in enumerate(self.spreads):
            if not self._answered(k, spread.rank):
                continue
            rect, along = spread.here, self._along(k, spread.rank)
            pieces: list[tuple[Tensor, Tensor]] = []
            for owner, reader in enumerate(readers):
                n = spread.counts[owner]
                if n:
                    x = reader.next(self.dtype, n, rect.rows, rect.cols)
                    pieces.append((x, reader.next(self.wide, n, 1 + along * (1 + self.normalize))))
            x, extra = (_cat(list(parts), 0) for parts in zip(*pieces, strict=True))
            variance = extra[:, 1 + along :] if self.normalize else None
            found[k] = Update(x, extra[:, 1 : 1 + along], variance, extra[:, 0] > 0)
        return found


class _Reader:
    """Takes apart what `_words` made."""

    def __init__(self, words: Tensor) -> None:
        self.words, self.at = words, 0

    def next(self, dtype: torch.dtype, *shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        if numel == 0:
            return self.words.new_empty(shape, dtype=dtype)
        start, self.at = self.at, self.at + _size(dtype, numel)
        return self.words[start : self.at].view(dtype)[:numel].view(shape)


def _words(x: Tensor) -> Tensor:
    """The bits of a tensor, filled up to 8 bytes: no copy on the way may touch a NaN, and every backend knows int32."""
    if x.numel() == 0:
        return x.new_empty(0, dtype=torch.int32)
    x = x.reshape(-1).contiguous()
    fill = _size(x.dtype, len(x)) * 4 // x.element_size() - len(x)
    return (torch.nn.functional.pad(x, (0, fill)) if fill else x).view(torch.int32)


def _size(dtype: torch.dtype, numel: int) -> int:
    return -(-numel * dtype.itemsize // 8) * 2


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
