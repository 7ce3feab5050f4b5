"""Train a convolutional network on CIFAR-10 with jaxce's loss.

    python -m jaxce.examples.cifar10                         past 75% in minutes on two cores
    python -m jaxce.examples.cifar10 --data-dir ~/data       CIFAR-10 that is on disk already
    python -m jaxce.examples.cifar10 --loss optax            the same curve with optax's loss
    python -m jaxce.examples.cifar10 --mixup 0.2 --label-smoothing 0.1
    python -m jaxce.examples.cifar10 --recipe full           92% in an hour or two
    python -m jaxce.examples.cifar10 --recipe full --resume  goes on where it was interrupted

CIFAR-10 (the official binary version, 162 MB) is downloaded when --data-dir does not hold it;
without a network the program trains on scikit-learn's digits instead. It prints a row per epoch
and, at the end, a report of what the loss on the test images means; it writes curves.png,
report.png, confusion.png, history.json, report.json and checkpoint/ to --output-dir.

Needs the extra: pip install "jaxce[examples]"
"""
