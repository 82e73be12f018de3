"""Generated configs, arguments, variables and objects, and what Accelerate's plugin and ours make of them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import accelerate
import deepspeed
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin as TheirPlugin
from accelerate.utils import DummyOptim as TheirDummyOptim
from accelerate.utils import DummyScheduler as TheirDummyScheduler
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from torch.utils.data import DataLoader, TensorDataset

from zeroaccel.config.auto import resolve
from zeroaccel.config.document import HfDeepSpeedConfig, assign
from zeroaccel.config.facts import Facts, LoaderFact, ModelFact, OptimizerFact, SchedulerFact
from zeroaccel.config.plugin import DeepSpeedPlugin

REFUSED = "refused"
Outcome = dict[str, Any] | str

LEARNING_RATE, WEIGHT_DECAY, TOTAL_STEPS, WARMUP_STEPS = 0.01, 0.1, 101, 7
FEATURES = 12  # the model is one square layer, its largest parameter has FEATURES**2 elements


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        document: the DeepSpeed config, None for a plugin from its arguments alone.
        arguments: of the plugin.
        environment: variables without their prefix.
        prefix: of the variables that our plugin reads; Accelerate's always has its own.
        precision: what `set_mixed_precision` gets.
        world_size, split_batches, accumulation: of the Accelerator.
        loaders: batch size and whether it is shuffled, which makes it a training loader.
        hidden_size: of the model's config; a tuple is `hidden_sizes`; None: the model has no config.
        optimizer: "none", "real" or "dummy".
        scheduler: "none", "real", "dummy" or "callable".
    """

    document: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    prefix: str = "ZEROACCEL_"
    precision: str = "no"
    world_size: int = 1
    split_batches: bool = False
    accumulation: int = 1
    loaders: tuple[tuple[int | None, bool], ...] = ((4, True),)
    hidden_size: int | tuple[int, ...] | None = 16
    optimizer: str = "real"
    scheduler: str = "none"

    def value(self, key: str) -> Any:
        """Of a dotted key of the document, None where it has none."""
        return None if self.document is None else HfDeepSpeedConfig(self.document).get_value(key)

    def written(self, values: Mapping[str, Any]) -> Case:
        """The same with these dotted keys in the document."""
        document = copy.deepcopy(self.document)
        assert document is not None
        for key, value in values.items():
            assign(document, key, value)
        return dataclasses.replace(self, document=document)

    def without_variable(self, name: str) -> Case:
        """The same with one variable less."""
        return dataclasses.replace(self, environment={k: v for k, v in self.environment.items() if k != name})

    def without_argument(self, name: str) -> Case:
        """The same with one argument less."""
        return dataclasses.replace(self, arguments={k: v for k, v in self.arguments.items() if k != name})


# --- the two libraries ------------------------------------------------------------------------------------------


def variables(case: Case, prefix: str) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    for name, value in case.environment.items():
        patch.setenv(prefix + name, value)
    return patch


def construct(plugin: type, case: Case, prefix: str) -> Any:
    """A plugin of either library, after what the Accelerator's constructor does with it."""
    patch = variables(case, prefix)
    try:
        made = plugin(hf_ds_config=copy.deepcopy(case.document), **case.arguments)
        made.set_mixed_precision(case.precision)
    finally:
        patch.undo()
    return made


def outcome(compute: Callable[[], dict[str, Any]]) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compute()
        except Exception:  # Accelerate also refuses by AttributeError and the like
            return REFUSED


def their_plugin(case: Case) -> Outcome:
    def compute() -> dict[str, Any]:
        plugin = construct(TheirPlugin, case, "ACCELERATE_")
        return {**plugin.deepspeed_config, "zero3_init_flag": plugin.zero3_init_flag}

    return outcome(compute)


def our_plugin(case: Case) -> Outcome:
    def compute() -> dict[str, Any]:
        plugin = construct(DeepSpeedPlugin, case, case.prefix)
        return {**plugin.deepspeed_config, "zero3_init_flag": plugin.zero3_init_flag}

    return outcome(compute)


class _Captured(Exception):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


def _capture(**arguments: Any) -> None:
    raise _Captured(**arguments)


def their_prepare(case: Case) -> Outcome:
    """What Accelerate's `prepare` hands to `deepspeed.initialize`, with the clipping that DeepSpeed does uninvited."""

    def compute() -> dict[str, Any]:
        accelerator = SimpleNamespace(
            deepspeed_plugin=construct(TheirPlugin, case, "ACCELERATE_"),
            num_processes=case.world_size,
            split_batches=case.split_batches,
            gradient_accumulation_steps=case.accumulation,
            fp8_backend=None,
            parallelism_config=None,
            device=torch.device("cpu"),
            _prepare_one=lambda value, first_pass: value,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed, "initialize", _capture)
            # Building DeepSpeed's C++ Adam is not what is compared here.
            # Its logger wants a process state, which would fix the world size at 1.
            patch.setattr(accelerate.accelerator, "logger", logging.getLogger("accelerate"))
            patch.setattr(accelerate.accelerator, "map_pytorch_optim_to_deepspeed", lambda optimizer: optimizer)
            try:
                accelerate.Accelerator._prepare_deepspeed(accelerator, *their_objects(case))
            except _Captured as captured:
                return {"gradient_clipping": GRADIENT_CLIPPING_DEFAULT, **captured.arguments["config_params"]}
        raise AssertionError("deepspeed.initialize was not reached")

    return outcome(compute)


