"""What `prepare()` puts where the config says "auto", seen in the engine that runs, on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from tests.distributed.pool import RankPool
from tests.engine.small import Net, accelerator, loader, samples, train_step
from zeroaccel.engine.optimizer import DummyOptim
from zeroaccel.engine.scheduler import DummyScheduler

WORLD_SIZE = 2
HIDDEN_SIZE_KEYS = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": "auto"}  # fmt: skip


class Stream(IterableDataset[torch.Tensor]):
    """An iterable dataset without length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(samples().tensors[0])


class Buckets:
    """A batch sampler of the user's own that tells its batch size or does not."""

    def __init__(self, batch_size: int | None) -> None:
        if batch_size is not None:
            self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3]])

    def __len__(self) -> int:
        return 2


@dataclass
class Case:
    """What is asked for, and what must run.

    Attributes:
        expected: dotted key of the DeepSpeed config, or `engine.METHOD`, and its value.
        config: DeepSpeed config without `zero_optimization`, which is `{"stage": 2}` plus `zero`; None: no config file.
        zero: fields of `zero_optimization`.
        plugin: fields of the plugin.
        options: arguments of the `Accelerator`.
        loaders: of the `prepare()` call.
        model: attributes of `model.config`.
        optimizer, scheduler: made from the model's parameters, and from the optimizer.
        error: parts of the error instead.
    """

    expected: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    plugin: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loaders: Callable[[], list[DataLoader[Any]]] = lambda: [loader(4)]
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], Any] = lambda parameters: SGD(parameters, lr=0.1)
    scheduler: Callable[[Any], Any] | None = None
    error: tuple[str, ...] = ()


def micro(size: int, **options: Any) -> Case:
    """A case about the micro-batch size."""
    return Case({"engine.train_micro_batch_size_per_gpu": size}, **options)


MICRO = {"train_micro_batch_size_per_gpu": 3}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}}
WARMUP = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                              "warmup_num_steps": "auto", "total_num_steps": "auto"}}  # fmt: skip


def dummy(**options: Any) -> Callable[[Any], Any]:
    return lambda parameters: DummyOptim(parameters, **options)


BATCH_SIZES = {
    "of the loader": micro(4),
    "an evaluation loader changes nothing": micro(8, loaders=lambda: [loader(2), loader(8, shuffle=True)]),
    "the first of loaders that are not shuffled": micro(8, loaders=lambda: [loader(8), loader(2)]),
    "the smallest training loader": micro(4, loaders=lambda: [loader(n, shuffle=True) for n in (8, 4, 6)]),
    "the largest loader": micro(
        8, loaders=lambda: [loader(4, shuffle=True), loader(8)], plugin={"is_train_batch_min": False}
    ),
    "a loader with a weighted sampler is for training": micro(
        4, loaders=lambda: [loader(2), loader(4, sampler=WeightedRandomSampler([1.0] * 64, 64))]
    ),
    "split over the ranks": micro(3, loaders=lambda: [loader(6)], options={"split_batches": True}),
    "a batch sampler's": micro(
        5, loaders=lambda: [DataLoader(samples(), batch_sampler=BatchSampler(SequentialSampler(samples()), 5, False))]
    ),
    "a batch sampler's of the user's own": micro(
        6,
        loaders=lambda: [loader(2), DataLoader(samples(), batch_sampler=Buckets(6))],  # type: ignore[arg-type]
    ),
    "a batch sampler's given as sampler": micro(
        5, loaders=lambda: [loader(None, sampler=BatchSampler(SequentialSampler(samples()), 5, False))]
    ),
    "an iterable dataset's": micro(4, loaders=lambda: [DataLoader(Stream(), batch_size=4), loader(2)]),
    "an iterable dataset without, and a number": micro(3, config=MICRO, loaders=lambda: [DataLoader(Stream(), None)]),
    "no loader, and a number": micro(3, config=MICRO, loaders=list),
    "a number beats the loader": micro(3, config=MICRO),
    "from the train batch size": micro(
        2, config={"train_batch_size": 12, "gradient_accumulation_steps": 3}, loaders=list
    ),
    "an iterable dataset without": Case(
        loaders=lambda: [DataLoader(Stream(), None)], error=("train_micro_batch_size_per_gpu", "without a batch size")
    ),
    "a batch sampler that tells none": Case(
        loaders=lambda: [DataLoader(samples(), batch_sampler=Buckets(None))],  # type: ignore[arg-type]
        error=("train_micro_batch_size_per_gpu", "batch sampler that tells none", "write a number"),
    ),
    "a train batch size that does not fit": Case(
        config={"train_batch_size": 30}, error=("train_batch_size is 30", "4 (micro-batch)", 'write "auto" or 8')
    ),
}

