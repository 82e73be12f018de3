"""What each rank of `zeroaccel launch` runs: the user's script as `__main__`, with one account of a failure.

An uncaught exception of the rank that raises first is printed as Python prints it; those of other ranks, most of
them consequences ("connection closed by peer"), are only noted. Notes lie in torchelastic's error files.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType

_PR_SET_PDEATHSIG = 1
_SUMMARY = 300  # characters of an exception that the launcher repeats


def main(argv: Sequence[str]) -> None:
    """Runs `[-m | --no_python] script arguments...`.

    Raises:
        SystemExit: the script's own, or one with status 1 (after Ctrl-C 130) after another exception.
    """
    _die_with_launcher()
    if "ZEROACCEL_CPU_AFFINITY" in os.environ:  # the launcher's word to us, environment.FIELDS["cpu_affinity"]
        _keep_to_own_cores()
    flag = argv[0] if argv[0] in ("-m", "--no_python") else None
    script, *arguments = argv[1:] if flag else argv
    if flag == "--no_python":
        _let_ctrl_c_in()
        _become(script, arguments)
    _note_crashes()
    sys.argv = [script, *arguments]
    try:
        _let_ctrl_c_in()
        _run(script, module=flag == "-m")
    except SystemExit as stop:
        _leave(stop)
    except KeyboardInterrupt:  # the launcher says so
        _note("KeyboardInterrupt", "", status=128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        _report(error)
        sys.exit(1)


def _let_ctrl_c_in() -> None:
    """Ends the wait that the launcher had us inherit: a traceback of Python's start tells nobody anything."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _become(program: str, arguments: list[str]) -> None:
    try:
        os.execvp(program, [program, *arguments])
    except OSError as error:
        sys.exit(f"zeroaccel launch: cannot run {program}: {error.strerror}")


def _run(script: str, module: bool) -> None:
    """Runs the script as `__main__`, and leaves it there: its threads and exit functions outlive it."""
    main, code = _load_module(script) if module else _load_file(script)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _load_file(script: str) -> tuple[ModuleType, CodeType]:
    """A file as `python FILE` takes it; a folder or zip file, as there, with its `__main__.py`."""
    path = os.path.abspath(script)
    spec = PathFinder.find_spec("__main__", [path])
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path)) if spec is None else path
    if spec is not None:
        return _load(spec)
    main = ModuleType("__main__")
    main.__file__ = path
    with open(path, "rb") as file:
        return main, compile(file.read(), path, "exec", dont_inherit=True)


def _load_module(name: str) -> tuple[ModuleType, CodeType]:
    """A module as `python -m NAME` takes it.

    Raises:
        ImportError: there is none, or none that can be run.
    """
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:  # a package
        name = f"{name}.__main__"
        spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"there is no module {name}")
    main, code = _load(spec)
    sys.argv[0] = str(main.__file__)
    return main, code


def _load(spec: ModuleSpec) -> tuple[ModuleType, CodeType]:
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    get_code = getattr(spec.loader, "get_code", None)  # zip files' loader calls itself no InspectLoader
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise ImportError(f"{spec.name} is no Python code: {spec.origin}")
    return main, code


def _die_with_launcher() -> None:
    """A launcher killed with SIGKILL cannot end its ranks: let the kernel do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _keep_to_own_cores() -> None:
    """Leaves this rank the cores that its launcher has, divided by the ranks; all of them where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
    os.sched_setaffinity(0, own or cores)


def _note_crashes() -> None:
    """Has the interpreter write down where its threads are when it crashes; the launcher shows it for one rank."""
    if not faulthandler.is_enabled():
        faulthandler.enable(open(_beside_error_file("stacks"), "w"))  # noqa: SIM115 - open as long as the rank lives


def _beside_error_file(name: str) -> str:
    return os.path.join(os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]), name)


def _leave(stop: SystemExit) -> None:
    """Ends as the script wants; what it says with `sys.exit("...")` is printed for one rank."""
    if stop.code is None or isinstance(stop.code, int):
        status = (stop.code or 0) & 0xFF  # what the system keeps of it
        if status:
            _note(f"sys.exit({stop.code!r})", "", status)
        sys.exit(status)
    if _note(f"sys.exit({stop.code!r})", "", status=1):
        print(stop.code, file=sys.stderr)
    sys.exit(1)


def _report(error: BaseException) -> None:
    """Notes an exception, and has it printed unless another rank of this machine noted one before."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    summary = next(line for line in lines if not line.startswith(" "))  # a syntax error's place comes first, notes last
    if _note(summary, "".join(traceback.format_exception(error)), status=1):
        sys.excepthook(type(error), error, trace)  # the script's own, or PyTorch's, which names the rank in each line
        sys.stderr.flush()


def _note(summary: str, text: str, status: int) -> bool:
    """Writes this rank's error file; says whether no rank of this machine did so before."""
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    summary = summary if len(summary) <= _SUMMARY else f"{summary[: _SUMMARY - 3]}..."
    now = time.time_ns()
    details = {"py_callstack": text, "timestamp": str(now // 10**9)}
    report = {"message": {"message": summary, "extraInfo": details}, "time_ns": now, "status": status}
    with open(f"{path}.part", "w") as file:
        json.dump(report, file)
    os.replace(file.name, path)  # the launcher ends this rank at any moment, and cannot read half a file
    try:
        os.close(os.open(_beside_error_file("../first_failure"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
