"""Models born partitioned have the weights that they have without partitioning, value by value, and leave nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.checkpoint.models import whole
from tests.distributed.pool import RankPool, device, reset_states
from tests.engine.small import FEATURES, accelerator, train_step
from zeroaccel import DeepSpeedPlugin
from zeroaccel.engine.shards import is_split
from zeroaccel.errors import DistributedError, UsageError
from zeroaccel.utils import logical_shape

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Own(nn.Module):
    """Weights of its own, drawn in its own way; a scalar; buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("table", torch.arange(4) / 3)
        self.register_buffer("passing", torch.full((3,), 1 / 3), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.3, 0.7)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


class LooksBack(nn.Module):
    """A constructor that goes over what its children have built already, in every way that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.own = Own()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        for name, parameter in self.named_parameters():
            if name.endswith("layers.1.weight"):
                parameter.data.mul_(0.5).clamp_(-0.1, 0.1)
        self.apply(self._draw)
        first, second, third, fourth = self.layers
        with torch.no_grad():
            first.weight[0, 1] = 9
            second.weight.copy_(third.weight)
            third.bias.zero_()
        fourth.weight.data = torch.randn(3, 3)
        fourth.bias = nn.Parameter(torch.ones(first.weight.shape[0]) / math.sqrt(first.weight.numel()))
        first.weight.requires_grad_(False)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.02)


class Copies(nn.Module):
    """`nn.Transformer` copies layers that are built, and draws all weights anew; so do many libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(
            d_model=4, nhead=2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=8, batch_first=True
        )
        self.copy = copy.deepcopy(self.inner.encoder.layers[0])
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))


class Assigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Own()


def assigned() -> nn.Module:
    """What a script does to a model after it is built."""
    model = Assigned()
    model.extra = nn.Parameter(torch.rand(3))
    model.inner.weight = nn.Parameter(torch.rand(2, 2))
    model.head = nn.Linear(2, 2)
    model.head.weight.data = torch.rand(6, 2)  # another shape
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(3, 5),
    "reset_parameters, a scalar, buffers": Own,
    "tied": Tied,
    "a constructor that looks back": LooksBack,
    "copies": Copies,
    "assigned afterwards": assigned,
    "sequential": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.LSTM(3, 4)),
}


