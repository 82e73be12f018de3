"""A state dict of a model that stage 3 has split is never silently empty."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint import models
from tests.distributed.pool import RankPool
from tests.engine.small import accelerator
from zeroaccel.errors import UsageError

USES = {
    "torch.save": lambda state, folder: torch.save(state, folder / "weights.pt"),
    "nested": lambda state, folder: torch.save({"model": state, "step": 1}, folder / "weights.pt"),
    "safetensors": lambda state, folder: _safetensors().save_file(state, folder / "weights.safetensors"),
    "a copy": lambda state, folder: {name: value.cpu() for name, value in state.items()},
    "clones": lambda state, folder: {name: value.clone() for name, value in state.items()},
    "deepcopy": lambda state, folder: copy.deepcopy(state),
    "numpy": lambda state, folder: {name: value.numpy() for name, value in state.items()},
    "arithmetic": lambda state, folder: sum(value.sum() for value in state.values()),
    "part": lambda state, folder: [value.view(-1)[:1].contiguous().cpu() for value in state.values()],
    "item": lambda state, folder: [value.flatten()[0].item() for value in state.values()],
}


def _safetensors() -> Any:
    import safetensors.torch

    return safetensors.torch


def _model(how: str) -> tuple[Any, Any]:
    """An accelerator and a split model: an engine, its module, a submodule, or one that was born and not prepared."""
    if how == "born":
        running = accelerator(zero_stage=3)
        with running.zero_init():
            return running, models.everything()
    running, model, _ = models.trained(3, steps=0)
    unwrapped = running.unwrap_model(model)
    return running, {"engine": model, "unwrapped": unwrapped, "submodule": unwrapped.hidden}[how]


def _use(how: str, folder: str) -> dict[str, str]:
    _, model = _model(how)
    state, told = model.state_dict(), {}
    for name, use in USES.items():
        try:
            use(state, Path(folder))
        except UsageError as error:
            told[name] = str(error)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        else:
            told[name] = "nothing"
    whole = nn.Linear(7, 7, bias=False) if how == "submodule" else models.everything()
    with pytest.raises((RuntimeError, UsageError)):
        whole.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model.module if how == "engine" else model)
    names = [name.removeprefix("module.") for name in state]
    assert names == list(whole.state_dict())
    for name, value in whole.state_dict().items():
        shown = state[f"module.{name}" if how == "engine" else name]
        assert (shown.shape, shown.dtype, shown.numel()) == (value.shape, value.dtype, value.numel()), name
        assert repr(shown)
    return told


@pytest.mark.parametrize("how", ["engine", "unwrapped", "submodule", "born"])
def test_whoever_uses_a_value_is_told_what_to_write(ranks: RankPool, tmp_path: Path, how: str) -> None:
    for told in ranks.run(_use, how=how, folder=str(tmp_path)):
        for use, text in told.items():
            assert "accelerator.get_state_dict(model)" in text, f"{use}: {text}"
            assert "has only name and shape" in text, f"{use}: {text}"


def _gathered(folder: str) -> None:
    """Inside the block everything is as without stage 3."""
    running, model, _ = models.trained(3, steps=0)
    with running.gathered_parameters(model):
        copied, state = copy.deepcopy(running.unwrap_model(model)), model.module.state_dict()
        torch.save(state, f"{folder}/{running.process_index}.pt")
    loaded = torch.load(f"{folder}/{running.process_index}.pt", weights_only=True)
    for name, value in models.everything().state_dict().items():
        assert torch.equal(value, loaded[name].cpu()), name
        assert torch.equal(value, copied.state_dict()[name].cpu()), name
    if not hasattr(copied.hidden.weight, "ds_id"):
        torch.save(copied.state_dict(), f"{folder}/copy_{running.process_index}.pt")


def test_inside_gathered_parameters_it_is_whole(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_gathered, folder=str(tmp_path))
    assert len(list(tmp_path.glob("copy_*"))) == 2


def _transformers(folder: str) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    running = accelerator(zero_stage=3, zero3_save_16bit_model=True)
    running.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    model = GPT2LMHeadModel._from_config(config)
    told = _saved(model, f"{folder}/empty")
    model = running.prepare(model)
    assert _saved(running.unwrap_model(model), f"{folder}/empty") == told
    state = running.get_state_dict(model)  # None on the other rank, which writes nothing
    main = running.is_main_process
    running.unwrap_model(model).save_pretrained(
        f"{folder}/whole", is_main_process=main, state_dict=state, save_function=running.save
    )
    return told


def _saved(model: Any, folder: str) -> str:
    """What rank 0, the only one that writes, is told."""
    try:
        model.save_pretrained(folder)
    except UsageError as error:
        return str(error)
    return ""


def test_save_pretrained_without_a_state_dict_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(_transformers, folder=str(tmp_path))
    assert "accelerator.get_state_dict(model)" in first
    assert second == ""
    assert not list(tmp_path.glob("empty/*.safetensors"))
    assert list(tmp_path.glob("whole/*.safetensors"))
