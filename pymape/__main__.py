"""`python -m pymape` is the `pymape` command."""

import sys

from pymape.cli import main

sys.exit(main())
