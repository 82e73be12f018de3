"""`Accelerator`: what its arguments mean, what it shows, and what it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.pool import RankPool, reset_states
from zeroaccel import Accelerator, DataLoaderConfiguration, DeepSpeedPlugin, DistributedType
from zeroaccel.config.options import (
    AutocastKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from zeroaccel.errors import ConfigError, UnsupportedError, UsageError
from zeroaccel.local_sgd import LocalSGD
from zeroaccel.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    reset_states()
    yield
    reset_states()


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("precision", {"mixed_precision": "fp32"}, ConfigError, r"'fp32' is unknown: choose from \['no', 'fp8'"),
    (
        "accumulation twice",
        {"gradient_accumulation_steps": 2, "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=3)},
        ConfigError,
        "gradient_accumulation_steps=2 and a gradient_accumulation_plugin were both passed",
    ),
    (
        "plugin twice",
        {"deepspeed_plugin": DeepSpeedPlugin(), "deepspeed_plugins": {"a": DeepSpeedPlugin()}},
        ConfigError,
        "deepspeed_plugin and deepspeed_plugins were both passed",
    ),
    (
        "no steps",
        {"gradient_accumulation_steps": 0},
        ConfigError,
        "gradient_accumulation_steps=0: write a whole number",
    ),
    (
        "no steps in the plugin",
        {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=-2)},
        ConfigError,
        "gradient_accumulation_steps=-2: write a whole number",
    ),
    ("no plugin", {"deepspeed_plugin": {"zero_stage": 2}}, TypeError, "must be a DeepSpeedPlugin, got int"),
    ("fsdp", {"fsdp_plugin": object()}, UnsupportedError, "fsdp_plugin: this library trains with DeepSpeed ZeRO only"),
    ("no handler", {"kwargs_handlers": [1]}, TypeError, "takes KwargsHandler objects, got int"),
    (
        "handler twice",
        {"kwargs_handlers": [AutocastKwargs(), AutocastKwargs()]},
        ConfigError,
        "two AutocastKwargs: pass one",
    ),
    (
        "dynamo twice",
        {"dynamo_backend": "eager", "dynamo_plugin": TorchDynamoPlugin()},
        ConfigError,
        "dynamo_backend and dynamo_plugin were both passed",
    ),
    ("dynamo unknown", {"dynamo_backend": "fast"}, ConfigError, "'fast' is unknown: choose from"),
]


@pytest.mark.parametrize(("options", "error", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Accelerator(cpu=True, **options)


def test_without_plugin_or_launcher_it_is_plain_pytorch() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.NO
    assert accelerator.device == torch.device("cpu")
    assert accelerator.deepspeed_plugin is accelerator.deepspeed_config is None
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (1, 0, 0)
    assert accelerator.is_main_process
    assert accelerator.is_local_main_process
    assert accelerator.is_last_process
    assert not accelerator.use_distributed
    assert accelerator.explain() is None
    assert copy.deepcopy(accelerator) is accelerator


def test_plain_models_keep_their_class_and_move() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    assert accelerator.prepare(model) is model
    assert accelerator.prepare(None, "text") == (None, "text")


def test_plain_device_placement_is_per_object() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="1 flags for 2 objects"):
        accelerator.prepare(nn.Linear(1, 1), nn.Linear(1, 1), device_placement=[True])


def test_plain_bf16_computes_in_bf16_and_returns_fp32() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inner = nn.Linear(4, 4)
    seen = []
    inner.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model = accelerator.prepare(nn.Sequential(inner))
    assert model(torch.ones(1, 4)).dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert accelerator.native_amp
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    kept = accelerator.unwrap_model(model)
    assert kept.forward(torch.ones(1, 4)).dtype == torch.float32
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert bare.forward is not None
    assert seen[-1] == torch.bfloat16
    bare(torch.ones(1, 4))
    assert seen[-1] == torch.float32


def test_plain_fp16_scales_and_reports_a_skipped_step() -> None:
    accelerator = Accelerator(
        cpu=True, mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0, growth_interval=1)]
    )
    assert accelerator.scaler.get_scale() == 1024.0
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    accelerator.backward(model(torch.full((1, 2), torch.inf)).sum())
    optimizer.step()
    assert optimizer.step_was_skipped
    assert accelerator.optimizer_step_was_skipped
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    accelerator.backward(model(torch.ones(1, 2)).sum())
    accelerator.unscale_gradients(optimizer)
    assert torch.allclose(model.weight.grad, torch.ones(1, 2))
    optimizer.step()
    assert not optimizer.step_was_skipped
    assert not torch.equal(model.weight, before)


def test_a_compiled_model_trains() -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend="eager")
    user_model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(user_model, torch.optim.SGD(user_model.parameters(), lr=0.1))
    assert isinstance(model, torch._dynamo.OptimizedModule)
    assert accelerator.unwrap_model(model, keep_torch_compile=False) is user_model
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()


def test_accumulation_can_come_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Accelerator(cpu=True).gradient_accumulation_steps == 1
    reset_states()
    assert Accelerator(cpu=True, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    reset_states()
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    assert accelerator.gradient_accumulation_steps == 4
    assert not accelerator.gradient_state.sync_with_dataloader
    reset_states()
    monkeypatch.setenv("ZEROACCEL_GRADIENT_ACCUMULATION_STEPS", "5")
    assert Accelerator(cpu=True).gradient_accumulation_steps == 5


def test_a_launchers_accumulation_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROACCEL_GRADIENT_ACCUMULATION_STEPS", "abc")
    with pytest.raises(ConfigError, match="ZEROACCEL_GRADIENT_ACCUMULATION_STEPS is 'abc': write a whole number"):
        Accelerator(cpu=True)


def test_a_second_accelerator_keeps_the_accumulation() -> None:
    first = Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert Accelerator().gradient_accumulation_steps == 4
    assert first.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=0"):
        first.gradient_accumulation_steps = 0


def test_what_scripts_with_several_strategies_ask_has_answers() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.parallelism_config is accelerator.torch_device_mesh is None
    assert not accelerator.is_fsdp2
    assert not accelerator.is_composable_parallelism_enabled
    assert accelerator.fp8_backend == "NO"
    assert accelerator.should_save_model
    with accelerator.maybe_context_parallel(buffers=[torch.ones(1)], buffer_seq_dims=[0]):
        pass
    with pytest.raises(UnsupportedError, match="LOMO does not go with ZeRO"):
        accelerator.lomo_backward(torch.ones(1), 0.1)


def test_local_sgd_does_nothing_alone_and_is_refused_under_deepspeed() -> None:
    accelerator = Accelerator(cpu=True)
    with LocalSGD(accelerator=accelerator, model=None, local_sgd_steps=8) as local_sgd:
        local_sgd.step()
    parallel: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with LocalSGD(accelerator=parallel, model=None, local_sgd_steps=8, enabled=False) as local_sgd:
        local_sgd.step()
    with pytest.raises(UnsupportedError, match="gradient_accumulation_steps spares as much traffic"):
        LocalSGD(accelerator=parallel, model=None, local_sgd_steps=8)


def test_a_block_can_be_profiled(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[ProfileKwargs(output_trace_dir=str(tmp_path / "traces"))])
    with accelerator.profile() as profiler:
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert any(event.key == "aten::mm" for event in profiler.key_averages())
    assert "aten::mm" in (tmp_path / "traces" / "profile_0.json").read_text()


def test_the_project_configuration_is_kept() -> None:
    accelerator = Accelerator(cpu=True, project_dir="out")
    assert (accelerator.project_dir, accelerator.logging_dir, accelerator.save_iteration) == ("out", "out", 0)
    reset_states()
    config = ProjectConfiguration(project_dir="a", logging_dir="b", iteration=3)
    accelerator = Accelerator(cpu=True, project_config=config)
    assert (accelerator.project_dir, accelerator.logging_dir, accelerator.save_iteration) == ("a", "b", 3)


def test_the_loader_configuration_is_shown() -> None:
    config = DataLoaderConfiguration(split_batches=True, even_batches=False, non_blocking=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    assert accelerator.split_batches
    assert not accelerator.even_batches
    assert accelerator.non_blocking
    accelerator.even_batches = True
    assert config.even_batches


def test_an_unprepared_dummy_without_deepspeed_is_refused() -> None:
    from zeroaccel.engine.optimizer import DummyOptim
    from zeroaccel.engine.scheduler import DummyScheduler

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="DummyOptim stands for the optimizer of a DeepSpeed config"):
        accelerator.prepare(model, DummyOptim(model.parameters()))
    with pytest.raises(ConfigError, match="DummyScheduler stands for the scheduler of a DeepSpeed config"):
        accelerator.prepare(DummyScheduler(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_a_second_accelerator_cannot_change_the_run() -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    assert Accelerator().mixed_precision == "bf16"
    with pytest.raises(ConfigError, match="mixed_precision='fp16' comes too late, the run has 'bf16'"):
        Accelerator(mixed_precision="fp16")


def test_reading_the_state_too_early_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"create `accelerator = Accelerator\(\)` before"):
        AcceleratorState()


HELD = """
import warnings
from zeroaccel import Accelerator, DeepSpeedPlugin
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2,
                              deepspeed_plugin=DeepSpeedPlugin(gradient_accumulation_steps=4))
    import torch
    model = torch.nn.Linear(2, 1)
    accelerator.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(1, 2)).sum())
