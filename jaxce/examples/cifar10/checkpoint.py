"""Checkpoints of the CIFAR-10 example, with Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx


class Checkpoint:
    """The newest checkpoint of a run: model, optimizer, and the record of how it came about.

    No random state has to be kept beside them. The record holds the seed and the epoch, the
    optimizer holds the step, and every random number of a run is drawn from these three.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = (output_dir / "checkpoint").resolve()  # Orbax takes absolute paths only
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    @property
    def epoch(self) -> int | None:
        """The last epoch of the run so far, None if there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, epoch: int, modules: Any, record: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the one before. ``record`` is anything JSON can hold."""
        if self.epoch is not None and self.epoch >= epoch:
            # Those of an earlier run, given up only now that there is something to replace them.
            for old in self._manager.all_steps():
                self._manager.delete(old)
        contents = ocp.args.Composite(
            modules=ocp.args.StandardSave(nnx.state(modules)), record=ocp.args.JsonSave(record)
        )
        self._manager.save(epoch, args=contents)

    def record(self) -> dict[str, Any]:
        return self._restore(record=ocp.args.JsonRestore()).record

    def restore(self, modules: Any) -> None:
        """Give modules built under the same settings the values they had."""
        like = ocp.args.StandardRestore(nnx.state(modules))
        nnx.update(modules, self._restore(modules=like).modules)

    def _restore(self, **contents: Any) -> Any:
        return self._manager.restore(self.epoch, args=ocp.args.Composite(**contents))
