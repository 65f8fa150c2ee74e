"""``python -m shuffle_batchnorm``: the command ``shuffle-batchnorm``."""

import sys

from .moco.cli import main

if __name__ == "__main__":
    sys.exit(main())
