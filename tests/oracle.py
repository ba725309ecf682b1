"""The algorithm again, in numpy float64, one matrix at a time, written from the papers and the
peers' formulas.

Nothing here is imported from `normuon_fn`, and nothing here is meant to be fast: plain loops, one
formula a line. Sources: NorMuon (arXiv 2510.05491, algorithm 1), Polar Express (arXiv 2505.16932),
CANS (arXiv 2506.10935), cubic5 (arXiv 2606.00371), AdamW (arXiv 1711.05101); microsoft/dion
0a059a4, zichongli5/NorMuon d45c9a4, modded-nanogpt f411b3d3, NVIDIA Emerging-Optimizers fd77292 for
the published variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Row = tuple[float, float, float]

# --- coefficient sets ---

SIMPLE: list[Row] = [(3.4445, -4.7750, 2.0315)]  # Keller Jordan
QUINTIC: list[Row] = [  # You Jiacheng
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
POLAR_EXPRESS_BASE: list[Row] = [  # arXiv 2505.16932, before the safety factor
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
POLAR_EXPRESS_CUSHIONED: list[
    Row
] = [  # safety factor 1.02, cushion 2: dion, modded-nanogpt, nanochat
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
CANS: list[Row] = [  # arXiv 2506.10935
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
]
AOL: list[
    Row
] = [  # flash-newton-schulz, AOL-4: after the row rescale of arXiv 2208.03160, see aol_rescale
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
]
DEEPSEEKV4: list[Row] = SIMPLE * 8 + [(2.0, -1.5, 0.5)] * 2  # DeepSeek-V4 report
CUBIC5: list[Row] = [  # arXiv 2606.00371
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
]
TABLES: dict[str, list[Row]] = {
    "simple": SIMPLE,
    "quintic": QUINTIC,
    "you": QUINTIC,
    "polar_express_cushioned": POLAR_EXPRESS_CUSHIONED,
    "cans": CANS,
    "aol": AOL,
    "deepseekv4": DEEPSEEKV4,
    "cubic5": CUBIC5,
}
NORM_FACTOR = {"polar_express_cushioned": 1.02}  # the norm is multiplied by it; every other set: 1
REPEATS_LAST = (
    "polar_express",
    "polar_express_cushioned",
    "cans",
    "deepseekv4",
)  # every other set starts over


def polar_express(safety_factor: float) -> list[Row]:
    """The eight rows; p(x) becomes p(x / safety_factor).

    The last row is the fixed point and stays as it is.
    """
    s = safety_factor
    divided = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS_BASE[:-1]]
    return [*divided, POLAR_EXPRESS_BASE[-1]]


def schedule(name: str, steps: int, safety_factor: float = 1.01) -> list[Row]:
    """The rows that `steps` steps of a named set use, with what happens beyond the end of its
    table.
    """
    table = polar_express(safety_factor) if name == "polar_express" else TABLES[name]
    if name in REPEATS_LAST:
        return [table[min(t, len(table) - 1)] for t in range(steps)]
    return [table[t % len(table)] for t in range(steps)]


def slope(rows: Sequence[Row]) -> float:
    """The gain for tiny singular values: the product of the first coefficients."""
    return math.prod(a for a, _, _ in rows)


def polynomial(sigma: Matrix, rows: Sequence[Row]) -> Matrix:
    """What the schedule does to singular values."""
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


# --- orthogonalization ---


def aol_rescale(x: Matrix) -> Matrix:
    """Row i of the wide orientation times (sum_j |x_i . x_j|)^-1/2, which bounds the spectral norm
    by 1.
    """
    if x.shape[0] > x.shape[1]:
        return aol_rescale(x.T).T
    sums = np.abs(x @ x.T).sum(axis=1, keepdims=True)
    return np.where(sums > 0, x / np.sqrt(np.where(sums > 0, sums, 1.0)), 0.0)


def newton_schulz(
    x: Matrix, rows: Sequence[Row], norm_factor: float = 1.0, aol: bool = False
) -> Matrix:
    """X / (norm_factor |X|_F), or the AOL rescale, then X <- aX + (bA + cA^2)X with A = X X^T.

    Zero stays zero.
    """
    x = np.asarray(x, np.float64)
    amax = np.abs(x).max(initial=0.0)
    if amax == 0:
        return np.zeros_like(x)
    x = x / 2.0 ** math.floor(
        math.log2(amax)
    )  # exact, so that no square leaves the range of float64
    x = aol_rescale(x) if aol else x / (np.linalg.norm(x) * norm_factor)
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def spectral_map(x: Matrix, rows: Sequence[Row], norm_factor: float = 1.0) -> Matrix:
    """The same by singular values: U p(S / |S|) V^T. No iteration, so no accumulated rounding."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return (u * polynomial(s / (np.linalg.norm(s) * norm_factor), rows)) @ vt


