"""`python -m mpilm` is the command `mpilm`."""

import sys

from mpilm.cli import main

if __name__ == "__main__":
    sys.exit(main())
