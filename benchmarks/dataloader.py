"""What a prepared loader costs: batches a second of zeroaccel's and Accelerate's loaders against the bare DataLoader.

Two ranks over gloo, in one run; the contestants take turns, epoch by epoch, in an order that changes, so that whatever
else the machine does hits all of them. Every rank reads the same batches: the bare loader is given the shard's sampler.
A dispatched loader reads on rank 0 and sends; the bare loader beside it reads all of the stream on every rank.
Then what it costs to meet: uneven ranks tell each other before each batch whether they have one, and a gather makes
sure that all ranks are in the same call.
Usage: python benchmarks/dataloader.py [--rounds 40] [--batches 50] [--length 512] [--batch 32] [--ranks 2]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

LIBRARIES = ("zeroaccel", "accelerate")


def sample(number: int, length: int) -> dict[str, torch.Tensor]:
    """What a tokenized text looks like."""
    ids = torch.full((length,), number)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Texts(Dataset[Any]):
    def __init__(self, count: int, length: int) -> None:
        self.samples = [sample(number, length) for number in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class RawTexts(Texts):
    """Tokenized when they are asked for, as much work as a script usually has."""

    def __init__(self, count: int, length: int) -> None:
        self.count = count
        self.text = " ".join(f"word{number}" for number in range(length))
        self.vocabulary = {word: number for number, word in enumerate(self.text.split())}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        ids = torch.tensor([self.vocabulary[word] for word in self.text.split()])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class TextStream(IterableDataset[Any]):
    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[Any]:
        return iter(self.texts.samples)


def prepared(library: str, loader: DataLoader[Any], **options: Any) -> Iterable[Any]:
    module = __import__(f"{library}.data_loader", fromlist=["data_loader"])
    device = torch.device("cpu")
    made: Iterable[Any] = module.prepare_data_loader(loader, device, put_on_device=True, **options)
    return made


def map_style(texts: Dataset[Any], arguments: argparse.Namespace) -> dict[str, Iterable[Any]]:
    from zeroaccel.data_loader import BatchSamplerShard

    batches = BatchSampler(SequentialSampler(texts), arguments.batch, False)  # type: ignore[arg-type]
    shard = BatchSamplerShard(batches, dist.get_world_size(), dist.get_rank())
    bare: Iterable[Any] = DataLoader(texts, batch_sampler=shard)
    made = {library: prepared(library, DataLoader(texts, arguments.batch)) for library in LIBRARIES}
    return {"bare": bare, **made}


def dispatched(texts: Texts, arguments: argparse.Namespace) -> dict[str, Iterable[Any]]:
    stream = TextStream(texts)
    bare: Iterable[Any] = DataLoader(stream, arguments.batch * dist.get_world_size())
    made = {library: prepared(library, DataLoader(stream, arguments.batch)) for library in LIBRARIES}
    return {"bare": bare, **made}


class AlwaysJoint:
    """Stands for a model that needs all ranks."""


class Trained:
    """Iterating it takes a step of 20 to 30 ms a batch, at whose end the ranks wait for each other, as in training."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.weights = torch.randn(700, 700)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            gradients = self.weights
            for _ in range(2):
                gradients = gradients @ self.weights / 700
            dist.all_reduce(gradients)
            yield batch


def uneven(texts: Dataset[Any], arguments: argparse.Namespace) -> dict[str, Iterable[Any]]:
    loaders = map_style(texts, arguments)
    loaders["zeroaccel"] = prepared("zeroaccel", DataLoader(texts, arguments.batch), even_batches=False)
    return {name: Trained(loader) for name, loader in loaders.items()}


def gathers(arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a bare all-gather of eight numbers, and the time of both libraries' `gather` as ratios to it."""
    import accelerate.utils

    import zeroaccel.utils

    own = torch.ones(8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: dist.all_gather(parts, own),
        "zeroaccel": lambda: zeroaccel.utils.gather(own),
        "accelerate": lambda: accelerate.utils.gather(own),
    }
    contestants = {name: Repeated(call, arguments.batches) for name, call in calls.items()}
    return measure(contestants, arguments)


class Repeated:
    """Iterating it makes the call so many times."""

    def __init__(self, call: Callable[[], Any], times: int) -> None:
        self.call, self.times = call, times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield self.call()


def measure(contestants: Mapping[str, Iterable[Any]], arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds a batch of the bare loader, and the time of the others as ratios to it; medians over the rounds."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, arguments.rounds):  # the first two warm up
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            loader = contestants[name]
            dist.barrier()
            begin = time.perf_counter()
            count = sum(1 for _ in loader)
            assert count == arguments.batches, (name, count)
            if turn >= 0:
                times[name].append((time.perf_counter() - begin) / count * 1e6)
    ratios = {
        name: statistics.median(own / bare for own, bare in zip(times[name], times["bare"], strict=True))
        for name in LIBRARIES
    }
    return {"bare us": statistics.median(times["bare"]), **ratios}


def run(rank: int, port: int, arguments: argparse.Namespace) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks, "LOCAL_WORLD_SIZE": arguments.ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    import accelerate

    import zeroaccel

    zeroaccel.PartialState(cpu=True)
    accelerate.Accelerator(cpu=True)  # its loaders ask for its state
    if rank == 0:
        print("| loader | bare DataLoader, batches/s | zeroaccel, time / bare | Accelerate, time / bare |")
        print("|---|---|---|---|")
    count = arguments.batches * arguments.batch * arguments.ranks
    texts, raw = Texts(count, arguments.length), RawTexts(count, arguments.length)
    model = AlwaysJoint()
    zeroaccel.state.GradientState()._add_engine(model, always=True)
    for title, result in {
        "map-style, tokenized on the way": lambda: measure(map_style(raw, arguments), arguments),
        "map-style, tensors in memory": lambda: measure(map_style(texts, arguments), arguments),
        "dispatched stream of tensors in memory": lambda: measure(dispatched(texts, arguments), arguments),
        "training, ranks may be uneven": lambda: measure(uneven(raw, arguments), arguments),
        "no loader: a gather of eight numbers": lambda: gathers(arguments),
    }.items():
        found = result()
        if rank == 0:
            speed = 1e6 / found["bare us"]
            print(f"| {title} | {speed:.0f} | {found['zeroaccel']:.3f} | {found['accelerate']:.3f} |", flush=True)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batches", type=int, default=50, help="of a rank, in an epoch")
    parser.add_argument("--length", type=int, default=512, help="of a text, in tokens")
    parser.add_argument("--batch", type=int, default=32, help="texts in a batch of a rank")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    torch.multiprocessing.spawn(run, args=(free_port(), arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
