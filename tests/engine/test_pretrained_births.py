"""The hand-shake with transformers: its models are born partitioned, or whole where the plugin says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.models import whole
from tests.distributed.pool import RankPool, device, reset_states
from tests.engine.small import accelerator
from zeroaccel import Accelerator, DeepSpeedPlugin
from zeroaccel.engine.shards import is_split
from zeroaccel.utils import logical_shape


def _config(kind: str) -> tuple[Any, Any]:
    """A model's class and its configuration: tied, not tied, with scalars and sub-models."""
    import transformers as t

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "gpt2":
        return t.GPT2LMHeadModel, t.GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    if kind == "llama":
        return t.LlamaForCausalLM, t.LlamaConfig(vocab_size=60, max_position_embeddings=32, **small)
    text = {**small, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**small, "image_size": 8, "patch_size": 4}
    return t.CLIPModel, t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)


def _same(model: Any, reference: Any, dtype: torch.dtype) -> None:
    parameters = {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    found, expected = whole(model), {name: value.cpu() for name, value in reference.state_dict().items()}
    assert list(found) == list(expected)
    for name, value in expected.items():
        wanted = value.to(dtype) if name in parameters else value
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name
    for (name, one), (_, other) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.cpu(), other.cpu()), name
    ties = [
        (len(list(one.parameters())), len(list(one.named_parameters(remove_duplicate=False))))
        for one in (model, reference)
    ]
    assert ties[0] == ties[1]


def _pretrained(kind: str, precision: str, offload: str, folder: str) -> None:
    """`from_pretrained` from sharded files, then larger and smaller embeddings."""
    reset_states()
    build, config = _config(kind)
    whole_run = accelerator(zero_stage=2)  # which tells transformers to build whole models again
    torch.manual_seed(1)
    reference = build(config)
    if whole_run.is_main_process:
        reference.save_pretrained(folder, max_shard_size="2KB")
    whole_run.wait_for_everyone()
    running = accelerator(
        options={"mixed_precision": precision},
        zero_stage=3,
        offload_param_device=offload,
        offload_param_nvme_path=folder,
    )
    if offload == "nvme":  # else buffers of GiB
        running.deepspeed_config["zero_optimization"]["offload_param"]["buffer_size"] = 100_000
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    model = build.from_pretrained(folder)
    assert all(is_split(parameter) and not parameter.numel() for parameter in model.parameters())
    _same(model, reference, dtype)
    with running.zero_init():
        _same(build.from_pretrained(folder), reference, dtype)
    if kind == "clip" or precision != "no":
        return
    for size in (70, 40):
        with running.deepspeed_plugin.zero3_init_context_manager(enable=False):
            resized = build.from_pretrained(folder).to(device())  # where new rows are drawn
            torch.manual_seed(2)
            resized.resize_token_embeddings(size)
        model = build.from_pretrained(folder)
        torch.manual_seed(2)
        model.resize_token_embeddings(size)
        _same(model, resized, dtype)
        assert logical_shape(model.get_output_embeddings().weight)[0] == size
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied is (kind == "gpt2")


@pytest.mark.parametrize(
    ("kind", "precision", "offload"),
    [
        *((kind, "no", "none") for kind in ("gpt2", "llama", "clip")),
        ("gpt2", "bf16", "cpu"),
        ("llama", "bf16", "none"),
        pytest.param("llama", "bf16", "nvme", marks=pytest.mark.full),
    ],
)
def test_pretrained_weights_are_those_of_the_files(
    ranks: RankPool, tmp_path: Path, kind: str, precision: str, offload: str
) -> None:
    ranks.run(_pretrained, kind=kind, precision=precision, offload=offload, folder=str(tmp_path))


