"""Models that answer at stage 3: prepared without an optimizer, evaluated between steps, generating."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.pool import RankPool, device
from tests.engine.small import accelerator, loader, net, samples, train_step

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def running(precision: str = "no", **plugin: Any) -> Any:
    """An `Accelerator` at stage 3 that splits small parameters too."""
    made = accelerator(options={"mixed_precision": precision}, zero_stage=3, **plugin)
    made.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return made


def wide() -> Any:
    """Large enough that a rank's share of a weight goes to the disk."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 1031), nn.Linear(1031, 1))


# --- prepare(model), with and without a loader ------------------------------------------------------------------------


def answered(offload: str, born: bool, precision: str, folder: str) -> None:
    path = folder if offload == "nvme" else None
    made = running(precision, offload_param_device=offload, offload_param_nvme_path=path)
    if offload == "nvme":  # else buffers of GiB, for each model
        made.deepspeed_config["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    make = wide if offload == "nvme" else net
    plain = make().to(device(), DTYPES[precision])
    with made.state.deepspeed_plugin.zero3_init_context_manager(enable=born):
        models = [make(), make()]
    alone = made.prepare(models[0])
    model, batches = made.prepare(models[1], loader(4))
    assert model.train_micro_batch_size_per_gpu() == 4  # which the first one, without a loader, did not decide
    if offload == "nvme":
        assert any(p.ds_tensor.status.name == "NOT_AVAILABLE" for p in model.parameters()), "nothing is on the disk"
    with torch.no_grad():
        for (x,) in batches:
            x = x.to(DTYPES[precision])
            for each in (alone, model):
                torch.testing.assert_close(each(x), plain(x), rtol=0, atol=1e-6)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    made.free_memory()


@pytest.mark.parametrize(
    ("offload", "born", "precision"),
    [
        *(("none", born, "no") for born in (True, False)),
        *(("cpu", True, precision) for precision in ("no", "bf16", "fp16")),
        *(("nvme", born, "no") for born in (True, False)),
    ],
)
def test_answers_are_those_of_the_whole_model(
    ranks: RankPool, tmp_path: Path, offload: str, born: bool, precision: str
) -> None:
    ranks.run(answered, offload=offload, born=born, precision=precision, folder=str(tmp_path))


def inference_of_the_guide(path: str) -> None:
    """A config file for training serves inference, too."""
    made = accelerator(config=path)
    dataset, plain = samples(22), net().to(device())
    model, batches = made.prepare(net(), DataLoader(dataset, batch_size=4))
    model.eval()
    answers = []
    for (x,) in batches:
        with torch.no_grad():
            answers.append(made.gather_for_metrics(model(x)))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(answers), plain(dataset.tensors[0].to(device())), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_config_file_serves_inference(ranks: RankPool, tmp_path: Path, device: str) -> None:
    config = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                "device": device,
                **({"nvme_path": str(tmp_path), "buffer_size": 1_000_000} if device == "nvme" else {}),
            },
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    ranks.run(inference_of_the_guide, path=str(path))


def only_evaluated(stage: int) -> None:
    made = accelerator(zero_stage=stage)
    made.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    model, plain = made.prepare_model(net(), evaluation_mode=True), net().to(device())
    x = torch.ones(3, 8, device=device())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)
    assert hasattr(next(model.parameters()), "ds_id") is (stage == 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_that_is_only_evaluated(ranks: RankPool, stage: int) -> None:
    ranks.run(only_evaluated, stage=stage)


def evaluated_between_steps() -> None:
    made, plain = running(), net().to(device())
    model = net()
    optimizer, peer = (torch.optim.AdamW(each.parameters(), lr=0.1, eps=0.1) for each in (model, plain))
    model, optimizer, _ = made.prepare(model, optimizer, loader(4))
    inputs = samples(8).tensors[0].to(device())
    for _ in range(3):
        train_step(made, model, optimizer, inputs)
        plain(inputs).pow(2).mean().backward()
        peer.step()
        peer.zero_grad()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(inputs), plain(inputs), rtol=0, atol=1e-5)
        model.train()


def test_evaluation_between_steps(ranks: RankPool) -> None:
    ranks.run(evaluated_between_steps)


# --- generation -------------------------------------------------------------------------------------------------------


def speaker() -> Any:
    """A small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(29)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 3}}


def said(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(4)
    text: torch.Tensor = model.generate(prompt, max_new_tokens=16, pad_token_id=1, **options)
    return text


def stop_of(plain: Any, prompt: torch.Tensor, rank: int) -> int:
    """A token that ends this rank's greedy text sooner than the other rank's."""
    return int(said(plain, prompt, synced_gpus=False, eos_token_id=None)[0, 3 + (1 if rank == 0 else 12)])


@contextmanager
def gathered_for_generation(made: Any, model: Any) -> Any:
    """As libraries for reinforcement learning do: whole weights, and DeepSpeed's hooks out of the way meanwhile."""
    import deepspeed

    offload = getattr(model.optimizer, "parameter_offload", model.optimizer)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        yield made.unwrap_model(model)
        offload._register_deepspeed_module(offload.module)


def generated(how: str, precision: str, flag: bool, trained: bool) -> None:
    made = running(precision, zero3_init_flag=flag)
    made.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    with made.state.deepspeed_plugin.zero3_init_context_manager(enable=False):
        plain, model = speaker().to(device(), DTYPES[precision]), speaker()
    prompt = torch.tensor([[3, 4, 5]], device=device()) + made.process_index
    stop = stop_of(plain, prompt, made.process_index)
    if trained:
        model, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    else:
        model = made.prepare(model)
    lengths = []
    for _ in range(2):
        for options in WAYS.values():
            wanted = said(plain, prompt, synced_gpus=False, eos_token_id=stop, **options)
            if how == "gathered":
                with gathered_for_generation(made, model) as whole:
                    found = said(whole, prompt, eos_token_id=stop, **options)
            else:
                found = said(
                    model if how == "engine" else made.unwrap_model(model), prompt, eos_token_id=stop, **options
                )
            assert torch.equal(found, wanted)
            lengths.append(found.shape[1])
        if trained:
            made.backward(model(input_ids=prompt, labels=prompt).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert (lengths[0] < 8) is (made.process_index == 0)  # the ranks end at different lengths
    made.free_memory()


def alone_while_gathered() -> None:
    """With whole weights one rank may run the model by itself; then training goes on."""
    made, inputs = running(), samples(8).tensors[0].to(device())
    made.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    model = net()
    model, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        train_step(made, model, optimizer, inputs)
        with torch.no_grad():
            model(inputs)
        with torch.no_grad(), gathered_for_generation(made, model) as whole:
            answers = [whole(inputs) for _ in range(2 * made.is_main_process)]
        assert len(answers) == 2 * made.is_main_process


def test_one_rank_answers_while_weights_are_gathered(ranks: RankPool) -> None:
    ranks.run(alone_while_gathered, timeout=40)


@pytest.mark.parametrize(
    ("how", "precision", "flag", "trained"),
    [
        ("engine", "no", True, False),
        ("engine", "no", False, True),
        ("unwrapped", "bf16", False, False),
        ("unwrapped", "no", True, True),
        ("gathered", "no", True, True),
        ("gathered", "no", False, False),
    ],
)
def test_generation_that_ends_at_different_lengths(
    ranks: RankPool, how: str, precision: str, flag: bool, trained: bool
) -> None:
    ranks.run(generated, how=how, precision=precision, flag=flag, trained=trained, timeout=60)
