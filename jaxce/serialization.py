"""Arguments and results of exported functions: `jax.export` has to know what it cannot look into."""

from __future__ import annotations

import contextlib
from typing import Any

import jax.export


def serializable(record: type[tuple[Any, ...]]) -> None:
    """Lets a named tuple of arrays go through `jax.export`.

    Records are named tuples, since these alone need no word to Flax, Orbax and pickle, whichever is imported first.
    """
    with contextlib.suppress(ValueError):  # a module that is loaded again finds its name taken by the first
        jax.export.register_namedtuple_serialization(record, serialized_name=f"jaxce.{record.__name__}")
