"""Models of transformers leave by `save_pretrained` and by `save_model`, and come back by `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool


def _tiny() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(29)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8))


def _save(stage: int, folder: str) -> dict[str, torch.Tensor]:
    from tests.checkpoint.models import whole
    from tests.engine.small import accelerator

    running = accelerator(zero_stage=stage, zero3_save_16bit_model=True)
    config = running.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 2
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = _tiny()
    model, optimizer = running.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    tokens = torch.arange(8).view(1, 8)
    running.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    running.unwrap_model(model).save_pretrained(
        f"{folder}/theirs",
        is_main_process=running.is_main_process,
        save_function=running.save,
        state_dict=running.get_state_dict(model),
    )
    running.save_model(model, f"{folder}/ours", max_shard_size="8KB")
    running.save_model(model, f"{folder}/pickled", safe_serialization=False)
    model.save_16bit_model(f"{folder}/native")
    model.save_checkpoint(f"{folder}/checkpoint")
    model.load_checkpoint(f"{folder}/checkpoint")
    return whole(model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_they_come_back(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    wanted = ranks.run(_save, stage=stage, folder=str(tmp_path))[0]
    from transformers import GPT2LMHeadModel

    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for kind in ("theirs", "ours", "pickled"):
        _tiny().config.save_pretrained(tmp_path / kind)
        model, told = GPT2LMHeadModel.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not told["missing_keys"], kind
        assert not told["unexpected_keys"], kind
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, msg=f"{kind}: {name}")
    native = torch.load(tmp_path / "native/pytorch_model.bin", weights_only=True)
    for name, value in wanted.items():
        torch.testing.assert_close(native[name], value, rtol=0, atol=0, msg=name)