ACCUMULATION = {
    "of the Accelerator": Case({"engine.gradient_accumulation_steps": 4}, options={"gradient_accumulation_steps": 4}),
    "of the plugin": Case({"engine.gradient_accumulation_steps": 3}, plugin={"gradient_accumulation_steps": 3}),
    "of the config": Case(
        {"engine.gradient_accumulation_steps": 5, "train_batch_size": 40},
        config={"gradient_accumulation_steps": 5, "train_batch_size": "auto"},
    ),
    "auto in the config": Case(
        {"engine.gradient_accumulation_steps": 4},
        config={"gradient_accumulation_steps": "auto"},
        options={"gradient_accumulation_steps": 4},
    ),
    "nobody's": Case({"engine.gradient_accumulation_steps": 1, "engine.gradient_clipping": 0.0}),
}

OTHERS = {
    "clipping of the plugin": Case({"engine.gradient_clipping": 0.7}, plugin={"gradient_clipping": 0.7}),
    "clipping auto": Case({"engine.gradient_clipping": 0.0}, config={"gradient_clipping": "auto"}),
    "clipping auto as in Accelerate": Case(
        {"engine.gradient_clipping": 1.0}, config={"gradient_clipping": "auto"}, plugin={"auto_policy": "accelerate"}
    ),
    "hidden size": Case(
        {"engine.zero_reduce_bucket_size": 64 * 64, "engine.zero_prefetch_bucket_size": 3686,
         "engine.zero_param_persistence_threshold": 640},
        zero=HIDDEN_SIZE_KEYS, model={"hidden_size": 64}, plugin={"auto_policy": "accelerate"},
    ),
    "hidden sizes": Case(
        {"engine.zero_reduce_bucket_size": 96 * 96},
        zero=HIDDEN_SIZE_KEYS, model={"hidden_sizes": [32, 96, 64]}, plugin={"auto_policy": "accelerate"},
    ),
    "hidden size of a nested text config": Case(
        {"engine.zero_reduce_bucket_size": 48 * 48},
        zero=HIDDEN_SIZE_KEYS, model={"text_config": SimpleNamespace(hidden_size=48)},
        plugin={"auto_policy": "accelerate"},
    ),
    "no hidden size": Case(  # the largest parameter has 8 x 16 elements
        {"engine.zero_reduce_bucket_size": 12 * 12}, zero=HIDDEN_SIZE_KEYS, plugin={"auto_policy": "accelerate"}
    ),
    "a fast bucket, bounded by the model's size": Case(
        {"engine.zero_reduce_bucket_size": 8 * 16 + 16 + 16 + 1}, zero=HIDDEN_SIZE_KEYS, model={"hidden_size": 4}
    ),
    "stage and offload": Case(
        {"engine.zero_optimization_stage": 1, "zero_optimization.offload_optimizer.device": "cpu"},
        zero={"stage": "auto", "offload_optimizer": {"device": "auto", "nvme_path": "auto"}},
        plugin={"zero_stage": 1, "offload_optimizer_device": "cpu"},
    ),
    "gathering when saving": Case(
        {"engine.zero_gather_16bit_weights_on_model_save": True},
        zero={"stage3_gather_16bit_weights_on_model_save": "auto"}, plugin={"zero3_save_16bit_model": True},
    ),
    "no gathering when saving": Case(
        {"engine.zero_gather_16bit_weights_on_model_save": False},
        zero={"stage3_gather_16bit_weights_on_model_save": "auto"},
    ),
    "bf16": Case(
        {"engine.bfloat16_enabled": True, "engine.fp16_enabled": False},
        config={"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, options={"mixed_precision": "bf16"},
    ),
    "fp16": Case(
        {"engine.bfloat16_enabled": False, "engine.fp16_enabled": True},
        config={"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, options={"mixed_precision": "fp16"},
    ),
    "fp32": Case(
        {"engine.bfloat16_enabled": False, "engine.fp16_enabled": False},
        config={"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}},
    ),
    "optimizer": Case(
        {"engine.optimizer_params": {"lr": 0.02, "weight_decay": 0.3}},
        config=ADAM, optimizer=dummy(lr=0.02, weight_decay=0.3),
    ),
    "betas and eps of the optimizer": Case(
        {"optimizer.params.betas": (0.5, 0.6), "optimizer.params.eps": 1e-3, "optimizer.params.lr": 1e-3,
         "optimizer.params.weight_decay": 0},
        config={"optimizer": {"type": "Adam", "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto",
                                                         "eps": "auto"}}},
        optimizer=dummy(betas=(0.5, 0.6), eps=1e-3),
    ),
    "numbers of the config's optimizer stay": Case(
        {"engine.optimizer_params": {"lr": 0.05, "weight_decay": 0.3}},
        config={"optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": "auto"}}},
        optimizer=dummy(lr=0.02, weight_decay=0.3),
    ),
    "scheduler": Case(
        {"engine.scheduler_params": {"warmup_min_lr": 0, "warmup_max_lr": 0.02, "warmup_num_steps": 5,
                                     "total_num_steps": 50}},
        config={**ADAM, "scheduler": WARMUP}, optimizer=dummy(lr=0.02),
        scheduler=lambda optimizer: DummyScheduler(optimizer, total_num_steps=100, warmup_num_steps=10),
    ),
    "scheduler under split_batches": Case(
        {"engine.scheduler_params": {"warmup_min_lr": 0, "warmup_max_lr": 0.02, "warmup_num_steps": 10,
                                     "total_num_steps": 100}},
        config={**ADAM, "scheduler": WARMUP}, optimizer=dummy(lr=0.02), options={"split_batches": True},
        scheduler=lambda optimizer: DummyScheduler(optimizer, total_num_steps=100, warmup_num_steps=10),
    ),
    "scheduler of a real optimizer, no warm-up": Case(
        {"scheduler.params.warmup_max_lr": 0.25, "scheduler.params.warmup_num_steps": 1},
        config={"scheduler": WARMUP}, optimizer=lambda parameters: SGD(parameters, lr=0.25),
        scheduler=lambda optimizer: DummyScheduler(optimizer, total_num_steps=100),
    ),
    "betas that nobody gave": Case(
        config={"optimizer": {"type": "Adam", "params": {"betas": "auto"}}}, optimizer=dummy(),
        error=("optimizer.params.betas is 'auto'", "DummyOptim(..., betas=...)"),
    ),
    "total steps that nobody gave": Case(
        config={**ADAM, "scheduler": WARMUP}, optimizer=dummy(), scheduler=DummyScheduler,
        error=("scheduler.params.total_num_steps is 'auto'", "DummyScheduler(..., total_num_steps=...)"),
    ),
    "auto where it is not understood": Case(
        zero={"sub_group_size": "auto"}, error=("zero_optimization.sub_group_size is 'auto'", "leave the key out")
    ),
    "a key that does not exist": Case(
        zero={"reduce_buckets_size": 5}, error=("zero_optimization.reduce_buckets_size", "'reduce_bucket_size'")
    ),
    "two problems at once": Case(
        config={"optimizer": {"type": "Adam", "params": {"betas": "auto", "eps": "auto"}}}, optimizer=dummy(),
        error=("2 problems", "1. optimizer.params.betas", "2. optimizer.params.eps"),
    ),
}  # fmt: skip

