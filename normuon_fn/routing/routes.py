"""What a route is, how sure one is, and the table of a model's routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast, get_args

from ..types import Config, DecayForm
from ..types.other_names import with_hints

Algorithm = Literal["normuon", "adamw", "frozen"]
Certainty = Literal["certain", "likely", "untold"]
NO_GRADIENT = "requires_grad=False"  # the reason why a parameter is frozen
_RULES, _MULTIPLIERS = get_args(Algorithm), ("lr_mul", "wd_mul")
_OPTIONS = ("weight_decay_form", "cautious_update")  # of matrices


class _DefaultWord(str):
    """An argument that was not written. It equals one that was; copies of a route keep it."""

    def __repr__(self) -> str:
        return f"<default {str(self)!r}>"


class _DefaultNumber(float):
    """As `_DefaultWord`, for a number."""

    def __repr__(self) -> str:
        return f"<default {float(self)!r}>"


_NORMUON, _ONE = cast(Algorithm, _DefaultWord("normuon")), _DefaultNumber(1.0)


@dataclass(frozen=True)
class Route:
    """What one parameter gets.

    ``Route(lr_mul=0.5)``, with ``lr_mul``, ``wd_mul``, ``weight_decay_form`` or
    ``cautious_update`` and nothing else, changes these alone: the parameter keeps the rule, the
    splits and the heads that it has without this route, and what is not written. What is written
    replaces what was there; it does not multiply it. Any other route, ``Route()`` and
    ``Route("normuon", lr_mul=0.5)`` too, decides all. A list of routes (`foreach_step_`) has no
    other rule: multipliers alone mean NorMuon there.

    Args:
        algorithm: ``"normuon"`` (the default), ``"adamw"``, or ``"frozen"`` (never changed, no
            state).
        lr_mul, wd_mul: multiply the learning rate and the weight decay.
        flatten: a tensor [o, i, ...] is the matrix [o, i * ...] (convolutions) instead of a stack
            of its last two dimensions; ``splits`` and ``heads`` cut its outputs o, or with
            ``dim=1`` its inputs i.
        splits: sizes along ``dim`` of projections fused in one matrix; each gets the update that a
            parameter of its own would get.
        heads: the number of equal matrices along ``dim``; with ``splits``, one number for all
            splits or one per split.
        dim: the dimension of ``splits`` and ``heads``: 0 (rows) or 1 (columns). A stack can have
            ``splits``, but not ``heads``.
        transposed: the rows are the inputs and the columns the outputs, as in the Conv1D of GPT-2:
            wherever the rule tells them apart (variance, scale), they change places. ``dim`` counts
            as the tensor is stored.
        weight_decay_form, cautious_update: as in `Config`, for these matrices; ``None``: the
            Config's. They say nothing about a parameter that AdamW updates; an entry of ``routes``
            that matches no matrix must not have them.
        unfrozen: for ``"frozen"``: the route in a plan of a tensor that requires a gradient. Routes
            that differ in it alone are equal.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, or that has no meaning for the
            algorithm.
    """

    algorithm: Algorithm = _NORMUON
    lr_mul: float = _ONE
    wd_mul: float = _ONE
    flatten: bool = False
    heads: int | Sequence[int] | None = None
    splits: Sequence[int] | None = None
    dim: int = 0
    transposed: bool = False
    weight_decay_form: DecayForm | None = None
    cautious_update: bool | None = None
    unfrozen: Route | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.algorithm not in _RULES:
            raise ValueError(f"Route.algorithm: expected one of {_RULES}, got {self.algorithm!r}")
        for name in _MULTIPLIERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Route.{name}: expected a number, got {value!r}")
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"Route.{name}: expected a finite number >= 0, got {value!r}")
        for name in ("heads", "splits"):
            value = getattr(self, name)
            sizes = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
            if name == "splits" and value is not None and not isinstance(value, (tuple, list)):
                raise TypeError(f"Route.splits: expected a tuple of sizes, got {value!r}")
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or (
                value is not None and not sizes
            ):
                raise ValueError(f"Route.{name}: expected ints >= 1, got {value!r}")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.dim not in (0, 1):
            raise ValueError(f"Route.dim: expected 0 or 1, got {self.dim!r}")
        if self.algorithm != "normuon" and (
            self.flatten or self.heads is not None or self.splits is not None or self.transposed
        ):
            raise ValueError(
                f"Route: flatten, heads and splits are for 'normuon', not for {self.algorithm!r}"
            )
        self._check_options()
        self._check_read()
        if self.unfrozen is not None and (
            self.algorithm != "frozen" or not isinstance(self.unfrozen, Route)
        ):
            raise ValueError(
                "Route.unfrozen: expected a Route, for 'frozen' alone, got "
                f"{self.unfrozen!r} for {self.algorithm!r}"
            )
        parts = self.flatten, self.heads, self.splits, self.dim, self.transposed
        if not isinstance(self.algorithm, _DefaultWord) or any(parts) or not self._written():
            self._decide()

    def _check_options(self) -> None:
        if self.weight_decay_form not in (None, *get_args(DecayForm)):
            raise ValueError(
                f"Route.weight_decay_form: expected None or one of {get_args(DecayForm)}, got "
                f"{self.weight_decay_form!r}"
            )
        if self.cautious_update not in (None, True, False):
            raise TypeError(
                f"Route.cautious_update: expected None or a bool, got {self.cautious_update!r}"
            )
        if self.algorithm != "normuon" and any(getattr(self, x) is not None for x in _OPTIONS):
            raise ValueError(
                f"Route: {' and '.join(_OPTIONS)} are for matrices ('normuon'), not for "
                f"{self.algorithm!r}; leave them out"
            )

    def _check_read(self) -> None:
        """Refuses what another field leaves without effect."""
        if self.dim != 0 and self.heads is None and self.splits is None:
            raise ValueError(
                f"Route.dim: {self.dim} has no effect without heads and splits, whose dimension it "
                "is; write one of them, or leave it out"
            )
        for name in _MULTIPLIERS:
            if self.algorithm == "frozen" and getattr(self, name) != 1.0:
                raise ValueError(
                    f"Route.{name}: {getattr(self, name)!r} has no effect on what is 'frozen'; "
                    "leave it out"
                )
        if self.wd_mul not in (0.0, 1.0) and self.weight_decay_form == "hyperball":
            raise ValueError(
                f"Route.wd_mul: {self.wd_mul!r} has no effect: nothing decays with "
                "weight_decay_form='hyperball'; leave it out"
            )

    @property
    def has_options(self) -> bool:
        """Whether it has something that matrices alone have."""
        return any(getattr(self, name) is not None for name in _OPTIONS)

    @property
    def is_of_matrices(self) -> bool:
        """Whether it makes a matrix of its parameter, now or from when it is unfrozen."""
        return (self.unfrozen or self).algorithm == "normuon"

    def of_matrices(self, config: Config) -> tuple[DecayForm, bool]:
        """The weight decay form of these matrices, and whether their updates are cautious."""
        decay, cautious = self.weight_decay_form, self.cautious_update
        return (
            config.weight_decay_form if decay is None else decay,
            config.cautious_update if cautious is None else cautious,
        )

    def _decide(self) -> None:
        """From here on no field tells a default from what was written."""
        object.__setattr__(self, "_stated", frozenset(self._written()))
        object.__setattr__(self, "algorithm", str(self.algorithm))
        for name in _MULTIPLIERS:
            if isinstance(getattr(self, name), _DefaultNumber):
                object.__setattr__(self, name, 1.0)

    def _written(self) -> dict[str, Any]:
        """The multipliers and options that are written."""
        found = {name: getattr(self, name) for name in (*_MULTIPLIERS, *_OPTIONS)}
        return {
            k: x for k, x in found.items() if x is not None and not isinstance(x, _DefaultNumber)
        }

    def adds_to(self, routes: Iterable[Route]) -> bool:
        """Whether it has a multiplier that none of ``routes`` writes, of what is stepped."""
        found = {name for name in self._written() if name in _MULTIPLIERS}
        for route in routes:
            if route.algorithm == "frozen":
                return False
            found -= route._stated_fields
        return bool(found)

    def agrees_with(self, routes: Sequence[Route]) -> bool:
        """Whether its multipliers are what ``routes``, of which the first counts, give already."""
        return all(
            value == next((getattr(r, name) for r in routes if name in r._stated_fields), 1.0)
            for name, value in self._written().items()
            if name in _MULTIPLIERS
        )

    def contradicts(self, other: Route) -> bool:
        """Whether both decide a rule, or both write a multiplier, and not the same."""
        if self.decides and other.decides:
            return self != other
        both = self._stated_fields & other._stated_fields
        return any(getattr(self, name) != getattr(other, name) for name in both)

    @property
    def _stated_fields(self) -> frozenset[str]:
        found: frozenset[str] = getattr(self, "_stated", frozenset(self._written()))
        return found

    @property
    def decides(self) -> bool:
        """Whether it decides the rule; ``False``: it changes multipliers alone."""
        return not isinstance(self.algorithm, _DefaultWord)

    def over(self, base: Route) -> Route:
        """This route, or ``base`` with its multipliers where it has multipliers alone.

        A frozen route has them from when it is unfrozen.
        """
        if self.decides:
            return self
        if base.algorithm == "frozen":
            later = base.unfrozen
            return base if later is None else replace(base, unfrozen=self.over(later))
        written = self._written()
        if base.algorithm != "normuon":
            written = {name: x for name, x in written.items() if name not in _OPTIONS}
        return replace(base, **written)

    @property
    def own_forms(self) -> list[str]:
        """In few words, what is not as `Config` has it."""
        words = [] if self.weight_decay_form is None else [f"decay {self.weight_decay_form}"]
        if self.cautious_update is not None:
            words.append("cautious" if self.cautious_update else "not cautious")
        return words

    def __str__(self) -> str:
        """In few words, for a table."""
        words: list[str] = [self.algorithm] if self.decides else []
        if self.unfrozen is not None:
            words.append(f"(then {self.unfrozen})")
        words += [
            f"{word}={value:g}"
            for word, value in (("lr*", self.lr_mul), ("wd*", self.wd_mul))
            if value != 1.0 or not (self.decides or isinstance(value, _DefaultNumber))
        ]
        words += [
            word for word, on in (("flatten", self.flatten), ("transposed", self.transposed)) if on
        ]
        words += self.own_forms
        along = "rows" if self.dim == 0 else "columns"
        if self.splits is not None:
            words.append(f"splits {'+'.join(map(str, self.splits))} of {along}")
        if self.heads is not None:
            counts = self.heads if isinstance(self.heads, tuple) else (self.heads,)
            words.append(
                f"heads {'+'.join(map(str, counts))}{'' if self.splits else f' of {along}'}"
            )
        return " ".join(words)


Route.__init__ = with_hints(Route.__init__)  # type: ignore[method-assign]


class Decision(NamedTuple):
    """What was decided for a parameter, why, and how sure that is.

    ``certain`` is done without a word. ``likely`` is done and said once. ``untold``: what is known
    fits both rules; one is taken and said once.
    """

    route: Route
    reason: str
    certainty: Certainty = "certain"

    def over(self, base: Decision) -> Decision:
        """As `Route.over`. A rule that was not asked for is as sure as it was."""
        if self.route.decides:
            return self
        return Decision(
            self.route.over(base.route), f"{base.reason}; {self.reason}", base.certainty
        )
