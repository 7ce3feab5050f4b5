"""Train a convolutional network on CIFAR-10 with jaxce's loss."""
