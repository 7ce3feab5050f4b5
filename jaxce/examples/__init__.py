"""Complete programs that train with jaxce. Their needs: ``pip install "jaxce[examples]"``."""
