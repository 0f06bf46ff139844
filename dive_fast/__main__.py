"""``python -m dive_fast`` is ``dive-fast``."""

import sys

from dive_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