CASES = {**BATCH_SIZES, **{f"accumulation: {k}": case for k, case in ACCUMULATION.items()}, **OTHERS}


def resolve(name: str) -> dict[str, Any] | str:
    """Prepares the case; what runs by key of `expected`, or the error's text."""
    case, config = CASES[name], None
    if case.config is not None or case.zero:
        config = {**(case.config or {}), "zero_optimization": {"stage": 2, **case.zero}}
    prepared = accelerator(config, case.options, **case.plugin)
    steps, precision = prepared.gradient_accumulation_steps, prepared.mixed_precision
    model = Net(**case.model)
    optimizer = case.optimizer(model.parameters())
    objects = [model, optimizer, *case.loaders()]
    if case.scheduler is not None:
        objects.append(case.scheduler(optimizer))
    try:
        engine = prepared.prepare(*objects)[0]
    except ValueError as error:
        return str(error)
    check_agreement(prepared, engine)
    assert (steps, precision) == (prepared.gradient_accumulation_steps, prepared.mixed_precision)
    document = prepared.deepspeed_plugin.hf_ds_config
    found = {
        key: getattr(engine, key.removeprefix("engine."))() if key.startswith("engine.") else document.get_value(key)
        for key in case.expected
    }
    prepared.free_memory()
    return found


