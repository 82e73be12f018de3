"""What each rank of `zeroaccel launch` runs: the user's script as `__main__`, with one account of a failure.

An uncaught exception of the rank that raises first is printed as Python prints it; those of other ranks, most of
them consequences ("connection closed by peer"), are only noted. Notes lie in torchelastic's error files.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import TracebackType

_OWN_FRAMES = (__file__, runpy.__file__, "<frozen runpy>")
_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> None:
    """Runs `[-m] script arguments...`."""
    _die_with_launcher()
    sys.excepthook = _report
    module = argv[0] == "-m"
    script, *arguments = argv[1:] if module else argv
    sys.argv = [script, *arguments]
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            path = os.path.abspath(script)
            if not getattr(sys.flags, "safe_path", False):
                sys.path[0] = os.path.dirname(os.path.realpath(path))
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            _note(f"sys.exit({stop.code!r})", "", stop.code if isinstance(stop.code, int) else 1)
        raise


def _die_with_launcher() -> None:
    """A launcher killed with SIGKILL cannot end its ranks: let the kernel do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FRAMES:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(kind, error, trace))
    summary = traceback.format_exception_only(kind, error)[-1].strip().splitlines()[0][:200]
    first = _note(summary, text, status=1)
    if first and not issubclass(kind, KeyboardInterrupt):  # Ctrl-C: the launcher says so
        sys.stderr.write(text)  # torch puts "[rank1]: " before each line once there is a process group
        sys.stderr.flush()


def _note(summary: str, text: str, status: int) -> bool:
    """Writes this rank's error file; says whether no rank of this node did so before."""
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    now = time.time_ns()
    details = {"py_callstack": text, "timestamp": str(now // 10**9)}
    report = {"message": {"message": summary, "extraInfo": details}, "time_ns": now, "status": status}
    with open(f"{path}.part", "w") as file:
        json.dump(report, file)
    os.replace(file.name, path)  # the launcher ends this rank at any moment, and cannot read half a file
    try:
        claim = os.path.join(os.path.dirname(os.path.dirname(path)), "first_failure")
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
