"""``python -m jaxce.examples.language_model``"""

import sys

from jaxce.examples.language_model.training import main

if __name__ == "__main__":
    sys.exit(main())