def _differences(model: nn.Module, reference: nn.Module, dtype: torch.dtype) -> list[str]:
    """Names of parameters and buffers that are not the reference's, to the bit."""
    wrong = [name for name, parameter in model.named_parameters() if not is_split(parameter) or parameter.numel()]
    shapes = {name: tuple(logical_shape(parameter)) for name, parameter in model.named_parameters()}
    wanted = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    wrong += [f"shape of {name}" for name in wanted if shapes.get(name) != wanted[name]]
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    wrong += [f"{n}.requires_grad" for n, p in reference.named_parameters() if p.requires_grad != frozen[n]]
    parameters = {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    found, expected = whole(model), reference.state_dict()
    for name, value in expected.items():
        value = value.to(dtype) if name in parameters else value
        if found[name].dtype != value.dtype or not torch.equal(found[name].cpu(), value):
            wrong.append(name)
    passing = zip(model.named_buffers(), reference.named_buffers(), strict=True)
    wrong += [name for (name, one), (_, other) in passing if not torch.equal(one.cpu(), other)]
    return wrong


def _born(kind: str, precision: str, offload: str, path: str) -> list[str]:
    running = accelerator(
        options={"mixed_precision": precision},
        zero_stage=3,
        offload_param_device=offload,
        offload_param_nvme_path=path or "none",
    )
    if offload == "nvme":  # else buffers of GiB
        running.deepspeed_config["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    torch.manual_seed(5)
    reference = MODELS[kind]()
    torch.manual_seed(5 + 7 * running.process_index)  # rank 0's weights hold
    with running.zero_init():
        model = MODELS[kind]()
    return _differences(model, reference, DTYPES[precision])


CASES = [
    *((kind, "no", "none") for kind in MODELS),
    *((kind, "bf16", "cpu") for kind in ("reset_parameters, a scalar, buffers", "a constructor that looks back")),
    ("copies", "fp16", "none"),
    ("a constructor that looks back", "bf16", "nvme"),
]


@pytest.mark.parametrize(("kind", "precision", "offload"), CASES)
def test_weights_are_those_of_the_whole_model(
    ranks: RankPool, tmp_path: Any, kind: str, precision: str, offload: str
) -> None:
    path = str(tmp_path) if offload == "nvme" else ""
    assert ranks.run(_born, kind=kind, precision=precision, offload=offload, path=path) == [[], []]


def _trained(born: bool, precision: str, offload: str) -> dict[str, torch.Tensor]:
    from tests.engine.small import Net

    running = accelerator(
        options={"mixed_precision": precision},
        zero_stage=3,
        offload_param_device=offload,
        offload_optimizer_device=offload,
    )
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    torch.manual_seed(3)
    with running.zero_init() if born else running.deepspeed_plugin.zero3_init_context_manager(enable=False):
        model = Net()
        assert is_split(model.first.weight) is born
    torch.manual_seed(4)
    model.last = nn.Linear(16, 1)  # built outside: split and cast by prepare()
    model.register_buffer("late", torch.ones(2))
    prepared, optimizer = running.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    dtype = DTYPES[precision]
    for step in range(3):
        generator = torch.Generator().manual_seed(2 * step + running.process_index)
        x = torch.randn(4, FEATURES, generator=generator).to(device(), dtype)
        train_step(running, prepared, optimizer, x)
    return whole(prepared)


@pytest.mark.parametrize(("precision", "offload"), [("no", "none"), ("bf16", "none"), ("fp16", "cpu")])
def test_it_trains_as_one_that_was_split_later(ranks: RankPool, precision: str, offload: str) -> None:
    born = ranks.run(_trained, born=True, precision=precision, offload=offload)
    later = ranks.run(_trained, born=False, precision=precision, offload=offload)
    for one, other in zip(born, later, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=0, atol=0, msg=name)


T = TypeVar("T")


def _residue(native: bool) -> list[str]:
    """What is left in the process after a block, ours or DeepSpeed's own (which transformers enters)."""
    import deepspeed

    running = accelerator(zero_stage=3)
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    names = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
    before = {name: getattr(torch, name) for name in names}
    apply, moving = nn.Module.apply, nn.Module._apply
    initial, lstm = nn.Linear.__init__, nn.LSTM._apply
    weights = nn.Linear(4, 4)
    x = torch.randn(2, 3, 4)
    y = F.linear(x, weights.weight, weights.bias)
    config = {**running.deepspeed_config, "gradient_accumulation_steps": 1}
    config.pop("train_batch_size")
    with deepspeed.zero.Init(config_dict_or_path=config) if native else running.zero_init():
        nn.Linear(3, 3, device="meta")
        inside = nn.Linear(3, 3)

    class Open(nn.Module, Generic[T]):
        pass

    left = [name for name in names if getattr(torch, name) is not before[name]]
    left += ["apply"] * (nn.Module.apply is not apply) + ["_apply"] * (nn.Module._apply is not moving)
    left += ["__init__"] * (nn.Linear.__init__ is not initial) + ["LSTM._apply"] * (nn.LSTM._apply is not lstm)
    left += [name for kind in (nn.Module, nn.Linear) for name in kind.__dict__ if name.startswith("_old_")]
    left += ["__init_subclass__"] * ("__init_subclass__" in nn.Module.__dict__)
    left += ["born"] * (not is_split(inside.weight)) + ["outside"] * is_split(nn.Linear(3, 3).to("cpu").weight)
    left += ["generic"] * (Open[int] is None)
    again = F.linear(x, weights.weight, weights.bias)
    left += ["linear"] * (type(again.grad_fn) is not type(y.grad_fn) or not torch.equal(again, y))
    return left


@pytest.mark.parametrize("native", [False, True])
def test_nothing_is_left_behind(ranks: RankPool, native: bool) -> None:
    assert ranks.run(_residue, native=native) == [[], []]


def _nested() -> list[bool]:
    """Which of the models built one after the other are split."""
    running = accelerator(zero_stage=3, zero3_init_flag=False)
    plugin = running.deepspeed_plugin
    built = [nn.Linear(2, 2)]
    with running.zero_init():
        built.append(nn.Sequential(nn.Linear(2, 2))[0])
        with plugin.zero3_init_context_manager(enable=False):
            built.append(nn.Sequential(nn.Linear(2, 2))[0])
            with plugin.zero3_init_context_manager(enable=True):
                built.append(nn.Sequential(nn.Linear(2, 2))[0])
            built.append(nn.Sequential(nn.Linear(2, 2))[0])
        built.append(nn.Sequential(nn.Linear(2, 2))[0])
        with pytest.raises(KeyError), plugin.zero3_init_context_manager(enable=False):
            raise KeyError
        built.append(nn.Sequential(nn.Linear(2, 2))[0])
    with pytest.raises(KeyError), running.zero_init():
        raise KeyError
    built.append(nn.Linear(2, 2))
    assert plugin.zero3_init_flag is False
    with plugin.zero3_init_context_manager(enable=True):
        built.append(nn.Linear(2, 2))
    return [is_split(layer.weight) for layer in built]


def test_blocks_nest_and_end_with_an_exception_too(ranks: RankPool) -> None:
    expected = [False, True, False, True, False, True, True, False, True]
    assert ranks.run(_nested) == [expected, expected]


def _without(stage: int | None) -> bool:
    from zeroaccel import Accelerator

    reset_states()
    running = Accelerator() if stage is None else accelerator(zero_stage=stage)
    with running.zero_init():
        model = nn.Linear(2, 2)
    assert tuple(logical_shape(model.weight)) == (2, 2)
    return is_split(model.weight)


@pytest.mark.parametrize("stage", [None, 0, 2])
def test_below_stage_3_nothing_happens(ranks: RankPool, stage: int | None) -> None:
    assert ranks.run(_without, stage=stage) == [False, False]


def test_without_deepspeed_nothing_happens() -> None:
    assert _without(None) is False


def test_a_plugin_without_an_accelerator_is_told_so() -> None:
    reset_states()
    plugin = DeepSpeedPlugin(zero_stage=3)
    with pytest.raises(UsageError, match="make `Accelerator"), plugin.zero3_init_context_manager(enable=True):
        pass
    with plugin.zero3_init_context_manager(enable=False):
        assert not is_split(nn.Linear(2, 2).weight)


def _different() -> str:
    running = accelerator(zero_stage=3)
    with pytest.raises(DistributedError) as caught, running.zero_init():
        nn.Sequential(nn.Linear(2, 2 + running.process_index))
    return str(caught.value)


def test_ranks_that_build_different_models_are_told_so(ranks: RankPool) -> None:
    for told in ranks.run(_different):
        assert "rank 0: a rank builds a parameter of shape (2, 2)" in told
        assert "build the same model on all ranks" in told


class Wraps(nn.Module):
    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.again = nn.Parameter(self.inner.weight.clone() if copied else self.inner.weight)


def _wrapped() -> tuple[int, ...]:
    running = accelerator(zero_stage=3)
    with pytest.raises(UsageError, match=r"Wraps.again is empty.*clone"), running.zero_init():
        Wraps(copied=False)
    with running.zero_init():
        return tuple(logical_shape(Wraps(copied=True).again))


def test_a_parameter_made_from_a_split_one_is_not_silently_empty(ranks: RankPool) -> None:
    assert ranks.run(_wrapped) == [(2, 2), (2, 2)]


def _large() -> list[int]:
    """How many parameters are whole while a constructor goes over all of them."""
    from zeroaccel.engine import birth

    birth._WHOLE_AT_A_TIME = 20
    running, seen = accelerator(zero_stage=3), []

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(6)])
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.25)
                seen.append(sum(p.ds_status.name == "AVAILABLE" for p in self.parameters()))

    try:
        with running.zero_init():
            model = Large()
    finally:
        birth._WHOLE_AT_A_TIME = 2**28
    assert all(torch.all(value == 0.25) for value in whole(model).values())
    return seen


def test_a_constructor_that_looks_back_does_not_gather_the_whole_model(ranks: RankPool) -> None:
    assert ranks.run(_large) == [[1, 2, 2, 2, 2, 2]] * 2
