"""Regional compilation: against Accelerate's functions, and in training with and without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import accelerate.utils as theirs
import accelerate.utils.other as their_other
import pytest
import torch
from torch import nn

from tests.distributed.pool import RankPool, reset_states
from zeroaccel.engine import compilation as ours
from zeroaccel.engine.modules import has_compiled_regions, is_compiled_module
from zeroaccel.engine.unwrap import extract_model_from_parallel

WIDTH, BLOCKS, STEPS = 8, 3, 2
ran_eagerly: list[str] = []  # classes whose forward ran uncompiled, in order


def note(module: nn.Module) -> None:
    """What is compiled does not come here."""
    if not torch.compiler.is_compiling():
        ran_eagerly.append(type(module).__name__)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        note(self)
        return x + self.down(torch.tanh(self.up(x)))


class Wide(Block):
    pass


class Body(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.nothing = None
        self.register_module("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.absent is None
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    """Blocks two levels down, a layer before and one after them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = Body(list(blocks))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        note(self)
        return self.last(self.body(self.first(x)))


def net() -> Net:
    """The same weights at every call, on every rank."""
    torch.manual_seed(3)
    return Net(*(Block() for _ in range(BLOCKS)))


def unlike() -> Net:
    """No two layers of one class."""
    torch.manual_seed(3)
    return Net(nn.Linear(WIDTH, WIDTH), nn.Tanh())


MODELS: dict[str, Any] = {
    "blocks": net,
    "one block": lambda: Net(Block()),
    "no blocks": Net,
    "unequal": lambda: Net(Block(), nn.Tanh()),
    "a subclass after its base": lambda: Net(Block(), Wide()),
    "a subclass before its base": lambda: Net(Wide(), Block()),
    "the list itself": lambda: nn.ModuleList([Block(), Block()]),
    "blocks within blocks": lambda: Net(Body([Block(), Block()]), Body([Block()])),
    "a block twice": lambda: Net(*[Block()] * 2),
    "sequential": lambda: nn.Sequential(Block(), Block()),
    "dictionary": lambda: nn.ModuleDict({"a": Block(), "b": Block()}),
    "without a list": lambda: nn.Linear(2, 2),
}