def check_agreement(prepared: Any, engine: Any) -> None:
    """Semantics 14: all that we say is what DeepSpeed runs with."""
    plugin, config = prepared.deepspeed_plugin, prepared.deepspeed_config
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "no"
    assert prepared.mixed_precision == precision
    assert prepared.num_processes == engine.dp_world_size == WORLD_SIZE
    for said in (plugin.gradient_accumulation_steps, config["gradient_accumulation_steps"]):
        assert said == prepared.gradient_accumulation_steps == engine.gradient_accumulation_steps()
    assert config["train_micro_batch_size_per_gpu"] == engine.train_micro_batch_size_per_gpu()
    product = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * WORLD_SIZE
    assert config.get("train_batch_size", product) == engine.train_batch_size() == product
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == engine.zero_optimization_stage()
    assert config.get("gradient_clipping", 0.0) == engine.gradient_clipping()
    assert plugin.is_auto("train_micro_batch_size_per_gpu") is False
    assert "auto" not in str(config).replace("auto_cast", "")


@pytest.mark.parametrize("name", CASES)
def test_auto_becomes(name: str, ranks: RankPool) -> None:
    case = CASES[name]
    for found in ranks.run(resolve, name=name):
        if case.error:
            assert isinstance(found, str), f"not refused: {found}"
            for part in case.error:
                assert part in found
        else:
            assert found == case.expected


def assigned() -> None:
    """The remedy that the error names works, and so does the second prepare()."""
    prepared = accelerator()
    plugin = prepared.deepspeed_plugin
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 7
    model = Net()
    engine, _ = prepared.prepare(model, SGD(model.parameters(), lr=0.1))
    assert engine.train_micro_batch_size_per_gpu() == plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 7
    prepared.free_memory()


def twice() -> None:
    """Every prepare() resolves anew what was auto, not what the user assigned between."""
    keys = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    prepared = accelerator(
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, **dict.fromkeys(keys, "auto")},
        {"gradient_accumulation_steps": 2},
        auto_policy="accelerate",
    )
    config = prepared.deepspeed_config
    for hidden, batch in ((64, 4), (96, 6), (32, None)):
        model = Net(hidden_size=hidden)
        loaders = [] if batch is None else [loader(batch)]
        engine = prepared.prepare(model, AdamW(model.parameters()), *loaders)[0]
        assert engine.zero_reduce_bucket_size() == hidden * hidden
        assert engine.train_micro_batch_size_per_gpu() == (batch or 6)
        assert config["train_batch_size"] == engine.train_batch_size() == (batch or 6) * 2 * WORLD_SIZE
        assert prepared.deepspeed_config is config
    config["gradient_clipping"] = 0.5
    prepared.gradient_accumulation_steps = 3
    model = Net(hidden_size=8)
    engine, optimizer, batches = prepared.prepare(model, AdamW(model.parameters()), loader(2))
    assert (engine.gradient_clipping(), engine.gradient_accumulation_steps()) == (0.5, 3)
    assert engine.train_micro_batch_size_per_gpu() == 2
    for batch in batches:
        train_step(prepared, engine, optimizer, batch[0])
    prepared.free_memory()


def without_optimizer() -> None:
    """For inference at stage 3, and a scheduler section that a model alone does not need."""
    prepared = accelerator({"zero_optimization": {"stage": 3}, **ADAM, "scheduler": WARMUP, **MICRO})
    engine = prepared.prepare(Net())
    assert engine.zero_optimization_stage() == 3
    assert engine(torch.zeros(2, 8)).shape == (2, 1)
    prepared.free_memory()


@pytest.mark.parametrize("function", [assigned, twice, without_optimizer], ids=lambda f: f.__name__)
def test_prepare(function: Callable[[], None], ranks: RankPool) -> None:
    ranks.run(function)
