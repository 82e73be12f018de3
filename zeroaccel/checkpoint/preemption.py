"""SIGTERM as a request: a run whose machine is taken away saves once more, and ends with a status that says so."""

from __future__ import annotations

import signal
from types import FrameType

from zeroaccel.state import PartialState
from zeroaccel.state.meeting import meet

# 143, as a shell shows a program that SIGTERM ended; SLURM, Kubernetes and their like take it as "start me again".
PREEMPTED = 128 + signal.SIGTERM


class Preemption:
    """Hears SIGTERM from the first question on; until then the signal ends the process, as ever."""

    def __init__(self) -> None:
        self._told = False
        self._listens = False

    def came(self) -> bool:
        """Whether any rank got a SIGTERM since its first question. Collective."""
        if not self._listens:
            self._listen()
        return meet(PartialState(), "accelerator.should_checkpoint()", flag=self._told)

    def _listen(self) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def hear(number: int, frame: FrameType | None) -> None:
            self._told = True
            if callable(before):  # the script's own
                before(number, frame)

        signal.signal(signal.SIGTERM, hear)
        self._listens = True
