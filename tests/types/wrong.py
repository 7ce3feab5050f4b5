"""Calls that a type checker must not accept: the lines that say so, and no other. Never run."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

logits, labels = jnp.zeros((4, 10)), np.zeros(4, np.int32)
hidden, kernel = jnp.zeros((4, 8)), jnp.zeros((8, 10))
shape = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)

jaxce.softmax_cross_entropy(logits, labels, label_smothing=0.1)  # wrong: a typo
jaxce.softmax_cross_entropy(logits, labels, reduction="average")  # wrong: no such reduction
jaxce.softmax_cross_entropy(logits, labels, implementation="pallas")  # wrong: nor implementation
jaxce.softmax_cross_entropy(logits, [0, 1])  # wrong: lists are not arrays
jaxce.softmax_cross_entropy(logits, labels, mode="store")  # wrong: an option of the linear loss
jaxce.softmax_cross_entropy(shape, labels)  # wrong: nothing to compute with
jaxce.softmax_cross_entropy(logits, labels, return_aux=True).mean()  # wrong: a tuple
print(jaxce.softmax_cross_entropy(logits, labels)[1].entropy)  # wrong: no tuple
jaxce.softmax_cross_entropy(logits, labels, ignore_index=1.5)  # wrong: not an int
jaxce.softmax_cross_entropy_with_integer_labels(logits, jaxce.SparseTargets(labels, logits))  # wrong: not labels
jaxce.cross_entropy_from_probs(logits, labels, z_loss=0.1)  # wrong: there are no logits
jaxce.distillation_loss(logits, logits, divergence="kl")  # wrong: no such divergence
jaxce.distillation_loss(logits, logits, beta=logits)  # wrong: a constant of the program
jaxce.linear_cross_entropy(hidden, labels)  # wrong: no kernel
jaxce.linear_cross_entropy(hidden, kernel, labels, mode="stored")  # wrong: no such mode
jaxce.linear_cross_entropy(hidden, kernel, labels, vocab_axis=2)  # wrong: no such axis
jaxce.linear_cross_entropy(hidden, kernel, labels, labels=labels)  # wrong: only the dense loss has optax's name
jaxce.linear_cross_entropy(hidden, shape, labels)  # wrong: nothing to compute with
jaxce.log_probs(logits, labels, label_smoothing=0.1)  # wrong: there are no targets to smooth
jaxce.linear_log_probs(hidden, kernel, labels, mode="store")  # wrong: no number per token
jaxce.plan_linear_cross_entropy(shape, shape, labels, platform="metal")  # wrong: no such platform
jaxce.plan_linear_cross_entropy(shape, shape, labels, budget=2**20)  # wrong: no such option
jaxce.tune_linear_cross_entropy(shape, shape, labels, seconds="10")  # wrong: not a number