def described(module: nn.Module) -> list[Any]:
    """Names and classes of modules, and which parameters they have."""
    modules = [(name, type(inner)) for name, inner in module.named_modules(remove_duplicate=False)]
    return modules + [(name, id(parameter)) for name, parameter in module.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("name", list(MODELS))
def test_regions_are_accelerates(name: str) -> None:
    model = MODELS[name]()
    lists = [inner for inner in model.modules() if isinstance(inner, nn.ModuleList)]
    for inner in [model, *lists]:
        assert ours.is_repeated_blocks(inner) is their_other.is_repeated_blocks(inner)
        assert ours.has_repeated_blocks(inner) is their_other.has_repeated_blocks(inner)
    before = described(model)
    made = ours.compile_regions(model, backend="eager")
    expected = their_other.compile_regions(model, backend="eager")
    assert described(made) == described(expected)
    assert type(made) is type(expected)
    assert made._orig_mod is expected._orig_mod is model
    assert described(model) == before
    assert is_compiled_module(made) is theirs.is_compiled_module(expected)
    assert has_compiled_regions(made) is theirs.has_compiled_regions(expected) is True


@pytest.mark.parametrize("name", list(MODELS))
def test_regions_in_place_are_accelerates(name: str) -> None:
    found = []
    for compile_in_place in (ours.compile_regions_deepspeed, their_other.compile_regions_deepspeed):
        model = MODELS[name]()
        assert compile_in_place(model, backend="eager") is None
        found.append([name for name, inner in model.named_modules() if inner._compiled_call_impl is not None])
    assert found[0] == found[1] != []


class Indexed(Net):
    """Beside the blocks there is all that can be indexed."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())
        self.heads = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Tanh()})
        self.tails = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Tanh()])
        self.row = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(2.0))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.row[0](self.heads["a"](x)) * self.scales[0]
        for tail in self.tails:
            x = tail(x)
        return super().forward(self.row(x))


def test_lists_and_dictionaries_beside_the_blocks_stay_what_they_are() -> None:
    """Accelerate's cannot run: what torch.compile makes of them has no items."""
    model, x = Indexed(), torch.randn(2, WIDTH)
    made = ours.compile_regions(model, backend="eager")
    assert torch.equal(made(x), model(x))
    assert is_compiled_module(made.heads["a"])
    with pytest.raises(TypeError, match="OptimizedModule"):
        their_other.compile_regions(model, backend="eager")(x)
    ours.compile_regions_deepspeed(model, backend="eager")
    assert torch.equal(model(x), made(x))


class Stages(nn.Module):
    """Levels that are lists themselves, as U-Nets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList([Block(), nn.Tanh()]) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, activation in self.levels:  # type: ignore[misc]
            x = activation(block(x))
        return x


def test_lists_within_a_list_are_compiled_inside() -> None:
    model, x = Stages(), torch.randn(2, WIDTH)
    expected = model(x)
    made = ours.compile_regions(model, backend="eager")
    assert torch.equal(made(x), expected)
    assert is_compiled_module(made.levels[1][0])
    ours.compile_regions_deepspeed(model, backend="eager")
    ran_eagerly.clear()
    assert torch.equal(model(x), expected)
    assert ran_eagerly == []


def test_a_forward_on_the_instance_runs_the_compiled_blocks() -> None:
    model = net()
    model.forward = MethodType(Net.forward, model)  # type: ignore[method-assign]
    made = ours.compile_regions(model, backend="eager")
    ran_eagerly.clear()
    made(torch.randn(2, WIDTH))
    assert ran_eagerly == ["Net"]
    model(torch.randn(2, WIDTH))
    assert ran_eagerly == ["Net", "Net", *["Block"] * BLOCKS]


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["bare", "wrapped"])
def test_a_model_with_compiled_regions_is_unwrapped(wrap: Any, recursive: bool) -> None:
    model = net()
    made = ours.compile_regions(wrap(model), backend="eager")
    kept = extract_model_from_parallel(made, recursive=recursive)
    assert type(kept) is Net
    assert kept._orig_mod is model
    assert has_compiled_regions(kept)
    expected = theirs.extract_model_from_parallel(their_other.compile_regions(wrap(model), backend="eager"))
    assert expected._orig_mod is kept._orig_mod
    assert extract_model_from_parallel(made, keep_torch_compile=False, recursive=recursive) is model
    assert not has_compiled_regions(model)


def plugin(backend: str, regional: bool = True) -> Any:
    from zeroaccel.config.options import TorchDynamoPlugin

    torch._dynamo.reset()
    ran_eagerly.clear()
    return TorchDynamoPlugin(backend=backend, use_regional_compilation=regional)


def train(accelerator: Any, model: Any, optimizer: Any, steps: int = STEPS, seed: int = 0) -> list[float]:
    """Losses."""
    losses = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(100 * (seed + number) + accelerator.process_index)
        x = torch.randn(4, WIDTH, generator=generator).to(accelerator.device)
        loss = model(x).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain(backend: str, precision: str = "no", model: Any = net, regional: bool = True) -> tuple[Any, Any, Any, Any]:
    """Accelerator, the user's model, what became of it, and its optimizer."""
    from zeroaccel import Accelerator

    reset_states()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, dynamo_plugin=plugin(backend, regional))
    own = model()
    prepared, optimizer = accelerator.prepare(own, torch.optim.AdamW(own.parameters(), lr=1e-2))
    return accelerator, own, prepared, optimizer


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_without_deepspeed_blocks_are_compiled_and_weights_are_the_same(backend: str, precision: str) -> None:
    accelerator, expected, model, optimizer = plain("no", precision)
    assert model is expected
    losses = train(accelerator, model, optimizer)
    assert ran_eagerly == ["Net", *["Block"] * BLOCKS] * STEPS
    accelerator, own, model, optimizer = plain(backend, precision)
    torch.testing.assert_close(train(accelerator, model, optimizer), losses, rtol=0, atol=1e-6)
    assert ran_eagerly == ["Net"] * STEPS
    assert not is_compiled_module(model)
    assert has_compiled_regions(model)
    assert_close(own.state_dict(), expected.state_dict())
    assert model(torch.ones(1, WIDTH)).dtype == torch.float32


