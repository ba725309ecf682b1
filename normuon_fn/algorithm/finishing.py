"""The end of an update, for options that need numbers of whole matrices; each costs nothing if off.

    entries     every entry is divided by the root of a variance of its own (AdaMuon)
    cautious    entries whose sign is against the gradient's are left out
    floor       a row, or the matrix, moves by no less than a share of its own size
    hyperball   the matrix keeps its Frobenius norm

A shard has a part of a matrix only. So each of them begins with sums over what is local (`begin`),
the ranks add these up in one message for all of a bucket, and each ends with the totals (`end`).

Sums are in float64, in which no square of a float32 overflows, and none that counts is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..types import Config
from .normalize import INVERSE_ROOTS, NORMALIZERS, normalizer_of, scaled
from .updates import Update, wide_parameters
from .work import MatrixKind


class Needs(NamedTuple):
    """Which of these options the matrices of a group have: static."""

    entries: bool
    cautious: bool
    floor: bool
    hyperball: bool


class Begun(NamedTuple):
    """An update of which the local part is known, and sums over it."""

    update: Update
    direction: Tensor  # [n, rows, cols], of which the update will be a multiple
    states: tuple[Tensor, ...]
    # float64, each [n, 1], or [n, outputs] where the floor is per row
    sums: dict[str, Tensor]


def needs_of(kind: MatrixKind, config: Config) -> Needs:
    entries = NORMALIZERS[normalizer_of(config)].of_entries
    return Needs(entries, kind.cautious_update, config.update_floor > 0, kind.decay == "hyperball")


def sums_of(needs: Needs, config: Config, outputs: int) -> dict[str, int]:
    """By name, how many sums per matrix `begin` makes."""
    each = outputs if config.update_floor_per == "row" and needs.floor else 1
    found = {"o": 1, "divided": 1} if needs.entries else {}
    found |= {"kept": 1} if needs.cautious else {}
    found |= {"moved": each, "size": each} if needs.floor or needs.hyperball else {}
    return found | ({"along": 1} if needs.hyperball else {})


def begun(updates: Sequence[Update], config: Config) -> dict[int, Begun]:
    """Those that need it and have a part on this rank, by their place."""
    found: dict[int, Begun] = {}
    for k, update in enumerate(updates):
        needs = needs_of(update.group.kind, config)
        if any(needs) and update.group.local:
            found[k] = begin(update, needs, ops.per_matrix(update.group.rates.hyper.beta2), config)
    return found


def begin(update: Update, needs: Needs, beta2: Tensor, config: Config) -> Begun:
    group, wide = update.group, update.factor.dtype
    direction, states = update.update.to(wide) * update.factor, update.new
    sums: dict[str, Tensor] = {}
    if needs.entries:
        (old,), squares = update.old, direction.square()
        variance = old.to(wide) * beta2 + squares * (1 - beta2)
        states, whole = (variance,), variance.isfinite().all((-2, -1)).unsqueeze(1)
        # 1 / sqrt(inf) is a finite 0: such an entry would be dead for good.
        sums["o"] = torch.where(whole, _total(squares), float("nan"))
        direction = direction * INVERSE_ROOTS[config.eps_form if config.eps else "none"](
            variance, config.eps
        )
        sums["divided"] = _total(direction.square())
    if needs.cautious:  # by signs: a product of tiny numbers would underflow
        kept = direction.sign() * ops.stack(group.read("grad")).to(wide).sign() >= 0
        direction = torch.where(kept, direction, 0.0)
        sums["kept"] = _total(kept.to(wide))
    if needs.floor or needs.hyperball:
        parameters, per_row = wide_parameters(group, wide), config.update_floor_per == "row"
        axis = (-2 if group.kind.transposed else -1) if needs.floor and per_row else (-2, -1)
        sums["moved"] = direction.double().square().sum(axis).reshape(len(direction), -1)
        sums["size"] = parameters.double().square().sum(axis).reshape(len(direction), -1)
        if needs.hyperball:
            sums["along"] = _total(parameters.double() * direction)
    return Begun(update, direction, states, sums)


def end(begun: Begun, totals: dict[str, Tensor], lr: Tensor, config: Config) -> Update:
    """The update that enters the step: ``-lr * factor * update``, and a decay of its own."""
    update, kind, wide = begun.update, begun.update.group.kind, begun.direction.dtype
    needs = needs_of(kind, config)
    finite = update.finite
    for each in totals.values():
        finite = finite & each.isfinite().all(1)
    factor, decay = torch.ones_like(begun.direction[:, :1, :1], dtype=torch.float64), None
    total = {name: x.unsqueeze(-1) for name, x in totals.items()}
    if needs.entries:
        norms = total["o"].sqrt(), total["divided"].sqrt()
        factor = scaled(factor, *norms, config, kind.rows, kind.cols, kind.transposed)
    # arXiv 2411.16085, Algorithm 2: about as much in all as without the mask. Its authors' code
    # (kyleliang919/C-Optim, c_muon.py) counts u g > 0 and multiplies by d / max(k, d / 1000): the
    # same but for exact zeros, which do not move there, and for 1 beside k. Here an entry without a
    # gradient (a dead input) goes on with its momentum, as it does without caution.
    if needs.cautious:
        factor = factor * (kind.rows * kind.cols / (total["kept"] + 1.0))
    if needs.floor:
        moved = total["moved"].sqrt() * factor
        least = total["size"].sqrt() * config.update_floor
        longer = least / moved
        # What is too short for a number of the parameter's width is as good as no update.
        raises = (moved > 0) & (moved < least) & (longer < torch.finfo(wide).max)
        factor = factor * torch.where(raises, longer, 1.0)
        if config.update_floor_per == "row" and kind.transposed:
            factor = factor.mT
    if needs.hyperball:
        factor, decay = _on_the_sphere(total, ops.per_matrix(lr), 16 * torch.finfo(wide).eps)
        factor, decay = factor.to(wide), decay.flatten().to(wide)
        finite = finite & factor.flatten().isfinite() & decay.isfinite()
    n, rows, _ = begun.direction.shape
    factor = (factor if factor.shape[-1] > 1 else factor.expand(n, rows, 1)).to(wide)
    return update._replace(
        update=begun.direction, factor=factor, new=begun.states, finite=finite, decay=decay
    )


def _on_the_sphere(
    total: dict[str, Tensor],
    lr: Tensor,
    least: float,  # of a squared norm, as a share of that of W: shorter ones are rounding
) -> tuple[Tensor, Tensor]:
    """``(factor, decay)`` with which W (1 - decay) - lr factor D has the norm of W.

    With R = |W| and N = |D|: W <- R (W - lr R D / N) / |W - lr R D / N|, and this norm follows from
    <W, D>, R and N. A matrix of zeros, without an update, or that the step would make zero, stays
    as it is: there is no direction to take its norm in.
    """
    size, moved = total["size"].sqrt(), total["moved"].sqrt()
    both = (size > 0) & (moved > 0)
    cosine = torch.where(both, total["along"] / (size * moved), 0.0)
    grown = lr * lr - 2.0 * lr * cosine  # |W - lr R D / N|^2 = R^2 (1 + grown)
    both = both & ~(1.0 + grown <= least)  # NaN goes on, to the guard
    root = (1.0 + grown).sqrt()
    factor = torch.where(both, size / (moved * root), 0.0)
    # 1 - 1 / root without cancellation
    return factor, torch.where(both, grown / (root * (1.0 + root)), 0.0)


def _total(x: Tensor) -> Tensor:
    return x.sum((-2, -1), dtype=torch.float64).unsqueeze(1)
