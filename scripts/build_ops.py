"""Builds the C++ ops that DeepSpeed uses on CPU ranks, once, so that no training or test waits for a compiler.

Usage: python scripts/build_ops.py
"""

from __future__ import annotations

import os
import sys

from zeroaccel.errors import EnvironmentProblem

# The optimizers of configurations, with and without offload; NVMe.
OPS = ("cpu_adam", "cpu_adagrad", "fused_adam", "async_io")


def main() -> int:
    """Exit status 1 if an op cannot be built, with the reason."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from zeroaccel.engine import ops

    try:
        ops.build(OPS)
    except EnvironmentProblem as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
