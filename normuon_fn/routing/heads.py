"""Which modules of a model are its output heads, which route tokens to experts, and how wide the model is."""

from __future__ import annotations

from torch import nn

from .projections import _first, _get, is_a, kind_of

_HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "classifier", "cls_head", "unembed", "unembedding", "embed_out"}
)
# These count where they are parts of the model itself: layers inside of blocks have such names too.
_LAYER_NAMES = frozenset(
    {"output", "out", "decoder", "logits", "score", "fc", "qa_outputs", "generator", "proj_out"}
)
_ROUTER_NAMES = frozenset({"gate", "router"})
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_experts",
    "num_routed_experts",
)
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim")


class Heads:
    """Found once for a model; `reason` then says of a module whether it is one."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(module): path for path, module in reversed(self.modules.items())}
        self.embeddings = {
            path: m for path, m in self.modules.items() if is_a(m, nn.Embedding, nn.EmbeddingBag)
        }
        self.widths = {_table(m)[1] for m in self.embeddings.values()}
        if not self.widths:
            width = _first([s for s in (_get(model, "config"), model) if s is not None], _WIDTHS)
            self.widths = set() if width is None else {width}
        self._found: dict[int, str] = {}
        self._say_the_models()
        self._by_name()
        self._by_vocabulary()

    def reason(self, module: nn.Module, leaf: str, shape: tuple[int, ...]) -> str | None:
        """Why a weight gets AdamW as an output head, or as one of logits over experts."""
        if leaf.startswith(("weight", "original")) and id(module) in self._found:
            return self._found[id(module)]
        parts = self.names.get(id(module), "").split(".")
        if len(shape) == 2 and _ROUTER_NAMES & set(parts[-2:]) and shape[0] == self._experts(parts):
            return f"router: logits of {shape[0]} experts"
        return None

    def _experts(self, parts: list[str]) -> int | None:
        """How many experts the nearest module has that says so, or that has a list or a stack of them."""
        for k in range(len(parts), -1, -1):
            owner = self.modules[".".join(parts[:k])]
            count = _first([s for s in (owner, _get(owner, "config")) if s is not None], _EXPERTS)
            if count is not None:
                return count
            experts = _get(owner, "experts")
            if isinstance(experts, nn.Module) and is_a(experts, nn.ModuleList):
                return len(list(experts.children()))
            if isinstance(experts, nn.Module):
                return next((p.shape[0] for p in experts.parameters() if p.ndim == 3), None)
        return None

    def _say_the_models(self) -> None:
        """Hugging Face models say it themselves."""
        for path, module in self.modules.items():
            ask = _get(module, "get_output_embeddings")
            if callable(ask):
                try:
                    found = ask()
                except Exception:  # it has none
                    continue
                if isinstance(found, nn.Module):
                    self._found.setdefault(
                        id(found),
                        f"output head, by get_output_embeddings() of {path or 'the model'}",
                    )

    def _by_name(self) -> None:
        said, top = bool(self._found), self._top()
        for path, module in self.modules.items():
            owner, _, name = path.rpartition(".")
            if self._repeated(path) or not (
                name in _HEAD_NAMES or (name in _LAYER_NAMES and owner == top)
            ):
                continue
            layers = [m for m in module.modules() if _is_layer(m)]
            itself = bool(layers) and layers[0] is module
            if layers and (itself if said or name in _LAYER_NAMES else True):
                self._found.setdefault(id(layers[-1]), "output head, by name")

    def _top(self) -> str:
        """The path of the model inside of what only wraps it: of the first module whose parameters are not all one child's."""
        path = ""
        while not any(p is not None for _, p in self.modules[path]._parameters.items()):
            children = self.modules[path].named_children()
            parts = [name for name, child in children if next(child.parameters(), None) is not None]
            if len(parts) != 1:
                break
            path = f"{path}.{parts[0]}" if path else parts[0]
        return path

    def _by_vocabulary(self) -> None:
        """A Linear behind the embedding of the most rows, that has its shape, outside of all repeated blocks."""
        if not self.embeddings:
            return
        path, largest = max(self.embeddings.items(), key=lambda entry: _table(entry[1])[0])
        shape = _table(largest)
        behind = list(self.modules)[list(self.modules).index(path) + 1 :]
        for other in behind:
            module = self.modules[other]
            if (
                _is_layer(module)
                and tuple(module.weight.shape) == shape
                and shape[0] != shape[1]
                and not self._repeated(other)
            ):
                self._found.setdefault(
                    id(module), f"output head: as many outputs as {path} has rows"
                )

    def _repeated(self, path: str) -> bool:
        """Whether it is one of many alike: in a list, or in a numbered place that is not of a head's own."""
        parts = path.split(".")
        for k in range(1, len(parts)):
            owner = self.modules[".".join(parts[:k])]
            if is_a(owner, nn.ModuleList, nn.ModuleDict):
                return True
            if is_a(owner, nn.Sequential) and parts[k - 1] not in _HEAD_NAMES:
                return True
        return False


def _is_layer(module: nn.Module) -> bool:
    weight = _get(module, "weight")
    return is_a(module, nn.modules.conv._ConvNd) or (
        "Linear" in kind_of(module) and isinstance(weight, nn.Parameter) and weight.ndim == 2
    )


def _table(embedding: nn.Module) -> tuple[int, int]:
    """How many rows of how many entries; a traced module has its weight alone."""
    rows, width = _get(embedding, "num_embeddings"), _get(embedding, "embedding_dim")
    return (rows, width) if rows and width else tuple(embedding.weight.shape)  # type: ignore[arg-type]
