"""The example that is interrupted goes on with the next step, on other ranks and another stage, in one curve."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zeroaccel.checkpoint import PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "resume_and_track.py"
EPOCHS, STEPS = 8, 10  # of an epoch on two ranks


def command(folder: Path, ranks: int, stage: int) -> list[str]:
    launch = [sys.executable, "-m", "zeroaccel", "launch", "--cpu", "--num_processes", str(ranks)]
    options = ["--project_dir", str(folder), "--num_epochs", str(EPOCHS), "--max_samples", "640"]
    return [*launch, "--zero_stage", str(stage), str(SCRIPT), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def steps(folder: Path) -> list[int]:
    found = EventAccumulator(str(folder / "sentence_pairs"))
    found.Reload()
    return [event.step for event in found.Scalars("loss")] if "loss" in found.Tags()["scalars"] else []


def test_an_interrupted_run_goes_on_with_the_next_step_on_one_rank_and_another_stage(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        first = subprocess.Popen(command(tmp_path, 2, 2), cwd=ROOT, env=environment(), stdout=out, stderr=out)
        limit = time.monotonic() + 240
        while not (tmp_path / "sentence_pairs").exists() or not steps(tmp_path):
            assert time.monotonic() < limit
            assert first.poll() is None, log.read_text()
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == PREEMPTED, log.read_text()
    done = len(steps(tmp_path))
    assert 0 < done < EPOCHS * STEPS
    second = subprocess.run(
        command(tmp_path, 1, 3), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"going on in epoch {1 + done // STEPS} after step {done}" in second.stdout
    (last,) = re.findall(r"done after step (\d+)", second.stdout)
    assert steps(tmp_path) == list(range(1, int(last) + 1)), "none is missing, none is there twice"
    assert int(last) == done + 2 * (EPOCHS * STEPS - done), "one rank takes the rest of the samples alone"