def polar(x: Matrix) -> Matrix:
    """The exact polar factor U V^T."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


# --- the NorMuon update of one matrix ---


@dataclass
class Rule:
    """One NorMuon variant. The defaults are arXiv 2510.05491's, with the eps left out."""

    momentum_form: str = "ema"
    nesterov: bool = False
    reduction: str = "rows"
    normalize: bool = True
    renormalize: bool = True
    scale: str = "paper"
    rms: float = 0.2
    eps: float = 0.0
    eps_form: str = "add"
    precondition: str = "none"
    snap: bool = False
    weight_decay_form: str = "decoupled"
    weight_decay_lr_power: int = 1
    cautious_update: bool = False
    update_floor: float = 0.0
    update_floor_per: str = "row"
    rows: list[Row] = field(default_factory=lambda: schedule("polar_express", 5))
    norm_factor: float = 1.0
    orthogonalize: Callable[[Matrix], Matrix] | None = None


def momentum_step(rule: Rule, momentum: Matrix, grad: Matrix, beta: float) -> tuple[Matrix, Matrix]:
    """-> (new momentum, the matrix to orthogonalize)."""
    if rule.momentum_form == "ema":
        momentum = beta * momentum + (1 - beta) * grad
        return momentum, (1 - beta) * grad + beta * momentum if rule.nesterov else momentum
    momentum = beta * momentum + grad
    return momentum, grad + beta * momentum if rule.nesterov else momentum


def preconditioned(rule: Rule, x: Matrix) -> Matrix:
    if rule.precondition == "sign":
        return np.sign(x)
    if rule.precondition == "rows":
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return x


def normalize(rule: Rule, o: Matrix, variance: Matrix, beta2: float) -> tuple[Matrix, Matrix]:
    """-> (new variance, O divided by its root): one number per row, or per column of a wide matrix
    by "short".
    """
    m, n = o.shape
    if rule.reduction == "entries":
        variance = beta2 * variance + (1 - beta2) * o**2
        roots = (
            np.sqrt(variance) + rule.eps
            if rule.eps_form == "add"
            else np.sqrt(np.maximum(variance, rule.eps))
        )
        return variance, np.divide(o, roots, out=np.zeros_like(o), where=roots > 0)
    over_columns = rule.reduction == "rows" or m >= n
    variance = beta2 * variance + (1 - beta2) * (o**2).mean(
        axis=1 if over_columns else 0, keepdims=True
    )
    divided = np.zeros_like(o)
    for i in range(m):
        for j in range(n):
            v = variance[i, 0] if over_columns else variance[0, j]
            root = (
                math.sqrt(v) + rule.eps if rule.eps_form == "add" else math.sqrt(max(v, rule.eps))
            )
            divided[i, j] = o[i, j] / root if root > 0 else 0.0
    return variance, divided


def scaled(rule: Rule, o: Matrix, divided: Matrix) -> Matrix:
    """The update whose length the learning rate multiplies. m, n are the matrix's own, never the
    transposed ones.
    """
    m, n = o.shape
    size = np.linalg.norm(divided)
    if size == 0:
        return np.zeros_like(o)
    if rule.scale == "paper":
        return divided * (rule.rms * math.sqrt(m * n) / size)
    if rule.renormalize:
        divided = divided * (np.linalg.norm(o) / size)
    factor = {
        "spectral": math.sqrt(m / n),
        "rms": rule.rms * math.sqrt(max(m, n)),
        "muon": math.sqrt(max(1.0, m / n)),
        "none": 1.0,
    }[rule.scale]
    return divided * factor


def decayed(rule: Rule, w: Matrix, update: Matrix, lr: float, weight_decay: float) -> Matrix:
    rate = lr**rule.weight_decay_lr_power * weight_decay
    if rule.weight_decay_form == "hyperball":
        return w
    if rule.weight_decay_form == "cautious":
        return w * (1 - rate * (update * w >= 0))
    return w * (1 - rate)