def test_equal_blocks_share_one_compiled_code() -> None:
    accelerator, _, model, optimizer = plain("eager")
    torch._dynamo.utils.counters.clear()
    train(accelerator, model, optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # the block, and the layers around


def test_a_model_without_repeated_blocks_is_compiled_whole() -> None:
    accelerator, own, model, optimizer = plain("eager", model=unlike)
    train(accelerator, model, optimizer)
    assert ran_eagerly == []
    assert is_compiled_module(model)
    assert accelerator.unwrap_model(model, keep_torch_compile=False) is own


def test_without_the_option_blocks_are_not_told_apart() -> None:
    accelerator, _, model, optimizer = plain("eager", regional=False)
    train(accelerator, model, optimizer)
    assert ran_eagerly == []
    assert is_compiled_module(model)


def test_the_launcher_can_ask_for_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroaccel import Accelerator

    reset_states()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    model = Accelerator(cpu=True).prepare(net())
    assert type(model) is Net
    assert has_compiled_regions(model)


@pytest.mark.parametrize("keep_torch_compile", [True, False])
def test_autocast_can_be_kept_or_not(keep_torch_compile: bool) -> None:
    accelerator, own, model, _ = plain("eager", "bf16")
    x = torch.randn(2, WIDTH)
    in_fp32, in_bf16 = net()(x), model(x)
    assert not torch.equal(in_fp32, in_bf16)
    kept = accelerator.unwrap_model(model, keep_torch_compile=keep_torch_compile)
    assert kept is (model if keep_torch_compile else own)
    assert torch.equal(kept(x), in_bf16)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=keep_torch_compile)
    assert bare is kept
    ran_eagerly.clear()
    assert torch.equal(bare(x), in_fp32)
    assert ran_eagerly == ["Net", *["Block"] * (0 if keep_torch_compile else BLOCKS)]


def test_what_was_prepared_is_left_alone() -> None:
    accelerator, own, model, _ = plain("eager", "bf16")
    forward = own.forward
    assert accelerator.prepare(model) is model
    assert accelerator.prepare(own) is own
    assert own.forward is forward


def test_without_deepspeed_weights_have_their_own_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from zeroaccel.checkpoint.load_weights import load_checkpoint_in_model

    accelerator, own, model, optimizer = plain("eager")
    train(accelerator, model, optimizer)
    names = list(net().state_dict())
    assert list(accelerator.unwrap_model(model, keep_torch_compile=False).state_dict()) == names
    accelerator.save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == set(names)
    assert_close(saved, own.state_dict())
    _, fresh, other, _ = plain("eager")
    load_checkpoint_in_model(other, tmp_path, strict=True)
    assert_close(fresh.state_dict(), own.state_dict())


@pytest.mark.parametrize("regional", [True, False], ids=["regions", "whole"])
def test_without_deepspeed_the_state_dict_has_the_models_names(regional: bool) -> None:
    accelerator, own, model, _ = plain("eager", regional=regional)
    found = accelerator.get_state_dict(model)
    assert list(found) == list(net().state_dict())
    assert_close(found, own.state_dict())


@pytest.mark.parametrize(("saves", "loads"), [("eager", "eager"), ("eager", "no"), ("no", "eager")])
def test_without_deepspeed_a_run_goes_on(tmp_path: Path, saves: str, loads: str) -> None:
    accelerator, own, model, optimizer = plain(saves)
    train(accelerator, model, optimizer)
    accelerator.save_state(tmp_path)
    losses = train(accelerator, model, optimizer, seed=5)
    accelerator, other, model, optimizer = plain(loads)
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(train(accelerator, model, optimizer, seed=5), losses, rtol=0, atol=1e-6)
    assert_close(other.state_dict(), own.state_dict())
    assert "Block" in ran_eagerly or loads == "eager"


def engine(stage: int, backend: str, precision: str = "no", model: Any = net) -> tuple[Any, Any, Any, Any]:
    """As `plain`, on ranks."""
    from tests.engine.small import accelerator

    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
    config |= {"bf16": {"enabled": precision == "bf16"}}
    made = accelerator(config, {"dynamo_plugin": plugin(backend)}, cast_inputs=True)
    own = model()
    prepared, optimizer = made.prepare(own, torch.optim.AdamW(own.parameters(), lr=1e-2))
    return made, own, prepared, optimizer


def let_go(accelerator: Any) -> None:
    """Leaves the rank to other tests as it was: compiled code keeps its modules, and tensors without memory."""
    accelerator.free_memory()
    torch._dynamo.reset()


