"""Which modules of a model are its output heads, and how wide the model is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from torch import nn

from . import positions, words
from .attributes import (
    first,
    get,
    is_a,
    is_layer,
    kind_of,
    outputs_and_inputs,
    signature,
    sources_of,
)
from .routes import Certainty, Decision, Route
from .uses import unwrapped

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim")
# Attributes under which a module has a whole model, beside a copy of it or beside a loss.
_MODELS = re.compile(
    r"(^|_)(model|net|network|module|ema|teacher|student|target|online|shadow|averaged|policy|actor"
    r"|critic|generator|discriminator|gen|disc|backbone|momentum|swa|learner)(_|\d|$)|^net_?[A-Z](_|$)|^[GD](_|\d|$)"
)
_INNER = (
    "_orig_mod", "base_layer", "original_module", "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module", "_forward_module", "module",
)  # fmt: skip
_VIRTUAL = re.compile(r"Prompt(Encoder|Embedding)$|PrefixEncoder$")  # of virtual tokens
_PART = re.compile(r"^([qkv]_proj|query|key|value|up_proj|gate_proj|fc1)$")
_HEAD_CLASS = re.compile(r"(Prediction|Classification|LM|Output)Head$")


class Heads:
    """Found once for a model; `reason` then says why a module is one."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(module): path for path, module in reversed(self.modules.items())}
        self.embeddings = {
            path: m for path, m in self.modules.items() if is_a(m, nn.Embedding, nn.EmbeddingBag)
        }
        self.widths = {_table(m)[1] for m in self.embeddings.values()}
        if not self.widths:
            width = first(sources_of([model]), _WIDTHS)
            self.widths = set() if width is None else {width}
        self._found: dict[int, Decision] = {}
        self._doubted: dict[int, str] = {}  # matrices that may be heads, and why
        self._counts: dict[
            int, tuple[dict[str, tuple[object, ...]], Counter[tuple[object, ...]]]
        ] = {}
        self._said_by_the_models()
        self._by_name()
        self._by_vocabulary()
        self._by_position()
        self._asked: dict[int, bool] = {}  # by the id of a module

    def decide(self, module: nn.Module, leaf: str) -> Decision | None:
        """AdamW, for the weight of an output head."""
        return self._found.get(id(module)) if leaf.startswith(("weight", "original")) else None

    def doubted(self, module: nn.Module, leaf: str, found: Decision) -> Decision:
        """The decision for a layer's weight, untold where it may be an output head's."""
        why = self._doubted.get(id(module)) if leaf.startswith(("weight", "original")) else None
        route = found.route
        if why is None or route.algorithm != "normuon" or route.splits or route.heads:
            return found
        apart = ":" if found.reason.startswith("matrix") else ";"
        return Decision(route, f"{found.reason}{apart} {why}", "untold")

    def is_head(self, module: nn.Module) -> bool:
        known = self._asked.get(id(module))
        if known is None:
            known = any(id(layer) in self._found for layer in _layers_behind(module))
            self._asked[id(module)] = known
        return known

    def _mark(self, module: nn.Module, reason: str, certainty: Certainty = "certain") -> None:
        for layer in _layers_behind(module):
            self._found.setdefault(id(layer), Decision(Route("adamw"), reason, certainty))

    def _mark_by_name(self, path: str, layer: nn.Module, strength: words.Strength) -> None:
        """Marks a layer that its name, or that of ``path`` around it, calls a head; or says what
        speaks against it."""
        owner, _, name = path.rpartition(".")
        inner, strong = next(_layers_behind(layer), layer), strength == "strong"
        doubt = positions.against(name, inner, self.modules[owner], is_strong=strong)
        tables = map(_table, self.embeddings.values())
        if doubt is None or outputs_and_inputs(inner) in tables:
            self._mark(layer, "output head, by name")
        elif not doubt.is_matrix:
            self._mark(layer, f"output head, {doubt.reason}", "likely")
        elif id(layer) not in self._found:
            self._doubted |= {id(each): doubt.reason for each in _layers_behind(layer)}

    def _said_by_the_models(self) -> None:
        """Hugging Face models say it by get_output_embeddings(), timm's by get_classifier()."""
        for path, module in self.modules.items():
            for method in ("get_output_embeddings", "get_classifier"):
                ask = get(module, method)
                if not callable(ask):
                    continue
                try:
                    answer = ask()
                except Exception:  # the model has none
                    continue
                for found in answer if isinstance(answer, (tuple, list)) else (answer,):
                    if isinstance(found, nn.Module):
                        owner = path or "the model"
                        self._mark(found, f"output head, by {method}() of {owner}")

    def _by_name(self) -> None:
        said, tops = bool(self._found), {".".join(unwrapped(path)) for path in self._tops}
        for path, module in self.modules.items():
            owner, _, _ = path.rpartition(".")
            parts = unwrapped(path)
            if any(_VIRTUAL.match(kind_of(o)) for o in self._owners(path)):
                continue
            if not parts or path.endswith(f"modules_to_save.{parts[-1]}"):
                continue
            listed = parts[-1].isdigit() and len(parts) > 1
            listed = listed and is_a(self.modules[owner], nn.ModuleList)
            strength = words.head(parts[-2] if listed else parts[-1])
            if _HEAD_CLASS.search(kind_of(module)):
                strength = "strong"
            elif strength is None or self._repeated(path):
                continue
            if is_a(self.modules[owner], nn.MultiheadAttention):
                continue
            if strength == "weak" and ".".join(unwrapped(owner)) not in tops:
                continue
            layers = [m for m in module.modules() if is_layer(m)]
            if not layers:
                continue
            itself = layers[0] in list(_layers_behind(module))
            if listed and (itself or is_a(layers[-1], nn.modules.conv._ConvNd)):
                # One of several heads side by side, and not one of the layers of one head.
                side_by_side = self._alike(self.modules[owner], parts[-1]) > 1
                outputs, inputs = outputs_and_inputs(layers[-1])
                if not (itself and side_by_side and outputs != inputs):
                    continue
            if itself:
                if strength == "strong" or not self._is_between(layers[-1]):
                    self._mark_by_name(path, module, strength)
            elif strength == "strong" or (is_a(module, nn.Sequential) and not said):
                self._mark_last(path, layers, strength)

    def _owners(self, path: str) -> Iterator[nn.Module]:
        parts = path.split(".")
        return (self.modules[".".join(parts[:k])] for k in range(len(parts)))

    def _mark_last(self, path: str, layers: list[nn.Module], strength: words.Strength) -> None:
        """Of a head of several layers the last, unless one of them is called a head itself, or the
        last has the width of the model, or is a part of an attention."""
        inside = [p for p in self.modules if p.startswith(f"{path}.")]
        if any(words.head(p.rpartition(".")[2]) == "strong" for p in inside):
            return
        outputs, inputs = outputs_and_inputs(layers[-1])
        own = unwrapped(self.names[id(layers[-1])])[-1]
        attention = any("att" in part.lower() for p in inside for part in p.split("."))
        wide = outputs == inputs or (outputs in self.widths and 4 * outputs >= inputs)
        if not wide and not attention and not _PART.match(own):
            self._mark_by_name(path, layers[-1], strength)

    def _is_between(self, layer: nn.Module) -> bool:
        """Whether more layers take the same width in as this one puts out, behind it."""
        layers = [m for m in self.modules.values() if is_layer(m)]
        outputs, _ = outputs_and_inputs(layer)
        behind = layers[layers.index(layer) + 1 :]
        return any(outputs_and_inputs(other)[1] == outputs for other in behind[:1])

    @cached_property
    def _tops(self) -> set[str]:
        """The paths of the models proper: the model inside a wrapper, the attribute of a
        LightningModule, and a copy (EMA, teacher) beside it."""
        tops, queue = set(), [""]
        while queue:
            path = queue.pop()
            module = self.modules[path]
            tops.add(path)
            kids = [
                (name, child)
                for name, child in module.named_children()
                if next(child.parameters(), None) is not None
            ]
            own = any(p is not None for p in module._parameters.values())
            lightning = any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)
            for name, _ in kids:
                single = len(kids) == 1 and not own
                if single or lightning or _MODELS.search(name):
                    queue.append(f"{path}.{name}" if path else name)
        return tops

    def _by_vocabulary(self) -> None:
        """A layer behind the embedding of the most rows, with its shape, outside all blocks."""
        if not self.embeddings:
            return
        path, largest = max(self.embeddings.items(), key=lambda entry: _table(entry[1])[0])
        shape = _table(largest)
        behind = list(self.modules)[list(self.modules).index(path) + 1 :]
        for other in behind:
            module = self.modules[other]
            if (
                is_layer(module)
                and module.weight.ndim == 2
                and outputs_and_inputs(module) == shape
                and shape[0] != shape[1]
                and not self._repeated(other)
            ):
                self._mark(module, f"output head: as many outputs as {path} has rows")

    def _by_position(self) -> None:
        """The last layers of the models proper that no name calls heads, and of the networks in a
        list that is the model.

        What a model has inside that has a head itself is none.
        """
        ends = positions.Ends(self.modules.values())
        with_heads = {self._top_of(self.names[key]) for key in self._found}
        networks = self._networks()
        for top in sorted(self._tops | networks):
            around = {path for path in with_heads if not path or top.startswith(f"{path}.")}
            for layer in ends.of(self.modules[top]) if not around - {top} else ():
                path = self.names[id(layer)]
                owner = self.modules[path.rpartition(".")[0]]
                listed = top in networks or is_a(owner, *positions.CONTAINERS)
                if id(layer) not in self._found and (listed or not self._repeated(path)):
                    self._doubted.setdefault(id(layer), positions.LAST)

    def _networks(self) -> set[str]:
        """The paths of several networks that were put into a list or a dict to be one model."""
        model = self.modules[""]
        children = {
            name: m for name, m in model.named_children() if next(m.parameters(), None) is not None
        }
        layers = [sum(map(is_layer, child.modules())) for child in children.values()]
        is_list = is_a(model, *positions.CONTAINERS) and min(layers, default=0) > 1
        return {*children} if is_list else set()

    def _top_of(self, path: str) -> str:
        """The path of the nearest model proper around a module."""
        while path and path not in self._tops:
            path = path.rpartition(".")[0]
        return path

    def _repeated(self, path: str) -> bool:
        """Whether it belongs to one of many blocks: in a list, or a numbered place of a Sequential
        with others of its class, unless the list itself is called a head."""
        parts = path.split(".")
        for k in range(1, len(parts)):
            owner = self.modules[".".join(parts[:k])]
            if not is_a(owner, nn.ModuleList, nn.ModuleDict, nn.Sequential):
                continue
            if words.head(parts[k - 1]) == "strong":
                continue
            if is_a(owner, nn.ModuleList) and parts[k].isdigit():
                return True
            if parts[k].isdigit() and self._alike(owner, parts[k]) > 1:
                return True
        top = self.modules[""]
        return is_a(top, nn.Sequential) and parts[0].isdigit() and self._alike(top, parts[0]) > 1

    def _alike(self, owner: nn.Module, name: str) -> int:
        """How many children of a container have the class and the parameters' shapes of one."""
        if id(owner) not in self._counts:
            kinds = {key: signature(child) for key, child in owner.named_children()}
            self._counts[id(owner)] = kinds, Counter(kinds.values())
        kinds, counts = self._counts[id(owner)]
        return counts[kinds[name]] if name in kinds else 1


def _layers_behind(module: nn.Module) -> Iterator[nn.Module]:
    """The layer itself, or those that a wrapper has: the original and every adapter's copy."""
    if is_layer(module) and not isinstance(get(module, "base_layer"), nn.Module):
        yield module
        return
    for name in _INNER:
        inner = get(module, name)
        if isinstance(inner, nn.Module):
            yield from _layers_behind(inner)
    saved = get(module, "modules_to_save")
    if isinstance(saved, nn.ModuleDict):
        for copy in saved.values():
            yield from _layers_behind(copy)


def _table(embedding: nn.Module) -> tuple[int, int]:
    """How many rows of how many entries; a traced module has its weight alone."""
    rows, width = get(embedding, "num_embeddings"), get(embedding, "embedding_dim")
    shape = tuple(embedding.weight.shape)  # type: ignore[arg-type]
    return (rows, width) if rows and width else (shape[-2], shape[-1])
