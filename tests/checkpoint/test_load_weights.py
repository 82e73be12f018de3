"""Weights from files into models: plain ones, ones that stage 3 has split, and running ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.checkpoint import models
from tests.distributed.pool import RankPool
from zeroaccel.errors import ConfigError, UnsupportedError
from zeroaccel.utils import load_checkpoint_in_model, load_state_dict


def _other() -> dict[str, torch.Tensor]:
    """Weights that no test's model has of itself, all exact in fp32 only."""
    generator = torch.Generator().manual_seed(23)
    state = models.everything().state_dict()
    changed = {name: torch.rand(v.shape, generator=generator) for name, v in state.items() if v.is_floating_point()}
    state |= {**changed, "table": state["table"] + 1}
    state["head.weight"] = state["embedding.weight"]
    return dict(state)


def _write(folder: Path, kind: str) -> Path:
    state = _other()
    if kind == "safetensors":
        state.pop("head.weight")
        save_file(state, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "head only":
        state["head.weight"] = state.pop("embedding.weight")
        save_file(state, folder / "model.safetensors")
    else:
        where = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(state)}
        where.pop("head.weight")
        for file in set(where.values()):
            save_file({name: state[name] for name in where if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def _equal(found: dict[str, torch.Tensor]) -> None:
    for name, value in _other().items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "head only", "shards"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plain_model(tmp_path: Path, kind: str, device: str) -> None:
    with torch.device(device):
        model = models.Everything()
    if device == "meta":
        model.passing = torch.ones(3)
    load_checkpoint_in_model(model, _write(tmp_path, kind), strict=True)
    _equal(model.state_dict())
    assert model.head.weight is model.embedding.weight
    assert not model.frozen.weight.requires_grad


def test_a_file_an_index_and_a_device(tmp_path: Path) -> None:
    _write(tmp_path, "shards")
    for path, device in [("model.safetensors.index.json", None), ("model-00001-of-00002.safetensors", {"": "cpu"})]:
        load_checkpoint_in_model(models.everything(), tmp_path / path, device_map=device)
    assert set(load_state_dict(tmp_path / "model-00001-of-00002.safetensors")) < set(_other())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda state: state.pop("hidden.weight"), {"strict": True}, "hidden.weight is missing"),
        (lambda state: state.update(more=torch.ones(1)), {"strict": True}, "the model has no more"),
        (lambda state: state.update(scale=torch.ones(2)), {}, r"scale has shape \(2,\) there and \(\) in the model"),
        (lambda state: None, {"device_map": {"first": 0, "last": "cpu"}}, "leave device_map out"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, change: Any, options: dict[str, Any], message: str) -> None:
    state = _other()
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = models.everything()
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        load_checkpoint_in_model(model, tmp_path, **options)
    torch.testing.assert_close(model.state_dict(), models.everything().state_dict())


@pytest.mark.parametrize("name", ["", "nowhere", "a.index.json b.index.json"])
def test_a_folder_without_weights_is_told(tmp_path: Path, name: str) -> None:
    for file in name.split() if " " in name else ():
        (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=r"no weights|no file or folder|a\.index\.json, b\.index\.json"):
        load_checkpoint_in_model(models.everything(), tmp_path if " " in name else tmp_path / name)


def _running(folder: str, stage: int, offload: str, precision: str) -> None:
    """The weights arrive in fp32 in the masters: a step without gradient and weight decay changes nothing."""
    import deepspeed

    running, model, optimizer = models.trained(stage, offload, precision, steps=1)
    for engine_or_module in (model, running.unwrap_model(model)):
        running.backward(F.cross_entropy(model(models.tokens()).float(), models.tokens().roll(1)))
        optimizer.step()
        load_checkpoint_in_model(engine_or_module, folder, strict=True)
        _equal(models.whole(model))
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    running.backward(model(models.tokens()).float().sum() * 0)
    optimizer.step()
    wanted = _other()
    _equal(models.whole(model) | {"average": wanted["average"]})
    if stage > 0:
        for name, parameter in model.module.named_parameters():
            master = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None:
                torch.testing.assert_close(master, wanted[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("stage", "offload", "precision"),
    [
        (0, "none", "no"),
        (0, "none", "bf16"),
        (1, "none", "bf16"),
        (2, "cpu", "no"),
        (3, "none", "bf16"),
        (3, "cpu", "no"),
    ],
)
def test_a_running_model(ranks: RankPool, tmp_path: Path, stage: int, offload: str, precision: str) -> None:
    folder = str(_write(tmp_path, "safetensors"))
    ranks.run(_running, folder=folder, stage=stage, offload=offload, precision=precision)


def _born_split(folder: str) -> None:
    import deepspeed

    with deepspeed.zero.Init(dtype=torch.float32):
        model = torch.nn.Linear(5, 3)
    wanted = {"weight": torch.arange(15.0).view(3, 5), "bias": torch.ones(3)}
    if torch.distributed.get_rank() == 0:
        torch.save(wanted, f"{folder}/pytorch_model.bin")
    torch.distributed.barrier()
    load_checkpoint_in_model(model, folder, strict=True)
    torch.testing.assert_close(models.whole(model), wanted)


def test_a_model_that_was_born_split(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_born_split, folder=str(tmp_path))


def _from_rank_0(folder: str) -> None:
    from zeroaccel import PartialState

    model = models.everything()
    mine = folder if PartialState().is_main_process else "/nowhere"
    load_checkpoint_in_model(model, mine, broadcast_from_rank0=True)
    _equal(model.state_dict())


def test_only_rank_0_reads(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_from_rank_0, folder=str(_write(tmp_path, "bin")))
