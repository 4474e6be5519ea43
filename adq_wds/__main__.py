"""`python -m adq_wds` is `adq`."""

import sys

from adq_wds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
