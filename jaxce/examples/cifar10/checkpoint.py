"""Checkpoints of the CIFAR-10 example, each a file that tells by its digest whether it is what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
from flax import nnx, serialization
from rich.console import Console

from jaxce.examples.common import UsageError, make_folder

KEPT = 2
DIGEST_BYTES = hashlib.sha256().digest_size


class Checkpoints:
    """The newest two of a run: model, optimizer, and the record of how it came about.

    No random state has to be kept beside them. The record holds the seed and the epoch, the
    optimizer holds the step, and every random number of a run is drawn from these three.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "checkpoint"
        self._own: list[Path] = []  # those of an earlier run go when there is something to replace them

    def save(self, step: int, modules: tuple[nnx.Pytree, ...], record: dict[str, Any]) -> None:
        """Write one, then delete those before the last two. ``record`` holds numbers, text, lists and dicts."""
        make_folder(self.folder)
        content = serialization.msgpack_serialize({"modules": _by_name(nnx.state(modules)), "record": record})
        partial = self.folder / "partial"
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        self._own.append(partial.replace(self.folder / f"step-{step:07}"))
        for old in set(self.folder.glob("step-*")).difference(self._own[-KEPT:]):
            old.unlink()

    def load(self, console: Console) -> dict[str, Any]:
        """The modules and the record of the newest that is whole; damaged ones are named and passed over."""
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError as problem:
                console.print(f"{path} cannot be read: {problem.strerror}.", style="yellow")
                continue
            if hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]:
                self._own = [path]
                saved: dict[str, Any] = serialization.msgpack_restore(content[DIGEST_BYTES:])
                return saved
            console.print(f"{path} is damaged: it is not what was written there.", style="yellow")
        raise UsageError(
            f"--resume: expected a checkpoint in {self.folder}, found "
            + (
                "none that is whole. Run without --resume to start again."
                if paths
                else "none. Run without --resume first, or name the --output-dir of that run."
            )
        )


def restore(modules: tuple[nnx.Pytree, ...], saved: dict[str, Any]) -> None:
    """Give modules built under the same settings the values they had."""
    state = nnx.state(modules)
    named = _by_name(state)
    arrays = saved["modules"]
    if {name: x.shape for name, x in named.items()} != {name: x.shape for name, x in arrays.items()}:
        raise UsageError(
            "--resume: expected a checkpoint of this network, found one of another, of another version of jaxce. "
            "Run without --resume to start again, or name another --output-dir."
        )
    nnx.update(modules, jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in named]))


def _by_name(state: nnx.State[Any, Any]) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