def _from_config() -> None:
    """A constructor called inside the block draws what it draws whole; `from_config` what transformers draws then."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    build, config = _config("gpt2")
    torch.manual_seed(1)
    reference = build(config)
    with no_init_weights():
        later = build(config)
    torch.manual_seed(1)
    later.initialize_weights()
    later.tie_weights()
    running = accelerator(zero_stage=3)
    with running.zero_init():
        torch.manual_seed(1 + running.process_index)
        model = build(config)
    _same(model, reference, torch.float32)
    torch.manual_seed(1 + running.process_index)
    model = AutoModelForCausalLM.from_config(config)
    if device() == "cpu":  # else they are drawn by the GPU's generator
        _same(model, later, torch.float32)


def test_models_from_a_configuration(ranks: RankPool) -> None:
    ranks.run(_from_config)


def _told() -> list[tuple[bool, Any]]:
    """What transformers is told: whether, and with which bucket size, models are split."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    def look() -> tuple[bool, Any]:
        config = deepspeed_config()
        return is_deepspeed_zero3_enabled(), config and config["zero_optimization"].get("reduce_bucket_size")

    def plugin(stage: int, size: int, **options: Any) -> DeepSpeedPlugin:
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": size}, "train_batch_size": 64}
        return DeepSpeedPlugin(hf_ds_config=config, **options)

    reset_states()
    plugins = {
        "student": plugin(2, 1),
        "teacher": plugin(3, 2),
        "third": plugin(3, 3),
        "whole": plugin(3, 4, zero3_init_flag=False),
    }
    running = Accelerator(deepspeed_plugins=plugins)
    seen = [look()]
    for name in ("teacher", "third", "whole", "teacher"):
        running.state.select_deepspeed_plugin(name)
        seen.append(look())
    plugins["teacher"].deepspeed_config["zero_optimization"]["reduce_bucket_size"] = 5  # seen at once
    seen.append(look())
    with plugins["third"].zero3_init_context_manager(enable=True):
        seen.append(look())
    with plugins["third"].zero3_init_context_manager(enable=False):
        seen.append(look())
    with pytest.raises(KeyError), plugins["teacher"].zero3_init_context_manager(enable=False):
        raise KeyError
    seen.append(look())
    with plugins["student"].zero3_init_context_manager(enable=True):
        seen.append(look())
    seen.append(look())
    return seen


def test_transformers_follows_the_selected_plugin(ranks: RankPool) -> None:
    off, teacher, third, changed = (False, None), (True, 2), (True, 3), (True, 5)
    expected = [off, teacher, third, off, teacher, changed, third, off, changed, off, changed]
    assert ranks.run(_told) == [expected, expected]


def _reference() -> None:
    """With the flag off a frozen model is whole and usable without `prepare()`, beside one that is prepared."""
    build, config = _config("gpt2")
    running = accelerator(zero_stage=3, zero3_init_flag=False)
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    torch.manual_seed(1)
    frozen, policy = build._from_config(config).to(device()).eval(), build._from_config(config)
    assert not any(is_split(parameter) for parameter in [*frozen.parameters(), *policy.parameters()])
    policy, optimizer = running.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    tokens = torch.arange(8, device=device()).view(2, 4)
    for _ in range(2):
        with torch.no_grad():
            wanted = frozen(tokens).logits
        running.backward((policy(tokens).logits - wanted).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    assert frozen(tokens, labels=tokens).loss.isfinite()


def test_a_frozen_reference_model_can_stay_unprepared(ranks: RankPool) -> None:
    ranks.run(_reference)


SCRIPT = """
    import importlib.util, sys
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "accelerate" else find(name, *rest)
    sys.modules["accelerate"] = None
    from zeroaccel import Accelerator, DeepSpeedPlugin
    running = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    import gc, torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    gc.collect()
    assert is_deepspeed_zero3_enabled()
    model = GPT2LMHeadModel._from_config(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    model, optimizer = running.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = torch.arange(4).view(1, 4)
    running.backward(model(tokens, labels=tokens).loss)
    optimizer.step()
    del running
    gc.collect()
    assert is_deepspeed_zero3_enabled()
    assert "accelerate.utils" not in sys.modules
    print("trained")
"""


def test_without_accelerate_and_without_launcher(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained" in done.stdout


def _mixed() -> bool:
    """A pretrained body that is split, with a head that the script builds beside it."""
    build, config = _config("llama")
    running = accelerator(options={"mixed_precision": "bf16"}, zero_stage=3)
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 2

    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build._from_config(config)
            self.head = nn.Linear(60, 1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(tokens).logits)

    model = Reward()
    model, optimizer = running.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    loss = model(torch.arange(8, device=device()).view(2, 4)).float().mean()
    running.backward(loss)
    optimizer.step()
    return bool(loss.isfinite())


def test_a_head_beside_a_split_body_gets_its_dtype(ranks: RankPool) -> None:
    assert ranks.run(_mixed) == [True, True]
