"""The example that is interrupted goes on with the next step, on other ranks and another stage, in one curve."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zeroaccel.checkpoint import PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "resume_and_track.py"
EPOCHS, STEPS = 4, 5  # of an epoch on two ranks


def command(folder: Path, ranks: int, stage: int) -> list[str]:
    launch = [sys.executable, "-m", "zeroaccel", "launch", "--cpu", "--num_processes", str(ranks)]
    options = ["--project_dir", str(folder), "--num_epochs", str(EPOCHS), "--max_samples", "320"]
    return [*launch, "--zero_stage", str(stage), str(SCRIPT), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def steps(folder: Path) -> list[int]:
    found = EventAccumulator(str(folder / "sentence_pairs"))
    found.Reload()
    return [event.step for event in found.Scalars("loss")] if "loss" in found.Tags()["scalars"] else []


def interrupt(folder: Path, number: signal.Signals, after: int) -> int:
    """Starts the example on two ranks, ends it after so many steps: by a signal to the launcher, or SIGKILL to ranks.

    Returns:
        The launcher's exit status.
    """
    log = folder / "log"
    with log.open("w") as out:
        run = subprocess.Popen(command(folder, 2, 2), cwd=ROOT, env=environment(), stdout=out, stderr=out)
        limit = time.monotonic() + 240
        while not (folder / "sentence_pairs").exists() or len(steps(folder)) < after:
            assert time.monotonic() < limit
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
        launcher = psutil.Process(run.pid)
        for process in launcher.children() if number == signal.SIGKILL else [launcher]:
            process.send_signal(number)
        return run.wait(timeout=60)


# The signal, steps before it, and the exit status.
SIGTERM = (signal.SIGTERM, 2, PREEMPTED)  # the first `should_checkpoint` is behind it
SIGKILL = (signal.SIGKILL, STEPS + 2, 128 + signal.SIGKILL)


@pytest.mark.parametrize("end", [SIGTERM, pytest.param(SIGKILL, marks=pytest.mark.full)], ids=["SIGTERM", "SIGKILL"])
def test_an_interrupted_run_goes_on_on_one_rank_and_another_stage_in_one_curve(
    end: tuple[signal.Signals, int, int], tmp_path: Path
) -> None:
    number, after, status = end
    assert interrupt(tmp_path, number, after) == status
    drawn = len(steps(tmp_path))
    assert after <= drawn < EPOCHS * STEPS
    rest = subprocess.run(
        command(tmp_path, 1, 3), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert rest.returncode == 0, rest.stdout + rest.stderr
    (found,) = re.findall(r"going on in epoch (\d+) after step (\d+)", rest.stdout)
    epoch, done = map(int, found)
    if number == signal.SIGTERM:
        assert done == drawn
        assert epoch == 1 + (done - 1) // STEPS
    else:
        assert done % STEPS == 0, "the last checkpoint ends an epoch"
        assert epoch == 1 + done // STEPS
    (last,) = map(int, re.findall(r"done after step (\d+)", rest.stdout))
    assert last == done + 2 * (EPOCHS * STEPS - done), "one rank takes the rest of the samples alone"
    assert steps(tmp_path) == list(range(1, last + 1)), "none is missing, none is there twice"
