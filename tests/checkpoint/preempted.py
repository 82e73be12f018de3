"""`preempted.py FOLDER STEPS`: trains, says each step's loss, and leaves when it is told to; resumes where it was.

Run by tests/checkpoint/test_preemption.py under `zeroaccel launch`; each rank writes a file, `losses<rank>`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.checkpoint.resume import Run, Training  # noqa: E402
from zeroaccel.checkpoint import PREEMPTED  # noqa: E402
from zeroaccel.utils import ProjectConfiguration  # noqa: E402


def main(folder: str, steps: int) -> None:
    """Trains up to so many steps in all."""
    project = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True)
    training = Training(Run(2), project_config=project)
    accelerator = training.accelerator
    if accelerator.newest_checkpoint() is not None:
        accelerator.load_state()
        training.step = training.count.value
    with open(os.path.join(folder, f"losses{accelerator.process_index}"), "a", encoding="utf-8") as file:
        while training.step < steps:
            if accelerator.should_checkpoint():
                accelerator.save_state()
                accelerator.end_training()
                sys.exit(PREEMPTED)
            ((loss, _),) = training.train(1)
            print(training.step, loss, file=file, flush=True)
            time.sleep(float(os.environ.get("PAUSE", "0")))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