def normuon_matrix(
    rule: Rule,
    w: Matrix,
    grad: Matrix,
    momentum: Matrix,
    variance: Matrix,
    *,
    lr: float,
    beta: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Matrix, Matrix, Matrix]:
    """One NorMuon step of one matrix -> (w, momentum, variance)."""
    momentum, direction = momentum_step(rule, momentum, grad, beta)
    orthogonalize = rule.orthogonalize or (lambda x: newton_schulz(x, rule.rows, rule.norm_factor))
    o = orthogonalize(preconditioned(rule, direction))
    if rule.snap and np.linalg.norm(o) > 0:
        o = o * (math.sqrt(min(o.shape)) / np.linalg.norm(o))
    divided = o
    if rule.normalize:
        variance, divided = normalize(rule, o, variance, beta2)
    update = scaled(rule, o, divided)
    if rule.cautious_update:  # arXiv 2411.16085, Algorithm 2
        mask = update * grad >= 0
        update = update * mask * (update.size / (mask.sum() + 1))
    if rule.update_floor:
        axis = 1 if rule.update_floor_per == "row" else None
        size = np.linalg.norm(update, axis=axis, keepdims=True)
        least = rule.update_floor * np.linalg.norm(w, axis=axis, keepdims=True)
        update = update * np.where((size > 0) & (size < least), least / np.maximum(size, 1e-300), 1)
    if rule.weight_decay_form == "hyperball":
        new = on_the_sphere(w, update, lr)
    else:
        new = decayed(rule, w, update, lr, weight_decay) - lr * update
    return new, momentum, variance


def on_the_sphere(w: Matrix, update: Matrix, lr: float) -> Matrix:
    """R norm(W - lr R norm(U)) with R = |W|: arXiv 2606.16899."""
    radius, size = np.linalg.norm(w), np.linalg.norm(update)
    if radius == 0 or size == 0:
        return w
    new = w - lr * radius / size * update
    return new * (radius / np.linalg.norm(new))


def adamw(
    w: Matrix,
    grad: Matrix,
    m: Matrix,
    v: Matrix,
    step: int,  # counted from 1
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Matrix, Matrix, Matrix]:
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    unbiased_m = m / (1 - beta1**step)
    unbiased_v = v / (1 - beta2**step)
    return w * (1 - lr * weight_decay) - lr * unbiased_m / (np.sqrt(unbiased_v) + eps), m, v


def lion(w, grad, m, *, lr, beta1, beta2, weight_decay):
    """arXiv 2302.06675, Algorithm 2 -> (w, m)."""
    update = np.sign(beta1 * m + (1 - beta1) * grad)
    return w - lr * (update + weight_decay * w), beta2 * m + (1 - beta2) * grad


# --- the published variants, each from its own code's formulas (nothing shared with Rule) ---


def _scale_to(x: Matrix, size: float, plus: float = 0.0, floor: float = 0.0) -> Matrix:
    return x * (size / max(np.linalg.norm(x) + plus, floor))


def peer_paper(w, g, m, v, lr, beta, beta2, wd, eps):  # algorithm 1
    m = beta * m + (1 - beta) * g
    o = newton_schulz(m, SIMPLE * 5)
    v = beta2 * v + (1 - beta2) * (o * o).mean(1, keepdims=True)
    o_hat = o / (np.sqrt(v) + eps)
    eta = 0.2 * lr * math.sqrt(o.size) / np.linalg.norm(o_hat)
    return w - lr * wd * w - eta * o_hat, m, v


def peer_author(w, g, m, v, lr, beta, beta2, wd, eps=1e-10):
    m = m + (1 - beta) * (g - m)
    direction = g + beta * (m - g)
    o = newton_schulz(direction, SIMPLE * 5)
    v = v + (1 - beta2) * ((o * o).mean(-1, keepdims=True) - v)
    o_hat = _scale_to(o / (np.sqrt(v) + eps), float(np.linalg.norm(o)), plus=1e-10)
    return w * (1 - lr * wd) - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o_hat, m, v


def peer_dion(w, g, m, v, lr, beta, beta2, wd, eps=1e-8):
    m = beta * m + g
    u = newton_schulz(m, POLAR_EXPRESS_CUSHIONED, norm_factor=1.02)
    v = v + (1 - beta2) * ((u * u).mean(-1, keepdims=True) - v)
    u_hat = _scale_to(u / (np.sqrt(v) + eps), float(np.linalg.norm(u)), floor=1e-8)
    return w * (1 - lr * wd) - lr * math.sqrt(w.shape[0] / w.shape[1]) * u_hat, m, v


def peer_modded_nanogpt(w, g, m, v, lr, beta, beta2, wd, eps=1e-10):
    m = m + (1 - beta) * (g - m)
    direction = g + beta * (m - g)
    o = newton_schulz(direction, POLAR_EXPRESS_CUSHIONED, norm_factor=1.02)
    axis = 1 if o.shape[0] >= o.shape[1] else 0
    v = v + (1 - beta2) * ((o * o).mean(axis, keepdims=True) - v)
    o_hat = _scale_to(o * np.maximum(v, eps) ** -0.5, float(np.linalg.norm(o)), floor=1e-10)
    u = max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o_hat
    return w - lr * lr * wd * w * (u * w >= 0) - lr * u, m, v


