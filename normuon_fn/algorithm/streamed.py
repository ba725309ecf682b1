"""A bucket whose momentums are in host memory: they pass through the device in pieces.

    piece 1: arrives, momentum, gathered, leaves  \\
    piece 2: arrives, momentum, gathered, leaves   > one stack -> Newton-Schulz -> normalize
    piece 3: arrives, momentum, gathered, leaves  /                    |
                                                     pieces 4, 5, 6 arrive, and 1, 2, 3 leave

The stacks are those of a bucket whose momentums are on the device, and so are the bits. See
ops/staging.py for what copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import Measures
from .bucket import MatrixWork
from .momentum import MOMENTUM, SCALE
from .updates import Front
from .work import Context, MatrixKind, Members, Runs, Stack


class Conveyor:
    """The pieces of all buckets of a step, in the order in which they pass through the device."""

    def __init__(self, size: int, slots: int, device: torch.device) -> None:
        self.size, self.slots, self.device = size, slots, device  # size: bytes of a slot
        self.pieces: list[list[Tensor]] = []  # in host memory
        self.staged: list[list[Tensor]] = []  # of those that have started
        self.after: Tensor | None = None  # an update that is to be there before the next piece

    def add(self, host: list[Tensor]) -> int:
        """The number of a piece. All are added before the first is taken."""
        self.pieces.append(host)
        return len(self.pieces) - 1

    def take(self, number: int) -> list[Tensor]:
        """The piece on the device. Those that have a slot by now are on their way."""
        host = self.pieces[number]
        ahead = self.slots if ops.is_handle(host) else 1  # other lists are there at once
        for k in range(len(self.staged), min(number + ahead, len(self.pieces))):
            self.staged.append(ops.staging.start(self.pieces[k], self.device, k % self.slots))
        after, self.after = self.after, None
        ops.staging.arrived(self.staged[number], number % self.slots, after)
        return self.staged[number]

    def leave(self, number: int, host: list[Tensor]) -> None:
        """Writes what the piece has become into lists of the host."""
        ops.staging.leave(host, self.staged[number], number % self.slots)
        self.staged[number] = []  # the memory of what was no slot is free

    def end(self) -> None:
        """All pieces have left by what comes after."""
        if self.staged:
            ops.staging.join(self.pieces[0])


class Piece(NamedTuple):
    """Some matrices of one group, which pass through the device together."""

    members: Members[MatrixKind]
    matrices: slice  # which of the bucket's these are
    host: bool  # whether their momentums are in host memory


class StreamedWork(MatrixWork):
    """A bucket of one device of whose momentums some are in host memory."""

    def __init__(
        self,
        stack: Stack,
        groups: list[Members[MatrixKind]],
        runs: Runs,
        context: Context,
        chunks: Sequence[int],
        pieces: Sequence[Sequence[Piece]],  # by group
        conveyor: Conveyor,
    ) -> None:
        super().__init__(stack, groups, runs, context, chunks)
        self.conveyor = conveyor
        self.measures: list[Measures] = []
        self.norms_of_pieces: list[Tensor] = []
        coded = context.stages.momentum.coded
        self.kept = [MOMENTUM.name, *([SCALE.name] if coded else [])]
        # What is read on the device is written in place there: it is a copy of the state.
        self.staging = context._replace(operators=context.operators._replace(in_place=True))
        self.pieces = [[(piece, self._number(piece)) for piece in each] for each in pieces]

    def _number(self, piece: Piece) -> int | None:
        """Its place on the conveyor; None: its momentums are on the device."""
        if not piece.host:
            return None
        return self.conveyor.add(ops.chained([piece.members.read(name) for name in self.kept]))

    def advance(self) -> None:
        """Nothing before the matrices are orthogonalized: their momentums are on their way."""

    def orthogonalize(self) -> None:
        start = 0
        for count in self.chunks:
            part = slice(start, start + count)
            found = [self._gathered(*each) for pieces in self.pieces[part] for each in pieces]
            self.update(self.groups[part], torch.cat(found) if len(found) > 1 else found[0])
            if self.updates:  # with a guard they wait; the next momentums come after their products
                self.conveyor.after = self.updates[-1].update
            start += count
        if not self.groups:
            return
        measures = Measures(*(torch.cat(each) for each in zip(*self.measures, strict=True)))
        self.front = Front(self.groups, self.sizes, [], [], measures)
        if self.norms_of_pieces:
            self.norms.front = torch.cat(self.norms_of_pieces, -1)

    def _gathered(self, piece: Piece, number: int | None) -> Tensor:
        """The matrices of a piece at norm 1, with their new momentums."""
        if number is None:
            return self.to_norm_1(self._advanced_piece(piece, None))
        front = self._advanced_piece(piece, self.conveyor.take(number))
        stack = self.to_norm_1(front)
        places = [piece.members.places(name) for name in self.kept]
        self.conveyor.leave(number, ops.chained(places))
        return stack

    def _advanced_piece(self, piece: Piece, staged: list[Tensor] | None) -> Front:
        members, n = piece.members, piece.members.tensors
        read = (
            [members.read(name) for name in self.kept]
            if staged is None
            else [staged[k * n : (k + 1) * n] for k in range(len(self.kept))]
        )
        scales = read[1] if len(read) > 1 else None
        context = self.context if staged is None else self.staging
        grads, beta = members.read("grad"), ops.part_of(context.hyper.momentum, piece.matrices)
        given = read[0], grads, beta, self.hold, [n], self._rule
        if context.config.metrics:
            found, norms = ops.measured.advance(context.operators, *given, scales)
            self.norms_of_pieces.append(norms)
        else:
            found = context.operators.advance(*given, scales)
        if staged is None:
            members.put(MOMENTUM.name, found.momentums)
            if found.scales is not None:
                members.put(SCALE.name, found.scales)
        self.measures.append(found.measures)
        return Front(
            [members], [n], found.momentums, grads, found.measures, found.stacks,
            piece.matrices, found.scales,
        )  # fmt: skip
