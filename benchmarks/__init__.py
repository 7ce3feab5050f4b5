"""jaxce measured beside optax: `python -m benchmarks dense`."""
