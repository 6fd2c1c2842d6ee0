"""``python -m rkd_plugin`` is ``rkd``."""

import sys

from rkd_plugin.cli import main

sys.exit(main())
