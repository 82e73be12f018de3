"""Builds the C++ ops that DeepSpeed uses on CPU ranks, once, so that no training or test waits for a compiler.

A build that was killed leaves a lock file, and every later process waits for it in silence: it is removed first.
Usage: python scripts/build_ops.py
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

# The optimizers of configurations, with and without offload; NVMe.
OPS = ("CPUAdamBuilder", "CPUAdagradBuilder", "FusedAdamBuilder", "AsyncIOBuilder")


def main() -> int:
    """Exit status 1 if an op cannot be built, with the reason."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if shutil.which("ninja") is None or shutil.which("g++") is None:
        print("DeepSpeed's ops need a C++ compiler and ninja: apt install g++; pip install ninja", file=sys.stderr)
        return 1
    from deepspeed.accelerator import get_accelerator

    for op in OPS:
        builder = get_accelerator().create_op_builder(op)
        if not builder.is_compatible(verbose=True):
            package = "apt install libaio-dev" if builder.NAME == "async_io" else "see the lines above"
            print(f"{builder.NAME} cannot be built here: {package}", file=sys.stderr)
            return 1
        Path(_get_build_directory(builder.name, verbose=False), "lock").unlink(missing_ok=True)
        start = time.monotonic()
        builder.load(verbose=False)
        print(f"{builder.name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
