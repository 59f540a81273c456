"""``python -m stem_attention.cli``: the command, where it is not installed."""

import sys

from stem_attention.cli import main

sys.exit(main())
