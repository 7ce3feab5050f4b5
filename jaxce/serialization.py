"""Arguments and results of exported functions: `jax.export` has to know what it cannot look into."""

from __future__ import annotations

import contextlib

import jax.export


def serializable(record: type) -> None:
    """Lets a dataclass whose fields are all arrays, and which is a pytree already, go through `jax.export`."""
    with contextlib.suppress(ValueError):  # a module that is loaded again finds its name taken by the first
        jax.export.register_pytree_node_serialization(
            record,
            serialized_name=f"jaxce.{record.__name__}",
            serialize_auxdata=lambda _: b"",
            deserialize_auxdata=lambda _: (),
        )
