"""Keras's tests of its categorical cross-entropies: the losses, the metrics and the operations under them."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
from keras.src import backend, ops
from keras.src.losses import losses
from keras.src.metrics import probabilistic_metrics

import jaxce


def _loss(output, target, from_logits, axis, **options):
    if from_logits:
        return jaxce.softmax_cross_entropy(output, target, axis, **options)
    # Keras takes numbers of any sum for probabilities; jaxce leaves rescaling to its caller.
    return jaxce.cross_entropy_from_probs(output / output.sum(axis, keepdims=True), target, axis=axis, **options)


def _class_indices(target, output, axis):
    if target.ndim == output.ndim and target.shape[axis] == 1:
        target = target.squeeze(axis)
    return target.astype(jnp.int32)


def dense_operation(target, output, from_logits=False, axis=-1):
    return _loss(jnp.asarray(output), jnp.asarray(target), from_logits, axis)


def sparse_operation(target, output, from_logits=False, axis=-1):
    output = jnp.asarray(output)
    return _loss(output, _class_indices(jnp.asarray(target), output, axis), from_logits, axis)


def dense_loss(y_true, y_pred, from_logits=False, label_smoothing=0.0, axis=-1):
    y_pred = ops.convert_to_tensor(y_pred)
    return _loss(y_pred, ops.cast(y_true, y_pred.dtype), from_logits, axis, label_smoothing=label_smoothing)


def sparse_loss(y_true, y_pred, from_logits=False, ignore_class=None, axis=-1):
    y_pred = ops.convert_to_tensor(y_pred)
    labels = _class_indices(ops.convert_to_tensor(y_true), y_pred, axis)
    loss = _loss(y_pred, labels, from_logits, axis, ignore_index=ignore_class)
    if ignore_class is not None:
        backend.set_keras_mask(loss, mask=labels != ignore_class)  # what Keras's reduction divides by
    return loss


def install():
    backend.nn.categorical_crossentropy = dense_operation
    backend.nn.sparse_categorical_crossentropy = sparse_operation
    for module in (losses, probabilistic_metrics):
        module.categorical_crossentropy = dense_loss
        module.sparse_categorical_crossentropy = sparse_loss


def selected():
    return [
        "--pyargs",
        "keras.src.losses.losses_test::CategoricalCrossentropyTest",
        "keras.src.losses.losses_test::SparseCategoricalCrossentropyTest",
        "keras.src.metrics.probabilistic_metrics_test::CategoricalCrossentropyTest",
        "keras.src.metrics.probabilistic_metrics_test::SparseCategoricalCrossentropyTest",
        *(
            f"keras.src.ops.nn_test::{kind}::test_{name}categorical_crossentropy"
            for kind in ("NNOpsStaticShapeTest", "NNOpsCorrectnessTest")
            for name in ("", "sparse_")
        ),
    ]


def differences():
    any_axis = "DID NOT RAISE", "jaxce takes the classes on any axis; Keras refuses all but the last with JAX"
    words = '"must have the same shape" does not match "targets: expected shape', "the same error in jaxce's words"
    sparse = "losses_test.SparseCategoricalCrossentropyTest"
    return {
        "losses_test.CategoricalCrossentropyTest.test_shape_mismatch": words,
        f"{sparse}.test_binary_segmentation_different_axis": any_axis,
        f"{sparse}.test_multi_class_segmentation_different_axis": any_axis,
    }