print(type(model).__name__, accelerator.num_processes, accelerator.gradient_accumulation_steps)
print(*(warning.message for warning in caught), sep="\\n")
"""


def test_one_process_needs_no_launcher() -> None:
    """A plugin alone starts a world of one; the plugin's accumulation holds, and the loser is named."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *warned = done.stdout.splitlines()
    assert first == "DeepSpeedEngine 1 4"
    assert any("gradient_accumulation_steps: 4" in line and "not 2" in line for line in warned), done.stdout


# --- on two ranks with DeepSpeed ---------------------------------------------------------------------------------


def shows_what_runs() -> None:
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=3)
    accelerator = Accelerator(
        deepspeed_plugin=plugin, mixed_precision="bf16", kwargs_handlers=[InitProcessGroupKwargs()]
    )
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    assert accelerator.num_processes == 2
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.deepspeed_plugin is plugin
    assert accelerator.deepspeed_config is plugin.deepspeed_config
    assert "ds_config" in repr(accelerator.state)
    assert "'stage': 2" in repr(accelerator.state)
    assert accelerator.deepspeed_engine_wrapped is None
    model = nn.Linear(2, 1)
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert accelerator.deepspeed_engine_wrapped is not None
    assert accelerator.deepspeed_engine_wrapped.engine is model
    resolved = accelerator.explain()
    assert resolved is not None
    shown = {entry.key: entry for entry in resolved.entries}
    assert shown["train_batch_size"].value == 2 * 3 * 2
    assert "2 (micro-batch) x 3 (accumulation) x 2 (ranks)" in shown["train_batch_size"].reason
    assert shown["gradient_accumulation_steps"].source
    assert AcceleratorState().deepspeed_plugin is plugin
    assert Accelerator().deepspeed_plugin is plugin
    with pytest.raises(UnsupportedError, match="a second Accelerator shares the plugins of the first"):
        Accelerator(deepspeed_plugin=DeepSpeedPlugin())
    accelerator.gradient_accumulation_steps = 5
    assert (model.gradient_accumulation_steps(), model.train_batch_size()) == (5, 2 * 5 * 2)
    assert accelerator.deepspeed_config["gradient_accumulation_steps"] == plugin.gradient_accumulation_steps == 5
    assert accelerator.deepspeed_config["train_batch_size"] == 2 * 5 * 2
    resolved = accelerator.explain()
    assert resolved is not None
    assert {entry.key: entry.source for entry in resolved.entries}["train_batch_size"] == "the script"