def peer_emerging_optimizers(w, g, m, v, lr, beta, beta2, wd, eps=1e-8):
    w = w - lr * wd * w
    m = m + (1 - beta) * (g - m)
    o = newton_schulz(m, QUINTIC)
    axis = 1 if o.shape[0] >= o.shape[1] else 0
    v = v + (1 - beta2) * ((o * o).mean(axis, keepdims=True) - v)
    o_hat = _scale_to(o * np.maximum(v, eps) ** -0.5, float(np.linalg.norm(o)), floor=1e-8)
    return w - lr * max(w.shape) ** 0.5 * o_hat, m, v


def peer_muon(w, g, m, v, lr, beta, beta2, wd):
    m = m + (1 - beta) * (g - m)
    o = newton_schulz(g + beta * (m - g), SIMPLE * 5)
    return w * (1 - lr * wd) - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o, m, v


def peer_muoneq(w, g, m, v, lr, beta, beta2, wd):
    m = m + (1 - beta) * (g - m)
    x = g + beta * (m - g)
    sizes = np.linalg.norm(x, axis=1, keepdims=True)
    o = newton_schulz(x / np.where(sizes > 0, sizes, 1.0), SIMPLE * 5)
    return w * (1 - lr * wd) - lr * 0.2 * max(w.shape) ** 0.5 * o, m, v


def peer_nanochat(w, g, m, v, lr, beta, beta2, wd, eps=1e-10):
    m = m + (1 - beta) * (g - m)
    x = g + beta * (m - g)
    sizes = np.linalg.norm(x, axis=1, keepdims=True)
    x = x * (np.linalg.norm(x) / x.shape[0] ** 0.5 / np.where(sizes > 0, sizes, 1.0))
    o = newton_schulz(x, POLAR_EXPRESS_CUSHIONED, norm_factor=1.02)
    if np.linalg.norm(o) > 0:
        o = _scale_to(o, min(o.shape) ** 0.5)
    axis = 1 if o.shape[0] >= o.shape[1] else 0
    v = v + (1 - beta2) * ((o * o).mean(axis, keepdims=True) - v)
    o_hat = _scale_to(o * np.maximum(v, eps) ** -0.5, float(np.linalg.norm(o)), floor=1e-10)
    u = max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o_hat
    return w - lr * wd * w * (u * w >= 0) - lr * u, m, v


def peer_adamuon(w, g, m, v, lr, beta, beta2, wd, eps=1e-8):
    m = m + (1 - beta) * (g - m)
    o = newton_schulz(np.sign(g + beta * (m - g)), SIMPLE * 5)
    v = beta2 * v + (1 - beta2) * o * o
    o_hat = o / (np.sqrt(v) + eps)
    return w * (1 - lr * wd) - lr * _scale_to(o_hat, 0.2 * o.size**0.5, floor=1e-300), m, v


def peer_hyperball(w, g, m, v, lr, beta, beta2, wd):
    m = m + (1 - beta) * (g - m)
    o = newton_schulz(g + beta * (m - g), SIMPLE * 5)
    return on_the_sphere(w, o, lr), m, v


PEERS = {
    "paper": peer_paper,
    "author": peer_author,
    "dion": peer_dion,
    "modded_nanogpt": peer_modded_nanogpt,
    "emerging_optimizers": peer_emerging_optimizers,
    "muon": peer_muon,
    "muoneq": peer_muoneq,
    "nanochat": peer_nanochat,
    "adamuon": peer_adamuon,
    "hyperball": peer_hyperball,
}

# --- the guard (DESIGN.md section 4) ---

# guard -> what went wrong -> which tensors of a skipped parameter keep their bits
GUARD_KEEPS: dict[str, dict[str, frozenset[str]]] = {
    "off": {"update": frozenset(), "gradient": frozenset()},
    "output": {
        "update": frozenset({"param", "variance"}),
        "gradient": frozenset({"param", "variance"}),
    },
    "full": {
        "update": frozenset({"param", "variance"}),
        "gradient": frozenset({"param", "variance", "momentum"}),
    },
}


def guard_skips(scope: str, bad: set[str], groups: Sequence[set[str]]) -> set[str]:
    """The parameters that keep their values: everything ("step"), or every group with a bad one in
    it ("bucket").
    """
    hit = [group for group in groups if group & bad]
    return set().union(*groups) if scope == "step" and hit else set().union(*hit)
