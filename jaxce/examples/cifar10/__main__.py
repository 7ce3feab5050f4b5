"""``python -m jaxce.examples.cifar10``"""

import sys

from jaxce.examples.cifar10.training import main

if __name__ == "__main__":
    sys.exit(main())
