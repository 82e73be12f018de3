"""`python -m zeroaccel`: the same as the command `zeroaccel`."""

from __future__ import annotations

import sys

from zeroaccel.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
