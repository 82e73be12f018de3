"""Signals to the launcher end the ranks: within seconds, wherever the launcher is, and with nobody left behind.

torch's launcher does so by an exception from its signal handler. This leaves holes: a second Ctrl-C interrupts the
clean-up of the first one; while it waits for other machines, inside C++, no handler runs at all; ranks that are stuck
in a collective do not notice SIGINT; what a rank started lives on when the rank is gone. So a thread watches.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil
from torch.distributed.elastic.multiprocessing import api

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Seconds that ranks have to end by themselves after a signal, and the signal that they get next. After SIGTERM there
# is time to save a checkpoint, and some is left of the 30 s that SLURM and Kubernetes give.
_AFTER_CTRL_C = ((5.0, signal.SIGTERM), (5.0, signal.SIGKILL))
_AFTER_OTHERS = ((25.0, signal.SIGKILL),)
_GRACE = 1.0  # seconds that the launcher has, or what is left behind of a rank
_OVER = 0  # what the watching thread hears at the end


class Ending:
    """The signal that ends a run.

    Args:
        log_dir: folder of the ranks' logs.

    Attributes:
        signal: it, once it came.
        ranks: process ids of the ranks at that time.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self.signal: signal.Signals | None = None
        self.ranks: set[int] = set()
        self._ended = False
        # `nohup`, or a shell that started us in the background, wants these ignored; torch would handle them.
        self._ignored = {number for number in _HANDLED if signal.getsignal(number) is signal.SIG_IGN}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            SignalException: at the first signal; torch's launcher then ends the ranks.
        """
        if signum in self._ignored or self.signal is not None:
            return
        self.signal = signal.Signals(signum)
        if self._ended:
            return
        self.ranks = set(_children())
        raise api.SignalException(f"the launcher got {self.signal.name}", self.signal)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside the block signals are handled, and watched until `run_has_ended`."""
        before = {number: signal.getsignal(number) for number in _HANDLED}
        torchs = api._terminate_process_handler
        api._terminate_process_handler = self.handle
        # The interpreter writes there at once, even while the main thread is in C++ and handlers have to wait.
        wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher.start()
        # The watcher takes it. Ranks inherit that it waits, until they can tell it (launch_rank.py).
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in set(_HANDLED) - self._ignored:
                signal.signal(number, self.handle)
            yield
        finally:
            self.run_has_ended()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            api._terminate_process_handler = torchs
            os.close(self._reader)
            os.close(self._writer)

    def run_has_ended(self) -> None:
        """From now on no signal interrupts what is left to do."""
        self._ended = True
        os.write(self._writer, bytes([_OVER]))
        self._watcher.join()

    def _heard(self, seconds: float | None) -> int | None:
        """The next signal's number, or `_OVER`; None: not within so many seconds."""
        while select.select([self._reader], [], [], seconds)[0]:
            number = os.read(self._reader, 1)[0]
            if number == _OVER or (number in _HANDLED and number not in self._ignored):
                return number
        return None

    def _watch(self) -> None:
        """Sees to it that the first signal ends the ranks in time, and a second one at once."""
        first = self._heard(None)
        if first in (None, _OVER):
            return
        name = signal.Signals(first).name
        heard = self._heard(_GRACE)
        if heard is None and _children():
            _say(f"{name}, waiting for the ranks to end (once more: kill them)")
        for seconds, number in _AFTER_CTRL_C if first == signal.SIGINT else _AFTER_OTHERS:
            if heard is not None or not _children():
                break
            heard = self._heard(seconds)
            if heard is None:
                _signal(_children(), number)
        while heard != _OVER:
            _signal(_children(), signal.SIGKILL)
            heard = self._heard(_GRACE)
            if heard is None:
                self._leave(name, 128 + first)

    def _leave(self, name: str, status: int) -> NoReturn:
        """Ends a launcher whose main thread does not come back."""
        with suppress(OSError):
            os.rmdir(self._log_dir)  # empty before the ranks are started
        _say(f"{name}, all ranks were ended")
        os._exit(status)


def end_groups(groups: set[int]) -> None:
    """Ends all processes of these process groups: each rank has one, with all that it starts and does not detach."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in _members(groups):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        limit = time.monotonic() + _GRACE
        while _members(groups):
            if time.monotonic() > limit:
                break
            time.sleep(0.05)
        else:
            return


def _members(groups: set[int]) -> list[psutil.Process]:
    """Those that live: one that has ended can stay listed for long where nobody asks for its status."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _children() -> list[int]:
    """Process ids of the ranks: the launcher starts nothing else meanwhile."""
    return [process.pid for process in psutil.Process().children()]


def _signal(ranks: list[int], number: int) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, number)


def _say(line: str) -> None:
    print(f"zeroaccel launch: {line}", file=sys.stderr, flush=True)
