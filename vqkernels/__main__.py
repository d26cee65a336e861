"""`python -m vqkernels`."""

import sys

from vqkernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
