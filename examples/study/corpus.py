"""The text of the training studies: the Python source of well-known packages, in tokens.

The vocabulary is trained on the same text.

    # 1 minute on 2 cores; wants the dev extra
    python -m examples.study.corpus --out runs/corpus.npz

Every ``.py`` file below 200 kB of the packages below as installed, each text once, in an order that
their hashes give: every 40th file is for validation. Larger files are tables of numbers. The
vocabulary (byte-level BPE) is trained on the training files. What came out is named by a SHA-256:
another version of a package, torch among them, is another corpus. So install with constraints.txt,
in an environment of its own if need be, and copy the file to where you train. Files that are nearly
alike may lie on both sides of the split.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("torch", "sympy", "scipy", "scikit-learn", "numpy", "matplotlib", "networkx")
MODULES = {"scikit-learn": "sklearn"}
LARGEST = 200_000  # bytes
HELD_OUT = 40  # of so many files one is for validation
END = "<|end|>"  # behind every file


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # [tokens] int32
    val: Tensor
    about: dict[str, object]

    @staticmethod
    def load(file: Path) -> Corpus:
        with np.load(file, allow_pickle=False) as kept:
            train, val = (
                torch.from_numpy(kept[name].astype(np.int32)) for name in ("train", "val")
            )
            about = json.loads(str(kept["about"]))
        digest = _digest(train.numpy().astype(np.uint16), val.numpy().astype(np.uint16))
        if digest != about["sha256"]:
            raise ValueError(
                f"{file}: its tokens have the SHA-256 {digest}, it says {about['sha256']}; "
                "make it again"
            )
        return Corpus(train, val, about)

    @property
    def vocabulary(self) -> int:
        return int(str(self.about["vocabulary"]))

    def __str__(self) -> str:
        about = self.about
        return (
            f"{about['megabytes']} MB of Python source ({about['packages']}), "
            f"{about['vocabulary']} tokens of byte-level BPE "
            f"(tokenizers {about['tokenizers']}): "
            f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate; "
            f"SHA-256 {str(about['sha256'])[:16]}"
        )


def files_of(packages: list[str]) -> list[tuple[str, str]]:
    """The hash and the text of every file, each text once, in the order of the hashes."""
    found: dict[str, str] = {}
    for package in packages:
        spec = importlib.util.find_spec(MODULES.get(package, package))
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{package}: not an installed package; pip install -e '.[dev]' has all that is "
                "wanted here"
            )
        for file in Path(spec.submodule_search_locations[0]).rglob("*.py"):
            content = file.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if 0 < len(content) < LARGEST:
                found[hashlib.sha256(content).hexdigest()] = text
    return sorted(found.items())


def make(packages: list[str], vocabulary: int, file: Path) -> Corpus:
    from tokenizers import ByteLevelBPETokenizer  # comes with transformers

    found = files_of(packages)
    val = [text for k, (_, text) in enumerate(found) if k % HELD_OUT == HELD_OUT - 1]
    train = [text for k, (_, text) in enumerate(found) if k % HELD_OUT != HELD_OUT - 1]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        train, vocab_size=vocabulary, special_tokens=[END], show_progress=False
    )
    if tokenizer.get_vocab_size() > np.iinfo(np.uint16).max + 1:
        raise ValueError(f"vocabulary: expected at most 65536, got {vocabulary}")
    encoded = [
        np.fromiter(
            (
                i
                for item in tokenizer.encode_batch([text + END for text in texts])
                for i in item.ids
            ),
            np.uint16,
        )
        for texts in (train, val)
    ]
    about = {
        "packages": ", ".join(
            f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in packages
        ),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "files": len(found),
        "megabytes": round(sum(len(text.encode()) for _, text in found) / 1e6, 1),
        "vocabulary": vocabulary,
        "sha256": _digest(*encoded),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, train=encoded[0], val=encoded[1], about=np.array(json.dumps(about)))
    return Corpus.load(file)


def _digest(*tokens: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in tokens:
        digest.update(part.tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("runs") / "corpus.npz")
    args = parser.parse_args()
    print(make(args.packages, args.vocabulary, args.out))


if __name__ == "__main__":
    main()
