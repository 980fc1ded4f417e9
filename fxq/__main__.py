"""`python -m fxq`, which is what `fxq` runs."""

import sys

from fxq.cli.main import main

sys.exit(main())
