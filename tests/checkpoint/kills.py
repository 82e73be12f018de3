"""Two ranks that train and save for ever, and are killed while they save; the next two must go on from the newest.

Ranks are forked from a server that has imported everything, so an attempt takes a second or two.
`python -m tests.checkpoint.kills [--kills 100] [--seed 0]` is the long version.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.checkpoint.resume import Run, Training
from tests.distributed.pool import free_port

WORLD_SIZE = 2
HIDDEN = 500  # some megabytes a rank


def content(training: Training) -> int:
    """Checksum of all masters and optimizer states of this rank."""
    crc = 0
    for share in training.accelerator._contents().shares:
        for shard in share.trained:
            with shard.opened() as tensors:
                for kind in sorted(tensors):
                    for part in shard.slices:  # what fills up a partition's end is anything
                        crc = zlib.crc32(tensors[kind].narrow(0, part.offset, part.count).numpy().tobytes(), crc)
    return crc


def _rank(rank: int, port: int, connection: Any, stage: int, root: str, numbered: bool) -> None:
    """Loads the newest checkpoint, if there is one, then trains and saves until it is killed."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ZEROACCEL_USE_CPU="true",
    )
    output = os.open(os.path.join(root, f"output_{rank}.txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from zeroaccel.utils import ProjectConfiguration

    torch.set_num_threads(1)
    project = ProjectConfiguration(project_dir=root, automatic_checkpoint_naming=numbered, total_limit=2)
    training = Training(Run(stage, WORLD_SIZE, hidden=HIDDEN), project_config=project)
    folder = None if numbered else os.path.join(root, "checkpoint")
    if os.path.exists(os.path.join(root, "saved")):
        training.accelerator.load_state(folder)
        training.step = training.count.value
        connection.send(("loaded", training.step, content(training)))
    for _ in range(100):
        training.train(1)
        connection.send(("saving", training.step, content(training)))
        training.accelerator.save_state(folder)
        connection.send(("saved", training.step, 0))


@dataclass
class Torture:
    """Attempts on one folder.

    Attributes:
        root: of the checkpoints.
        stage: ZeRO stage.
        numbered: every save has a folder of its own; else all of them go into the same.
        seed: of the instants and the ranks that are killed.
    """

    root: str
    stage: int = 2
    numbered: bool = False
    seed: int = 0
    _contents: dict[tuple[int, int], int] = field(default_factory=dict)  # (rank, step) -> checksum
    _saved: int = 0
    _duration: float = 0.1

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.checkpoint.preload"])

    def attempt(self) -> str:
        """Starts two ranks, kills one while they save, and then the other.

        Returns:
            "old" or "new": what the ranks of the attempt before left is the checkpoint before the one that they were
            saving when one was killed, or that one; "first" at the beginning.
        """
        port, processes, ends = free_port(), [], []
        for rank in range(WORLD_SIZE):
            ours, theirs = self._context.Pipe()
            arguments = (rank, port, theirs, self.stage, self.root, self.numbered)
            process = self._context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        try:
            outcome = self._check_loaded(ends) if self._saved else "first"
            self._let_save(ends, count=self._random.randint(1, 2))
            time.sleep(self._random.uniform(0, 1.1 * self._duration))
            self._random.choice(processes).kill()
            return outcome
        finally:
            for process in processes:
                process.kill()
                process.join(10)

    def _receive(self, end: Connection) -> tuple[str, int, int]:
        assert end.poll(60), "a rank hangs"
        try:
            message: tuple[str, int, int] = end.recv()
        except EOFError:
            outputs = sorted(name for name in os.listdir(self.root) if name.startswith("output_"))
            texts = [Path(self.root, name).read_text(encoding="utf-8")[-3000:] for name in outputs]
            raise AssertionError("a rank ended:\n" + "\n".join(texts)) from None
        return message

    def _check_loaded(self, ends: list[Connection]) -> str:
        steps = set()
        for rank, end in enumerate(ends):
            _, step, crc = self._receive(end)
            assert self._contents[rank, step] == crc, f"rank {rank} loaded something else than it saved in step {step}"
            steps.add(step)
        assert steps in ({self._saved}, {self._saved + 1}), f"step {self._saved} was complete, {steps} was loaded"
        outcome = "old" if steps == {self._saved} else "new"
        self._saved = steps.pop()
        return outcome

    def _let_save(self, ends: list[Connection], count: int) -> None:
        """Returns when `count` saves are complete and the next one begins."""
        for number in range(count + 1):
            for rank, end in enumerate(ends):
                _, step, crc = self._receive(end)  # "saving"
                known = self._contents.setdefault((rank, step), crc)
                assert known == crc, f"step {step} after a resume differs from the one before"
            began = time.perf_counter()
            if number < count:
                for end in ends:
                    self._saved = self._receive(end)[1]
                self._duration = time.perf_counter() - began
                with open(os.path.join(self.root, "saved"), "w", encoding="utf-8"):
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    ways = [(stage, numbered) for stage in (2, 3, 0) for numbered in (False, True)]
    for stage, numbered in ways:
        with tempfile.TemporaryDirectory() as root:
            torture = Torture(root, stage, numbered, options.seed)
            found = Counter(torture.attempt() for _ in range(options.kills // len(ways) + 2))
        print(f"stage {stage}, {'numbered folders' if numbered else 'one folder'}: {dict(found)}", flush=True)
        outcomes += found
    print(f"all loaded: {dict(outcomes)}")


if __name__ == "__main__":
    main()
