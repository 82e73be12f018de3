"""Estimates of memory against what two CPU ranks really hold, and activations against what PyTorch keeps."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensor

from tests.distributed.pool import RankPool
from zeroaccel.engine.estimate import (
    DTYPE_BYTES,
    PARAMETER_SWAP_BUFFERS,
    Batch,
    Estimate,
    ModelShape,
    Setting,
    activations,
    combinations,
    estimate,
)
from zeroaccel.engine.pretrained import kept_activations, shape_of
from zeroaccel.errors import ConfigError

WIDTH, LAYERS = 1024, 4
SHAPE = ModelShape(LAYERS * WIDTH * WIDTH, largest_parameter=WIDTH * WIDTH, largest_layer=WIDTH * WIDTH)
BUCKET = 100_000
SWAP_BUFFER = 2_000_000  # DeepSpeed's own is 100 million, and has to be there in full


def held() -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors of this process by address, which nobody else gets as long as they are kept."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    tensors = [each for each in tensors if not isinstance(each, FakeTensor)]  # of torch.compile, without memory
    for tensor in tensors:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None and each.device.type == "cpu":
                found[each.untyped_storage().data_ptr()] = each.untyped_storage()
    return found


def config_of(stage: int, offload: str, dtype: str, folder: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if offload == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": folder}
        zero["offload_param"] = {**zero["offload_optimizer"], "buffer_size": SWAP_BUFFER}
    elif offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
        if "param" in offload:
            zero["offload_param"] = {"device": "cpu"}
    return {"zero_optimization": zero, "bf16": {"enabled": dtype == "bfloat16"}}


def held_in_training(stage: int, offload: str, dtype: str, folder: str) -> int:
    """Bytes of the tensors that one rank holds between a backward pass and its step, once all states exist."""
    from tests.engine.small import accelerator

    gc.collect()
    before = held()
    prepared = accelerator(config_of(stage, offload, dtype, folder))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    batches = torch.utils.data.DataLoader(torch.zeros(8, WIDTH), batch_size=1)
    engine, optimizer, _ = prepared.prepare(model, torch.optim.AdamW(model.parameters()), batches)
    for step in range(2):
        if step:
            optimizer.step()
            optimizer.zero_grad()
        prepared.backward(engine(torch.ones(1, WIDTH, dtype=getattr(torch, dtype))).float().mean())
    gc.collect()
    size = sum(storage.nbytes() for address, storage in held().items() if address not in before)
    optimizer.step()
    prepared.free_memory()
    return size


def kept_by_estimate(need: Estimate) -> int:
    """What of an estimate is there between a backward pass and the step: on CPU ranks host and device are one."""
    gpu, host, stage = need.gpu, need.host, need.setting.stage
    kept = gpu.weights + gpu.gradients + gpu.masters + gpu.optimizer
    kept += gpu.buffers - (DTYPE_BYTES[need.setting.dtype] * BUCKET if stage == 2 else 0)  # stage 2 lets go of it
    kept += host.weights + host.gradients + host.masters + host.optimizer + host.buffers
    if need.setting.offload == "nvme":
        kept -= DTYPE_BYTES[need.setting.dtype] * (PARAMETER_SWAP_BUFFERS - 5 * SWAP_BUFFER)
    return kept


CASES = [(stage, offload, dtype) for dtype in ("bfloat16", "float32") for stage, offload in combinations()]
QUICK = [case for case in CASES if case[2] == "bfloat16"]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.full) for case in CASES], ids=str
)
def test_the_estimate_is_what_two_ranks_hold(case: tuple[int, str, str], ranks: RankPool, tmp_path: Path) -> None:
    stage, offload, dtype = case
    expected = kept_by_estimate(estimate(SHAPE, Setting(stage, offload, dtype, 2, reduce_bucket=BUCKET)))
    found = ranks.run(held_in_training, stage=stage, offload=offload, dtype=dtype, folder=str(tmp_path))
    for size in found:
        assert size == pytest.approx(expected, rel=0.005)


def test_a_peak_is_never_below_what_is_kept_and_splitting_never_costs() -> None:
    shape = ModelShape(7 * 10**9, largest_parameter=131_072_000, largest_layer=202_383_360)
    for stage, offload in combinations():
        needs = [estimate(shape, Setting(stage, offload, gpus_per_node=count)) for count in (1, 2, 8, 64)]
        for need in needs:
            gpu = need.gpu
            assert gpu.total >= gpu.weights + gpu.gradients + gpu.masters + gpu.optimizer
            assert min(vars(gpu).values()) >= 0
        totals = [need.gpu.total for need in needs]
        assert totals == sorted(totals, reverse=True) or stage == 0


@pytest.mark.parametrize(
    ("setting", "bytes_a_parameter"),
    [
        # 2 + 2 + 12 bytes, of which each stage divides one more term by 64 ranks (the ZeRO paper, figure 1).
        (Setting(0, gpus_per_node=64), 16.0),
        (Setting(1, gpus_per_node=64), 4 + 12 / 64),
        (Setting(2, gpus_per_node=64), 2 + 14 / 64),
        (Setting(3, gpus_per_node=64), 16 / 64),
    ],
    ids=str,
)
def test_model_states_are_those_of_the_zero_paper(setting: Setting, bytes_a_parameter: float) -> None:
    gpu = estimate(ModelShape(64 * 10**8), setting).gpu
    assert (gpu.weights + gpu.gradients + gpu.masters + gpu.optimizer) / 64e8 == pytest.approx(bytes_a_parameter)


def test_without_zero_init_the_whole_model_is_there_first() -> None:
    shape = ModelShape(70 * 10**9)
    split, whole = (estimate(shape, Setting(3, gpus_per_node=8, nodes=8, zero_init=flag)) for flag in (True, False))
    assert whole.gpu.total > 140e9 > split.gpu.total
    assert (split.host.total, whole.host.total) == (0, 4 * shape.parameters)
    assert whole.node_host == 8 * 4 * shape.parameters


# --- activations ------------------------------------------------------------------------------------------------------


def llama(device: str, attention: str) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=344,
        vocab_size=1000,
        attn_implementation=attention,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def kept_on_cpu(model: Any, batch: Batch, dtype: str) -> int:
    model = model.to(getattr(torch, dtype)).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.zeros(batch.micro_batch, batch.seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_of_a_model_are_counted_without_running_it(attention: str, dtype: str) -> None:
    batch = Batch(2, 96, eager_attention=attention == "eager")
    model = llama("meta", attention)
    counted = kept_activations(model, batch, dtype)
    assert counted == pytest.approx(kept_on_cpu(llama("cpu", attention), batch, dtype), rel=0.01)
    # The formula is one of fused kernels.
    assert 1.0 < counted / activations(shape_of(model), batch, dtype) < 1.5
    assert activations(shape_of(model), batch, dtype, counted) == counted


def test_checkpointing_keeps_the_layers_inputs_and_one_layer() -> None:
    shape = ModelShape(1, hidden_size=1024, num_layers=24, num_heads=16, vocab_size=0)
    tokens = 512 * 4
    whole = activations(shape, Batch(4, 512), "float16")
    assert whole == tokens * 1024 * (34 * 24 + 4)
    assert activations(shape, Batch(4, 512, checkpointing=True), "float16") == tokens * 1024 * (2 * 24 + 34 + 4)
    eager = activations(shape, Batch(4, 512, eager_attention=True), "float16")
    assert eager - whole == 24 * 5 * 16 * 512 * 512 * 4


def test_a_model_of_other_inputs_is_not_counted() -> None:
    with torch.device("meta"):
        assert kept_activations(nn.Linear(4, 4), Batch(1, 8), "float32") is None


@pytest.mark.parametrize(
    ("shape", "batch", "options"),
    [
        (ModelShape(1), Batch(1, 8), "--hidden_size and --num_layers"),
        (ModelShape(1, hidden_size=8), Batch(1, 8), "--num_layers"),
        (ModelShape(1, hidden_size=8, num_layers=2), Batch(1, 8, eager_attention=True), "--num_heads"),
    ],
)
def test_a_missing_size_is_named(shape: ModelShape, batch: Batch, options: str) -> None:
    with pytest.raises(ConfigError, match=f"add {options}$"):
        activations(shape, batch, "float32")