def chooses_among_named_plugins() -> None:
    plugins = {"student": DeepSpeedPlugin(zero_stage=2), "teacher": DeepSpeedPlugin(zero_stage=3)}
    accelerator = Accelerator(deepspeed_plugins=plugins)
    assert accelerator.deepspeed_plugin is plugins["student"]
    accelerator.state.select_deepspeed_plugin("teacher")
    assert accelerator.deepspeed_plugin is plugins["teacher"]
    assert not plugins["student"].selected
    assert accelerator.state.get_deepspeed_plugin("student") is plugins["student"]
    with pytest.raises(ConfigError, match=r"no DeepSpeed plugin is called 'x'; there are \['student', 'teacher'\]"):
        accelerator.state.select_deepspeed_plugin("x")


def several_ranks_without_plugin_are_data_parallel() -> None:
    accelerator = Accelerator()
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    assert accelerator.deepspeed_plugin is not None
    assert accelerator.deepspeed_plugin.zero_stage == 0
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), float(accelerator.process_index))).sum())
    before = model.module.weight.detach().clone()
    optimizer.step()
    assert torch.allclose(before - model.module.weight, torch.full((1, 2), 0.05))


def misuse_is_refused() -> None:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    assert accelerator.deepspeed_config is not None
    accelerator.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    with pytest.raises(UsageError, match="backward needs a model that was prepared with its optimizer"):
        accelerator.backward(torch.zeros((), requires_grad=True))
    model = nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    output = model(torch.ones(1, 2))
    with pytest.raises(ConfigError, match=r"scalar loss, got shape \(1, 2\)"):
        accelerator.backward(output)
    with pytest.raises(UnsupportedError, match=r"backward\(create_graph=\.\.\.\) does not exist"):
        accelerator.backward(output.sum(), create_graph=True)
    accelerator.backward(output.sum())
    with pytest.raises(ConfigError, match="none of a prepared model"):
        accelerator.clip_grad_norm_(nn.Linear(1, 1).parameters(), 1.0)
    with pytest.raises(UnsupportedError, match="got 1 of the 2 parameters"):
        accelerator.clip_grad_norm_([model.module.weight], 1.0)
    with pytest.raises(UnsupportedError, match="norm_type=1"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UsageError, match="backward was called after the window's gradients were clipped"):
        accelerator.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(UsageError, match="are mixed in one accumulation window"):
        model.step()
    optimizer.step()


