"""`python -m diffrep` is the `diffrep` command."""

import sys

from diffrep.cli import main

sys.exit(main())
