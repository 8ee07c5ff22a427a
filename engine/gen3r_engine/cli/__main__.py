"""``python -m gen3r_engine.cli run --help``: the same as ``gen3r-engine run --help``."""

import sys

from gen3r_engine.cli import main

sys.exit(main())