def native_engine_calls_keep_their_meaning() -> None:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2))
    assert accelerator.deepspeed_config is not None
    accelerator.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.module.weight.detach().clone()
    for expected in (0.0, 0.1):
        model.backward(model(torch.ones(1, 2)).sum())
        model.step()
        assert torch.allclose(before - model.module.weight, torch.full((1, 2), expected))
    optimizer.step()  # nothing waits for it
    model.backward(model(torch.ones(1, 2)).sum())
    model.step()
    model.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(UsageError, match="stepped natively"):
        optimizer.step()
    with pytest.raises(UsageError, match="stepped natively"):
        accelerator.backward(model(torch.ones(1, 2)).sum())


def the_wrapped_engine_steps_where_it_is_told() -> None:
    for steps in (1, 2):
        reset_states()
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=steps))
        assert accelerator.deepspeed_config is not None
        accelerator.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        model = nn.Linear(2, 1)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = model.module.weight.detach().clone()
        assert accelerator.deepspeed_engine_wrapped is not None
        for number in range(4):
            loss = model(torch.ones(1, 2)).sum()
            accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=number % 2 == 1)
        assert model.global_steps == 2
        assert torch.allclose(before - model.module.weight, torch.full((1, 2), 2 * 0.1 * 2 / steps))


def state_can_be_reset() -> None:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=1))
    assert AcceleratorState._shared_state["deepspeed_plugins"] is accelerator.deepspeed_plugin
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert AcceleratorState._shared_state == PartialState._shared_state == GradientState._shared_state == {}
    again = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    assert again.deepspeed_plugin is not None
    assert again.deepspeed_plugin.zero_stage == 3


ON_TWO_RANKS = [
    shows_what_runs,
    chooses_among_named_plugins,
    several_ranks_without_plugin_are_data_parallel,
    misuse_is_refused,
    native_engine_calls_keep_their_meaning,
    the_wrapped_engine_steps_where_it_is_told,
    state_can_be_reset,
]


@pytest.mark.parametrize("check", ON_TWO_RANKS, ids=lambda check: check.__name__)
def test_on_two_ranks(check: Any, ranks: RankPool) -> None:
    ranks.run(check)
