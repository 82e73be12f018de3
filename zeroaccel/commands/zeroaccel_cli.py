"""The command line under the path that Accelerate's has: `python -m zeroaccel.commands.zeroaccel_cli`."""

from __future__ import annotations

import sys

from zeroaccel.commands.main import main as main

if __name__ == "__main__":
    sys.exit(main())
