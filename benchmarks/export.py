"""What it costs to get the weights out: time and peak memory of a rank, against Accelerate and DeepSpeed, in one run.

Two ranks train a transformer's matrices with ZeRO stage 3 on CPUs (nothing but their size matters here), then save the
model: zeroaccel's `save_model`, Accelerate's `get_state_dict` with `torch.save`. A checkpoint of DeepSpeed's is put
together by `zeroaccel.checkpoint.consolidate` and by DeepSpeed's `zero_to_fp32.py`. Every contestant has processes of
its own. Usage: python benchmarks/export.py [--layers 10] [--hidden 2048] [--rounds 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = 2
LIVE = ("zeroaccel save_model", "Accelerate get_state_dict + torch.save")
OFFLINE = ("zeroaccel consolidate", "DeepSpeed zero_to_fp32", "DeepSpeed zero_to_fp32, safetensors")

# A process of its own looks on: a thread would wait where the interpreter is busy.
_WATCHER = """
import sys, threading, time
path, peak = f"/proc/{sys.argv[1]}/status", 0
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
print("looking", flush=True)
while not stop.is_set():
    for line in open(path):
        if line.startswith("RssAnon"):
            peak = max(peak, int(line.split()[1]))
    time.sleep(0.002)
print(peak)
"""


def measure(work: Callable[[], Any], folder: str) -> dict[str, float]:
    """MiB over the start, of anonymous memory and with what is mapped; seconds until return and on the disk."""
    own = f"/proc/{os.getpid()}"
    Path(own, "clear_refs").write_text("5")  # the peak of all resident memory begins anew
    before = _status(own)
    command = [sys.executable, "-S", "-c", _WATCHER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        watcher.stdout.readline()
        start = time.perf_counter()
        work()
        returned = time.perf_counter() - start
        watcher.stdin.close()
        anonymous = int(watcher.stdout.read())
    resident = _status(own)["VmHWM"]
    start = time.perf_counter()
    _sync(folder)
    return {
        "anonymous": (anonymous - before["RssAnon"]) / 1024,
        "resident": (resident - before["VmRSS"]) / 1024,
        "seconds": returned,
        "durable": returned + time.perf_counter() - start,
    }


def _status(process: str) -> dict[str, int]:
    lines = Path(process, "status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Vm", "Rss"))}


def _sync(folder: str) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def make_model(layers: int, hidden: int) -> Any:
    """Matrices of a transformer's sizes."""
    import torch

    torch.manual_seed(0)
    block = [(hidden, 4 * hidden), (4 * hidden, hidden), (hidden, 3 * hidden), (hidden, hidden)]
    return torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for _ in range(layers) for a, b in block))


def live(name: str, layers: int, hidden: int, folder: str) -> dict[str, float]:
    """One rank of a job that holds a model at stage 3."""
    import torch

    library = __import__("zeroaccel" if name.startswith("zeroaccel") else "accelerate")
    utils = __import__(f"{library.__name__}.utils", fromlist=["DeepSpeedPlugin"])
    plugin = utils.DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=1, zero3_save_16bit_model=True)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["train_batch_size"] = RANKS  # on CPUs Accelerate takes every rank for the only one
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    accelerator = library.Accelerator(deepspeed_plugin=plugin)
    assert str(accelerator.distributed_type).endswith("DEEPSPEED"), accelerator.distributed_type
    model = make_model(layers, hidden)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if name == "checkpoint":
        model.save_checkpoint(folder)
        return {}

    def ours() -> None:
        accelerator.save_model(model, folder)

    def theirs() -> None:
        state = accelerator.get_state_dict(model)
        if torch.distributed.get_rank() == 0:
            os.makedirs(folder, exist_ok=True)
            torch.save(state, f"{folder}/pytorch_model.bin")

    result = measure(ours if name.startswith("zeroaccel") else theirs, folder)
    torch.distributed.barrier()
    return result


def offline(name: str, checkpoint: str, folder: str) -> dict[str, float]:
    """Puts a checkpoint together."""
    if name.startswith("zeroaccel"):
        from zeroaccel.checkpoint.consolidate import consolidate

        return measure(lambda: consolidate(checkpoint, folder, max_shard_size="5GB"), folder)
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert

    safe = name.endswith("safetensors")
    return measure(lambda: convert(checkpoint, folder, safe_serialization=safe), folder)


def start(arguments: list[str], ranks: int) -> list[dict[str, float]]:
    """Runs `arguments` as the worker of this program on so many ranks; what each measured."""
    base = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    base |= {"ZEROACCEL_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 300)}
    base |= {"LOCAL_WORLD_SIZE": str(ranks)}
    if ranks == 1:
        base = {name: value for name, value in base.items() if name not in ("WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, __file__, *arguments]
    jobs = [
        subprocess.Popen(
            command,
            env=base if ranks == 1 else {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    results = []
    for job in jobs:
        out, errors = job.communicate(timeout=600)
        if job.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{errors[-3000:]}")
        results.append(json.loads(out.strip().splitlines()[-1]))
    return results


def report(name: str, rounds: list[list[dict[str, float]]]) -> None:
    """One row: medians over the rounds, the largest of the ranks."""

    def worst(key: str) -> float:
        return statistics.median(max(rank[key] for rank in ranks) for ranks in rounds)

    print(
        f"| {name} | {worst('anonymous'):.0f} | {worst('resident'):.0f} | {worst('seconds'):.2f} |"
        f" {worst('durable'):.2f} |",
        flush=True,
    )


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, checkpoint, out = options.worker
        offlined = name in OFFLINE
        print(
            json.dumps(offline(name, checkpoint, out) if offlined else live(name, options.layers, options.hidden, out))
        )
        return
    count = options.layers * 12 * options.hidden**2
    print(f"{count / 1e6:.0f}M parameters, {count * 4 / 2**20:.0f} MiB in fp32, medians of {options.rounds} rounds\n")
    print("| | anonymous, MiB over the start | resident, MiB | returns after, s | on the disk after, s |")
    print("|---|---|---|---|---|")
    size = ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    work = tempfile.mkdtemp(prefix="export-", dir=options.folder)
    checkpoint = f"{work}/checkpoint"
    try:
        for names, ranks in ((LIVE, RANKS), (OFFLINE, 1)):
            if names is OFFLINE:
                start([*size, "--worker", "checkpoint", "-", checkpoint], RANKS)
            found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in names}
            for _ in range(options.rounds):  # in turn, so that whatever else the machine does hits all of them
                for name in names:
                    found[name].append(start([*size, "--worker", name, checkpoint, f"{work}/out"], ranks))
                    shutil.rmtree(f"{work}/out")
            for name in names:
                report(name, found[name])
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
