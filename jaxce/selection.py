"""`jnp.where` without a jit of its own.

A loss has some thirty selects. As `jnp.where` each is a function that is traced, lowered and inlined again, which took
a tenth of the first call of a loss and its gradient.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def select(condition: Array, x: ArrayLike, y: ArrayLike) -> Array:
    """`x` where the condition holds and `y` elsewhere; they are broadcast, and their types promoted."""
    # Python numbers of two kinds stay of a weak type, as jnp.where leaves them.
    x, y = (jnp.asarray(float(a) if isinstance(a, int) and isinstance(b, float) else a) for a, b in ((x, y), (y, x)))
    dtype = jnp.result_type(x, y)
    arrays = condition, *(a if a.dtype == dtype else lax.convert_element_type(a, dtype) for a in (x, y))
    if not condition.shape == x.shape == y.shape:
        arrays = tuple(jnp.broadcast_arrays(*arrays))
    return lax.select(*arrays)
