"""A Hugging Face model without its weights, and its shape."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from zeroaccel.config.packages import is_transformers_available
from zeroaccel.engine.estimate import Batch, ModelShape
from zeroaccel.engine.facts import model_fact
from zeroaccel.engine.module_sizes import calculate_maximum_sizes
from zeroaccel.errors import ConfigError, EnvironmentProblem, MissingPackage


def empty_model(name: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model of a folder, of the hub's cache or of the hub, on the meta device: it takes no memory.

    Args:
        name: folder with a `config.json`, or a model's name on the hub.
        trust_remote_code: run the Python code that the model brings.

    Raises:
        ConfigError: there is no such model, or transformers does not know it.
        EnvironmentProblem: the hub cannot be reached.
        MissingPackage: transformers is not installed.
    """
    if not is_transformers_available():
        raise MissingPackage("transformers describes models: install it, or give the sizes with --num_parameters")
    import transformers

    config = _config(name, trust_remote_code)
    known = [getattr(transformers, kind, None) for kind in config.architectures or []]
    remote = (kind for kind in getattr(config, "auto_map", None) or {} if kind.startswith("AutoModelFor"))
    try:
        with torch.device("meta"):
            if known and known[0] is not None:
                return known[0]._from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]
            auto = getattr(transformers, next(remote, "AutoModel"))
            return auto.from_config(  # type: ignore[no-any-return]
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{name} cannot be built: {_first_line(error)}") from error


def _config(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    local = os.path.isdir(name)
    if not local and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ConfigError(f"there is no folder {name!r} (seen from {os.getcwd()})")
    if local and not os.path.exists(os.path.join(name, "config.json")):
        raise ConfigError(f"there is no config.json in {name!r}: name the folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if local or isinstance(error, ValueError):
            raise ConfigError(f"{name}: {_first_line(error)}") from error
    _reach_hub(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {_first_line(error)}") from error


def _reach_hub(name: str) -> None:
    """transformers tries a hub that is out of reach for half a minute, aloud: ask once."""
    from huggingface_hub import constants, get_session

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever HTTP library this version of the hub's client uses
        raise EnvironmentProblem(
            f"{name!r} is neither a folder here nor in the cache, and {constants.ENDPOINT} cannot be reached"
            f" ({_first_line(error)}): name a folder with a config.json, or give --num_parameters"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shape_of(model: torch.nn.Module) -> ModelShape:
    """What the memory of a model's training follows from."""
    fact = model_fact(model)
    config = getattr(model, "config", None)
    return ModelShape(
        parameters=fact.numel,
        largest_parameter=fact.largest_parameter,
        largest_layer=calculate_maximum_sizes(model)[1][0] // 4,
        hidden_size=fact.hidden_size or 0,
        num_layers=_number(config, "num_hidden_layers"),
        num_heads=_number(config, "num_attention_heads"),
        vocab_size=_number(config, "vocab_size"),
    )


def _number(config: Any, name: str) -> int:
    """A number of the config, or of the language model within it; 0 where it has none."""
    for place in (config, getattr(config, "text_config", None)):
        if isinstance(value := getattr(place, name, None), int):
            return value
    return 0


def kept_activations(model: torch.nn.Module, batch: Batch, dtype: str) -> int | None:
    """Bytes that a model on the meta device keeps in a forward pass for the backward pass, without checkpointing.

    Args:
        model: the model; it is cast to the dtype.
        batch: what goes through it.
        dtype: of weights and activations.

    Returns:
        None where the model cannot be run on token ids alone.
    """
    model.to(getattr(torch, dtype)).train()
    tokens = torch.zeros(batch.micro_batch, batch.seq_len, dtype=torch.long, device="meta")
    for inputs in ({"input_ids": tokens, "labels": tokens}, {"input_ids": tokens}):
        try:
            return _kept(model, inputs, batch.eager_attention)
        except Exception:  # the model's code is its own: whatever it raises, these inputs are not for it
            continue
    return None


def _kept(model: torch.nn.Module, inputs: dict[str, torch.Tensor], eager_attention: bool) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with _Attention(eager_attention), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


class _Attention(TorchFunctionMode):
    """Attention as GPUs run it; on the meta device PyTorch would choose the kernel that keeps the scores."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self._eager = eager

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._eager or func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        dropout = kwargs.get("dropout_p", 0.0)
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], dropout, False)[0]