def their_objects(case: Case) -> Iterable[Any]:
    model: Any = torch.nn.Linear(FEATURES, FEATURES, bias=False)
    if case.hidden_size is not None:
        key = "hidden_sizes" if isinstance(case.hidden_size, tuple) else "hidden_size"
        model.config = SimpleNamespace(**{key: case.hidden_size})
    yield model
    real = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    dummy = TheirDummyOptim(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = dummy if case.optimizer == "dummy" else real
    if case.optimizer != "none":
        yield optimizer
    if case.scheduler == "real":
        yield torch.optim.lr_scheduler.LambdaLR(real, lambda step: 1.0)
    elif case.scheduler != "none":
        make = (lambda optimizer: None) if case.scheduler == "callable" else None
        yield TheirDummyScheduler(optimizer, TOTAL_STEPS, WARMUP_STEPS, lr_scheduler_callable=make)
    data = TensorDataset(torch.zeros(48, 1))
    for size, shuffled in case.loaders:
        if size is None:
            sampler = torch.utils.data.BatchSampler(range(48), 4, drop_last=False)
            yield DataLoader(data, batch_sampler=sampler)
        else:
            yield DataLoader(data, batch_size=size, shuffle=shuffled)


def our_facts(case: Case) -> Facts:
    hidden = max(case.hidden_size) if isinstance(case.hidden_size, tuple) else case.hidden_size
    dummy = case.optimizer == "dummy"
    params = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY} if dummy else {}
    is_dummy, has_callable = case.scheduler in ("dummy", "callable"), case.scheduler == "callable"
    scheduler = SchedulerFact(
        is_dummy, has_callable, "LambdaLR", TOTAL_STEPS, WARMUP_STEPS, max_lr=LEARNING_RATE, params={}
    )
    return Facts(
        world_size=case.world_size,
        split_batches=case.split_batches,
        accumulation_steps=case.accumulation,
        accumulation_typed=case.accumulation != 1,
        loaders=tuple(LoaderFact(size, shuffled) for size, shuffled in case.loaders),
        model=ModelFact(FEATURES**2, FEATURES**2, hidden, "model.config"),
        optimizer=None if case.optimizer == "none" else OptimizerFact(dummy, "SGD", params),
        scheduler=None if case.scheduler == "none" else scheduler,
    )


def our_prepare(case: Case) -> Outcome:
    def compute() -> dict[str, Any]:
        plugin = construct(DeepSpeedPlugin, case, case.prefix)
        plugin.auto_policy = "accelerate"
        return resolve(plugin, our_facts(case)).config

    return outcome(compute)


# --- generated cases --------------------------------------------------------------------------------------------


def some_of(random: random.Random, choices: Mapping[str, Iterable[Any]], share: float) -> dict[str, Any]:
    """A few of the keys, each with one of its values."""
    return {key: random.choice(list(values)) for key, values in choices.items() if random.random() < share}


