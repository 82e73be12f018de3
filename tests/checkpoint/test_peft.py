"""LoRA with the `peft` package: a frozen base with adapters trains, is saved and goes on, on every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool, device
from tests.parity.problem import full_weights

VOCABULARY = 31


@dataclass(frozen=True)
class Run:
    """How the model is made and trained.

    Attributes:
        stage: ZeRO stage.
        born: stage 3 splits the base while it is built.
        offload: of parameters and optimizer.
        checkpointing: activations are computed again, from inputs that need gradients.
    """

    stage: int
    born: bool = False
    offload: str = "none"
    checkpointing: bool = False


def base(folder: str = "") -> Any:
    """A small Llama: from its config, or from a folder with its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base's weights."""
    folder = str(tmp_path_factory.mktemp("base"))
    base().save_pretrained(folder)
    return folder


def adapted(model: Any, checkpointing: bool = False) -> Any:
    """The model with adapters, and one layer that is trained whole."""
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(12)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def tokens(number: int, rank: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(10 * number + rank))


def loss_of(model: Any, number: int, rank: int) -> torch.Tensor:
    batch = tokens(number, rank).to(device())
    loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    # The epsilon is as large as the gradients, so that one of a wrong size changes the step.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, eps=0.1)


Weights = dict[str, torch.Tensor]


def reference(steps: int, initial: Weights) -> Any:
    """Plain PyTorch, on the mean of both ranks' losses. In the tests' own process, where nothing is partitioned."""
    model = adapted(base())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = optimizer_of(model)
    for number in range(steps):
        torch.stack([loss_of(model, number, rank) for rank in range(2)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def prepared(run: Run, folder: str = "") -> Any:
    """An `Accelerator`, its model, of `base(folder)`, and optimizer."""
    from tests.engine.small import accelerator

    running = accelerator(
        zero_stage=run.stage,
        zero3_init_flag=run.born,
        zero3_save_16bit_model=True,
        offload_optimizer_device=run.offload,
        offload_param_device=run.offload if run.stage == 3 else "none",
    )
    config = running.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 2
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = base(folder)
    assert all(hasattr(p, "ds_id") == run.born for p in model.parameters())
    model = adapted(model, run.checkpointing)
    return running, *running.prepare(model, optimizer_of(model))


def train(running: Any, model: Any, optimizer: Any, numbers: range) -> None:
    model.train()
    for number in numbers:
        running.backward(loss_of(model, number, running.process_index))
        optimizer.step()
        optimizer.zero_grad()


def distance(weights: Weights, wanted: Any) -> float:
    """Largest difference of a weight; the adapters have moved."""
    expected = dict(wanted.named_parameters())
    assert set(weights) == set(expected)
    assert any("lora_B" in name and value.abs().max() > 1e-3 for name, value in weights.items())
    return max(float((weights[name] - value.detach()).abs().max()) for name, value in expected.items())


def trained(run: Run) -> tuple[Weights, Weights]:
    """All weights before and after."""
    running, model, optimizer = prepared(run)
    initial = full_weights(model)
    train(running, model, optimizer, range(3))
    return initial, full_weights(model)


SELECTED = [Run(2), Run(3, born=True), Run(3, born=True, checkpointing=True)]
FULL = [Run(0), Run(1), Run(3), Run(2, checkpointing=True), Run(2, offload="cpu"), Run(3, born=True, offload="cpu")]


def check_training(run: Run, ranks: RankPool) -> None:
    for initial, weights in ranks.run(trained, run=run):
        assert distance(weights, reference(3, initial)) < 2e-6


@pytest.mark.parametrize("run", SELECTED, ids=str)
def test_adapters_train_as_in_plain_pytorch(ranks: RankPool, run: Run) -> None:
    check_training(run, ranks)


@pytest.mark.full
@pytest.mark.parametrize("run", FULL, ids=str)
def test_adapters_train_everywhere(ranks: RankPool, run: Run) -> None:
    check_training(run, ranks)


def saved(run: Run, base_folder: str, folder: str) -> tuple[Weights, Weights]:
    """The ways in which scripts save adapters; training goes on behind them."""
    from zeroaccel.errors import UsageError

    running, model, optimizer = prepared(run, base_folder)
    initial = full_weights(model)
    train(running, model, optimizer, range(2))
    unwrapped = running.unwrap_model(model)
    options = {"is_main_process": running.is_main_process, "save_function": running.save}
    unwrapped.save_pretrained(f"{folder}/given", state_dict=running.get_state_dict(model), **options)
    running.wait_for_everyone()
    if run.stage == 3 and running.is_main_process:
        with pytest.raises(UsageError, match="get_state_dict"):
            unwrapped.save_pretrained(f"{folder}/refused")
    with running.gathered_parameters(model):
        unwrapped.save_pretrained(f"{folder}/gathered", **options)
    running.wait_for_everyone()
    train(running, model, optimizer, range(2, 3))
    return initial, full_weights(model)


@pytest.mark.parametrize("run", [Run(2), Run(3, born=True)], ids=str)
def test_adapter_files_hold_the_adapters(ranks: RankPool, base_folder: str, tmp_path: Path, run: Run) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    initial, weights = ranks.run(saved, run=run, base_folder=base_folder, folder=str(tmp_path))[0]
    assert distance(weights, reference(3, initial)) < 2e-6
    expected = reference(2, initial).eval()
    for kind in ("given", "gathered"):
        found = load_file(tmp_path / kind / "adapter_model.safetensors")
        assert sum("lora_" in name for name in found) == 8
        assert all(value.numel() for value in found.values())
        again = PeftModel.from_pretrained(base(base_folder), str(tmp_path / kind)).eval()
        with torch.no_grad():
            answers = [model(input_ids=tokens(5, 0)).logits for model in (again, expected)]
        torch.testing.assert_close(*answers, rtol=0, atol=5e-6)


def begun(run: Run, base_folder: str, folder: str, exclude: bool) -> Weights:
    running, model, optimizer = prepared(run, base_folder)
    initial = full_weights(model)
    train(running, model, optimizer, range(2))
    running.save_state(folder, exclude_frozen_parameters=exclude)
    return initial


def resumed(run: Run, base_folder: str, folder: str) -> Weights:
    running, model, optimizer = prepared(run, base_folder)
    running.load_state(folder)
    train(running, model, optimizer, range(2, 4))
    return full_weights(model)


@pytest.mark.parametrize(
    ("first", "second", "exclude"),
    [
        (Run(3, born=True), Run(2), False),
        (Run(2), Run(3, born=True), True),
        pytest.param(Run(2), Run(2), True, marks=pytest.mark.full),
        pytest.param(Run(3, born=True), Run(3, born=True), True, marks=pytest.mark.full),
        pytest.param(Run(3), Run(3, born=True, offload="cpu"), False, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_a_run_goes_on(
    ranks: RankPool, base_folder: str, tmp_path: Path, first: Run, second: Run, exclude: bool
) -> None:
    options = {"base_folder": base_folder, "folder": str(tmp_path)}
    initial = ranks.run(begun, run=first, exclude=exclude, **options)[0]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    trained_size = sum(value.nbytes for name, value in initial.items() if "lora_" in name or "modules_to_save" in name)
    frozen_size = sum(value.nbytes for value in initial.values()) - trained_size
    assert size > 3 * trained_size  # masters and two moments
    assert (size < 3 * trained_size + frozen_size) is exclude
    assert distance(ranks.run(resumed, run=second, **options)[0], reference(4, initial)) < 2e-6
