"""JAX's class of primitives, from where it is loaded already.

`jax.extend.core`, its public place, comes with all of `jax.extend`, and that with Pallas: the import takes longer than
jaxce's own. For the same reason rules for what few programs use are registered when a primitive is first bound, which
is before any of JAX's interpreters can meet it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax import lax

if TYPE_CHECKING:
    from jax.extend.core import Primitive as Primitive
else:
    Primitive = type(lax.neg_p)