ARGUMENTS = {
    "gradient_accumulation_steps": (1, 2, 4, "auto"),
    "gradient_clipping": (0, 0.5, 1.0, "auto"),
    "zero_stage": (0, 1, 2, 3),
    "is_train_batch_min": (False,),
    "offload_optimizer_device": ("none", "cpu", "nvme"),
    "offload_param_device": ("none", "cpu"),
    "offload_optimizer_nvme_path": ("/nvme",),
    "zero3_init_flag": (True, False),
    "zero3_save_16bit_model": (True, False),
    "enable_msamp": (True,),
    "msamp_opt_level": ("O1", "O2", "O3"),
}
VARIABLES = {
    "GRADIENT_ACCUMULATION_STEPS": ("1", "1", "3", "auto"),
    "GRADIENT_CLIPPING": ("0.25", "0", "auto"),
    "DEEPSPEED_ZERO_STAGE": ("1", "3"),
    "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("cpu", "none"),
    "DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("cpu", "none"),
    "DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": ("/disk",),
    "DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": ("/disk",),
    "DEEPSPEED_ZERO3_INIT": ("true", "false", "1", "maybe"),
    "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": ("true", "false"),
    "FP8_BACKEND": ("MSAMP", "TE"),
    "CONFIG_DS_FIELDS": ("zero_stage", "deepspeed_multinode_launcher"),
}
TOP_LEVEL = {
    "train_batch_size": ("auto", 8, 16),
    "train_micro_batch_size_per_gpu": ("auto", "auto", 4),
    "gradient_accumulation_steps": ("auto", 1, 2),
    "gradient_clipping": ("auto", 0, 1.5),
    "steps_per_print": (10, 2000),
    "wall_clock_breakdown": (False,),
    "zero_allow_untested_optimizer": (True, False),
}
ZERO = {
    "stage": (0, 1, 2, 3, "auto"),
    "reduce_bucket_size": ("auto", 1000),
    "stage3_prefetch_bucket_size": ("auto", 2000),
    "stage3_param_persistence_threshold": ("auto", 3000),
    "stage3_gather_16bit_weights_on_model_save": ("auto", True, False),
    "overlap_comm": (True,),
    "sub_group_size": (1000, "auto"),  # nobody serves that `auto`
}
OFFLOAD = {"device": ("cpu", "nvme", "none", "auto"), "nvme_path": ("/nvme", "auto")}
PRECISION = {"enabled": (True, False, "auto"), "loss_scale": (0,), "auto_cast": (True,)}
OPTIMIZER_PARAMS = {"lr": ("auto", 0.1), "weight_decay": ("auto", 0.0), "betas": ("auto", [0.9, 0.99])}
SCHEDULER_PARAMS = {
    "warmup_min_lr": ("auto", 0),
    "warmup_max_lr": ("auto", 0.5),
    "warmup_num_steps": ("auto", 9),
    "total_num_steps": ("auto", 99),
}


def generated_document(random: random.Random, share: float) -> dict[str, Any]:
    document = some_of(random, TOP_LEVEL, 0.6)
    if random.random() < 0.97:
        zero = some_of(random, {k: v for k, v in ZERO.items() if k != "sub_group_size"}, 0.4)
        zero |= some_of(random, {"sub_group_size": ZERO["sub_group_size"]}, 0.1)
        if random.random() < 0.85:
            zero.setdefault("stage", random.choice((2, 3)))
        for part in ("offload_optimizer", "offload_param"):
            if random.random() < 0.3:
                zero[part] = some_of(random, OFFLOAD, 0.7)
        document["zero_optimization"] = zero
    for name in ("fp16", "bf16"):
        if random.random() < 0.25:
            document[name] = some_of(random, PRECISION, 0.7)
    if random.random() < share:
        document["optimizer"] = {"type": "AdamW", "params": some_of(random, OPTIMIZER_PARAMS, 0.5)}
    if random.random() < share:
        document["scheduler"] = {"type": "WarmupLR", "params": some_of(random, SCHEDULER_PARAMS, 0.6)}
    return document


def plugin_case(seed: int) -> Case:
    draw = random.Random(seed)
    return Case(
        document=generated_document(draw, 0.3) if draw.random() < 0.65 else None,
        arguments=some_of(draw, ARGUMENTS, 0.25),
        environment=some_of(draw, VARIABLES, 0.25),
        prefix=draw.choice(("ZEROACCEL_", "ACCELERATE_")),
        precision=draw.choice(("no", "no", "bf16", "fp16", "fp8")),
    )


def prepare_case(seed: int) -> Case:
    draw = random.Random(seed)
    document = generated_document(draw, 0.4) if draw.random() < 0.8 else None
    arguments = some_of(draw, {k: v for k, v in ARGUMENTS.items() if "msamp" not in k}, 0.15)
    has_optimizer, has_scheduler = "optimizer" in (document or {}), "scheduler" in (document or {})
    # Mostly what fits the config, so that refusals do not crowd out the rest.
    optimizer = ("dummy" if has_optimizer else "real") if draw.random() < 0.85 else draw.choice(("none", "real"))
    unlisted = ("none", "callable" if has_optimizer else "real")
    fitting = ("dummy", "dummy", "dummy", "callable") if has_scheduler else unlisted
    scheduler = draw.choice(fitting) if draw.random() < 0.9 else draw.choice(("none", "real", "dummy", "callable"))
    loaders: list[tuple[int | None, bool]] = []
    if draw.random() < 0.9:
        loaders.append((draw.choice((2, 4, 6)) if draw.random() < 0.95 else None, True))
    if loaders and draw.random() < 0.4:
        loaders.insert(draw.randrange(2), (draw.choice((1, 8)), False))
    return Case(
        document=document,
        arguments=arguments,
        precision=draw.choice(("no", "no", "bf16")),
        world_size=draw.choice((1, 2, 4)),
        split_batches=draw.random() < 0.2,
        accumulation=draw.choice((1, 1, 3)),
        loaders=tuple(loaders),
        hidden_size=draw.choice((16, 30, (8, 64, 32), None)),
        optimizer=optimizer,
        scheduler=scheduler,
    )
