"""How many matrices of a bucket are orthogonalized at a time.

A stack of Newton-Schulz has temporaries of two to three times its own size, so a large bucket goes
through it in chunks, and each chunk finds the memory of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Block

# Bytes of a stack. 96 x 2048 x 2048 in bfloat16 is 768 MiB, and becomes two chunks, whose products
# still fill an H200 some thirty times over.
CHUNK = 2**29

Chunk = list[tuple[int, list[Block]]]  # the number of a group, and some of its blocks


def chunks(groups: Sequence[Sequence[Block]], most: int) -> list[Chunk]:
    """The blocks of all groups in order, ``most`` matrices at a time, about equally many.

    A block is never cut: a stack of more matrices than that, which is one parameter, is a chunk.
    """
    total = sum([block.count for blocks in groups for block in blocks])
    each = -(-total // -(-total // most)) if total else 0
    found: list[Chunk] = []
    room = 0
    for k, blocks in enumerate(groups):
        for block in blocks:
            if not found or block.count > room:
                found.append([])
                room = each
            if not found[-1] or found[-1][-1][0] != k:
                found[-1].append((k, []))
            found[-1][-1][1].append(block)
            room -= block.count
    return found
