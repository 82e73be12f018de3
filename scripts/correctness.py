"""Runs every loop of `tests/engine/situations.py` on every kind of run, and with every contestant, and writes tables.

A cell is the largest difference of a weight from plain PyTorch's, or what happened instead. A loop that hangs is ended,
with its ranks. The file is written anew after each kind of run, so whatever ends the script, there are results.

Usage: python scripts/correctness.py [--device cpu|cuda] [--libraries zeroaccel deepspeed accelerate]
           [--kinds 2-cpu-bf16 ...] [--situations NAME ...] [--out FILE] [--limit-seconds 450] [--jobs N]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.distributed.pool import RankFailed, RankPool

if TYPE_CHECKING:
    from tests.engine.loop import Kind
    from tests.engine.situations import Outcome

LIBRARIES = {"zeroaccel": "zeroaccel", "deepspeed": "raw DeepSpeed", "accelerate": "Accelerate"}
STAGES = ("0-none", "1-none", "2-none", "2-cpu", "3-none", "3-cpu", "3-nvme")
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
COMPARED = [f"{stage}-no" for stage in STAGES[:-1]]
STARTING, HANGING = 180.0, 60.0  # seconds that ranks may take to start, and a loop to run
MARKS = {"wrong": "**wrong**", "error": "**error**", "hang": "**hang**", "refused": "refused", "not available": "-"}
WORST_FIRST = ("hang", "error", "wrong", "refused", "right", "not available")


def ready() -> None:
    """Done once the ranks have imported what they need."""
    importlib.import_module("tests.engine.situations")


@dataclass
class Results:
    """Outcomes by library, kind and situation."""

    found: dict[tuple[str, str, str], Outcome] = field(default_factory=dict)

    def cell(self, library: str, kind: str, situation: str) -> str:
        found = self.found.get((library, kind, situation))
        return "not run" if found is None else _shown(found)

    def compared(self, library: str, situation: str) -> str:
        """All compared kinds in one cell: what went wrong, and where."""
        outcomes = {kind: self.found.get((library, kind, situation)) for kind in COMPARED}
        known = {kind: found for kind, found in outcomes.items() if found is not None}
        if not known:
            return "not run"
        texts = []
        for how in ("hang", "error", "wrong", "refused"):
            kinds = [kind for kind, found in known.items() if found.how == how]
            if kinds:
                worst = max((known[kind] for kind in kinds), key=lambda found: found.distance)
                texts.append(f"{_shown(worst)} at {', '.join(_stage(kind) for kind in kinds)}")
        right = [found for found in known.values() if found.how == "right"]
        if not texts:
            return _shown(max(right, key=lambda found: found.distance)) if right else MARKS["not available"]
        return "; ".join(texts)


def _stage(kind: str) -> str:
    stage, offload, _ = kind.split("-")
    return stage if offload == "none" else f"{stage}+{offload}"


def _number(distance: float) -> str:
    mantissa, exponent = f"{distance:.0e}".split("e")
    return "0" if distance == 0 else f"{mantissa}e{int(exponent)}"


def _shown(found: Outcome) -> str:
    if found.how == "right":
        return _number(found.distance)
    if found.how == "wrong" and not math.isnan(found.distance):
        return f"**wrong ({_number(found.distance)})**"
    return MARKS[found.how]


def examine(pool: RankPool, kind: Kind, name: str, left: float) -> Outcome:
    """One situation on all ranks, in not much more than `left` seconds; the worst of their outcomes.

    Raises:
        RankFailed: the ranks do not start.
    """
    from tests.engine.situations import Outcome, outcome

    pool.run(ready, timeout=min(STARTING, left + 5))
    try:
        outcomes: list[Outcome] = pool.run(outcome, kind=kind, name=name, timeout=min(HANGING, left + 5))
    except RankFailed as failure:
        # Where one rank raises, the others may wait for it.
        raised = [found for found in failure.results if found.how not in ("right", "not available")]
        outcomes = raised or [Outcome("hang" if failure.hung else "error", text=str(failure))]
    worst = min(outcomes, key=lambda found: WORST_FIRST.index(found.how))
    if worst.how == "error":
        pool.close()  # whatever it left behind is no matter of the next one
    distances = [found.distance for found in outcomes if found.how == worst.how]
    return replace(worst, distance=max(distances))


@dataclass
class Run:
    """The whole undertaking.

    Attributes:
        arguments: of the command line.
        ranks: how many each library has.
        names: of the situations.
        missing: kinds that cannot run here, with the reason.
    """

    arguments: argparse.Namespace
    ranks: dict[str, int]
    names: list[str]
    missing: dict[str, str]
    results: Results = field(default_factory=Results)
    lock: threading.Lock = field(default_factory=threading.Lock)
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float(self.arguments.limit_seconds - (time.monotonic() - self.begin))

    def tasks(self) -> list[tuple[str, str]]:
        """Library and kind; fp32 first, since it says most."""
        listed = []
        for precision in PRECISIONS:
            for library in self.arguments.libraries:
                kinds = [f"{stage}-{precision}" for stage in STAGES]
                wanted = kinds if library == "zeroaccel" else [kind for kind in kinds if kind in COMPARED]
                listed += [(library, kind) for kind in wanted if kind not in self.missing]
        chosen = self.arguments.kinds
        return [task for task in listed if not chosen or task[1] in chosen]

    def work(self, waiting: queue.Queue[tuple[str, str]]) -> None:
        """Takes kinds until there are none left, or no time."""
        while self.left > 0:
            try:
                library, kind = waiting.get_nowait()
            except queue.Empty:
                return
            with tempfile.TemporaryDirectory() as folder:
                self.run_kind(library, kind, folder)
            with self.lock:
                self.write()

    def run_kind(self, library: str, kind: str, folder: str) -> None:
        from tests.engine.loop import Kind

        stage, offload, precision = kind.split("-")
        typed = Kind(int(stage), offload, precision, library, folder)
        pool = RankPool(self.ranks[library], self.arguments.device)
        try:
            for name in self.names:
                if self.left <= 0:
                    return
                found = examine(pool, typed, name, self.left)
                self.results.found[library, kind, name] = found
                if found.how in ("error", "wrong", "hang"):
                    print(f"{library} {kind} {name}: {found.how}\n{found.text[-1500:]}", file=sys.stderr, flush=True)
        except RankFailed as failure:
            print(f"{library} {kind}: the ranks do not start\n{failure}", file=sys.stderr, flush=True)
        finally:
            pool.close()
        print(f"{time.monotonic() - self.begin:5.0f} s  {library} {kind}", file=sys.stderr, flush=True)

    # --- the tables ---------------------------------------------------------------------------------------------

    def write(self) -> None:
        text = "\n".join(self.lines()) + "\n"
        if self.arguments.out is None:
            return
        path = Path(self.arguments.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(text)
        unfinished.replace(path)

    def lines(self) -> Iterable[str]:
        yield f"{self.machine()}; {time.monotonic() - self.begin:.0f} s."
        for precision, shown in PRECISIONS.items():
            kinds = [f"{stage}-{precision}" for stage in STAGES]
            if any(key[:2] == ("zeroaccel", kind) for key in self.results.found for kind in kinds):
                yield from ["", f"### zeroaccel, {shown}", ""]
                yield from self.table([_stage(kind) for kind in kinds], lambda name, k=kinds: [
                    self.results.cell("zeroaccel", kind, name) for kind in k
                ])  # fmt: skip
        if any(key[0] != "zeroaccel" for key in self.results.found):
            heads = [
                LIBRARIES[library] + (", 1 rank" if self.ranks[library] == 1 else "")
                for library in self.arguments.libraries
            ]
            yield from ["", f"### Compared, fp32, at {', '.join(_stage(kind) for kind in COMPARED)}", ""]
            yield from self.table(
                heads, lambda name: [self.results.compared(library, name) for library in self.arguments.libraries]
            )
        yield from [f"\n{kind} was not run: {reason}" for kind, reason in self.missing.items()]

    def table(self, heads: list[str], cells: Any) -> Iterable[str]:
        yield f"| | {' | '.join(heads)} |"
        yield "|---" * (len(heads) + 1) + "|"
        for name in self.names:
            yield f"| {name.replace('_', ' ')} | {' | '.join(cells(name))} |"

    def machine(self) -> str:
        import torch

        device = torch.cuda.get_device_name() if self.arguments.device == "cuda" else "CPU"
        versions = [f"{name} {importlib.metadata.version(package)}" for name, package in (
            ("PyTorch", "torch"), ("DeepSpeed", "deepspeed"), ("Accelerate", "accelerate"),
        )]  # fmt: skip
        return f"{self.ranks['zeroaccel']} ranks, {device}, {', '.join(versions)}"


def build_ops() -> dict[str, str]:
    """Compiles what offload needs, before anybody waits for it; the kinds that cannot run, with the reason."""
    from zeroaccel.engine import ops
    from zeroaccel.errors import EnvironmentProblem

    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    missing = {}
    for offload, names in (("cpu", ["cpu_adam"]), ("nvme", ["cpu_adam", *ops.needed(nvme)])):
        try:
            ops.build(names)
        except EnvironmentProblem as problem:
            missing.update(
                {f"{s}-{p}": str(problem) for s in STAGES for p in PRECISIONS if s.endswith(offload)}
            )  # fmt: skip
    return missing


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="gloo ranks, or one GPU a rank")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--kinds", nargs="+", default=[], help="stage-offload-precision, e.g. 3-nvme-no; default: all")
    parser.add_argument("--situations", nargs="+", default=[], help="names; default: all")
    parser.add_argument("--out", help="markdown file; default: stdout, at the end")
    parser.add_argument("--limit-seconds", type=float, default=450.0, help="ends with what there is (450)")
    parser.add_argument("--jobs", type=int, help="kinds that run at a time; default: one for 4 processors, at most 4")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    os.environ["DS_ACCELERATOR"] = arguments.device
    import torch

    from tests.engine.situations import SITUATIONS

    ranks = 2 if arguments.device == "cpu" else min(2, torch.cuda.device_count())
    if ranks == 0:
        print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    # Accelerate leaves DeepSpeed out on several CPU ranks.
    by_library = {name: 1 if (arguments.device, name) == ("cpu", "accelerate") else ranks for name in LIBRARIES}
    names = arguments.situations or [situation.__name__ for situation in SITUATIONS]
    run = Run(arguments, by_library, names, missing=build_ops())
    waiting: queue.Queue[tuple[str, str]] = queue.Queue()
    for task in run.tasks():
        waiting.put(task)
    jobs = arguments.jobs or max(1, min(4, (os.cpu_count() or 1) // 4))
    workers = [threading.Thread(target=run.work, args=(waiting,)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if arguments.out is None:
        print("\n".join(run.lines()))
    run.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