def trained(stage: int, backend: str, precision: str, whole: bool = False) -> dict[str, Any]:
    """What a rank has after training."""
    from tests.parity.problem import full_weights

    accelerator, own, model, optimizer = engine(stage, backend, precision, unlike if whole else net)
    losses = train(accelerator, model, optimizer)
    compiled = [name for name, inner in own.named_modules() if inner._compiled_call_impl is not None]
    found = {
        "losses": losses,
        "eager": ran_eagerly[:],
        "compiled": compiled,
        "weights": full_weights(model),
        "own": [accelerator.unwrap_model(model, keep_torch_compile=keep) is own for keep in (True, False)],
        "names": list(own.state_dict()),
        "state": accelerator.get_state_dict(model),
    }
    let_go(accelerator)
    return found


REGIONS = ["first", *(f"body.layers.{number}" for number in range(BLOCKS)), "last"]


@pytest.mark.parametrize(
    ("stage", "backend", "precision"),
    [
        pytest.param(2, "aot_eager", "no", marks=pytest.mark.full),
        (2, "eager", "bf16"),
        pytest.param(3, "eager", "no", marks=pytest.mark.full),
        (3, "aot_eager", "bf16"),
    ],
)
def test_under_deepspeed_blocks_are_compiled_and_weights_are_the_same(
    ranks: RankPool, stage: int, backend: str, precision: str
) -> None:
    expected = ranks.run(trained, stage=stage, backend="no", precision=precision)
    found = ranks.run(trained, stage=stage, backend=backend, precision=precision)
    names = list(net().state_dict())
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert other["eager"] == ["Net", *["Block"] * BLOCKS] * STEPS
        assert (one["eager"], one["compiled"]) == (["Net"] * STEPS, REGIONS)
        torch.testing.assert_close(one["losses"], other["losses"], rtol=0, atol=1e-6)
        assert_close(one["weights"], other["weights"])
        assert one["own"] == [True, True]
        assert one["names"] == names
        if rank == 0:
            assert list(one["state"]) == names
            assert_close({name: value.float() for name, value in one["state"].items()}, one["weights"])


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_under_deepspeed_a_model_without_repeated_blocks_is_compiled_whole(ranks: RankPool, stage: int) -> None:
    expected = ranks.run(trained, stage=stage, backend="no", precision="no", whole=True)
    found = ranks.run(trained, stage=stage, backend="eager", precision="no", whole=True)
    for one, other in zip(found, expected, strict=True):
        assert other["eager"] == ["Net"] * STEPS
        assert (one["eager"], one["compiled"]) == ([], [""])
        assert_close(one["weights"], other["weights"])


def save_and_go_on(stage: int, saves: str, loads: str, folder: str) -> tuple[Any, ...]:
    """Losses after the checkpoint in the run that saved it and in the one that loads it, and what is in the files."""
    from safetensors.torch import load_file

    from tests.parity.problem import full_weights

    accelerator, _, model, optimizer = engine(stage, saves)
    train(accelerator, model, optimizer)
    accelerator.save_state(folder)
    accelerator.save_model(model, f"{folder}/weights")
    accelerator.wait_for_everyone()
    saved, weights = load_file(f"{folder}/weights/model.safetensors"), full_weights(model)
    losses = train(accelerator, model, optimizer, seed=5)
    let_go(accelerator)
    accelerator, _, model, optimizer = engine(stage, loads)
    accelerator.load_state(folder)
    again = train(accelerator, model, optimizer, seed=5)
    eager = ran_eagerly[:]
    let_go(accelerator)
    return losses, again, saved, weights, eager


@pytest.mark.parametrize(
    ("stage", "saves", "loads"),
    [
        (2, "eager", "no"),
        (2, "no", "eager"),
        pytest.param(3, "eager", "no", marks=pytest.mark.full),
        pytest.param(3, "no", "eager", marks=pytest.mark.full),
    ],
)
def test_under_deepspeed_a_run_goes_on(ranks: RankPool, tmp_path: Path, stage: int, saves: str, loads: str) -> None:
    for losses, again, saved, weights, eager in ranks.run(
        save_and_go_on, stage=stage, saves=saves, loads=loads, folder=str(tmp_path)
    ):
        torch.testing.assert_close(again, losses, rtol=0, atol=1e-6)
        assert_close(saved, weights)
        assert set(eager) == ({"Net"} if loads == "eager" else {"Net", "Block"})
