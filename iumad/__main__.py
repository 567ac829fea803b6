"""``python -m iumad`` is the same as the ``iumad`` command."""

import sys

from iumad.cli import main

sys.exit(main())
