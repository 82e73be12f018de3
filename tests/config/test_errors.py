"""Every error of the room: what was passed, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.config.facts import DUMMY, REAL, facts, plugin, scheduler
from zeroaccel.config import environment, schema
from zeroaccel.config.auto import resolve
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.facts import LoaderFact
from zeroaccel.config.options import ProfileKwargs, TorchDynamoPlugin
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.config.precedence import choose_mixed_precision
from zeroaccel.errors import ConfigError, ConfigTypeError, UnsupportedError

ADAM = {"type": "AdamW", "params": {}}
WARMUP = {"type": "WarmupLR", "params": {}}
MICRO, TOTAL, STEPS = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"


def document(**config: Any) -> Callable[[], Any]:
    return lambda: DeepSpeedPlugin({"zero_optimization": {"stage": 2}, **config})


def prepared(zero: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **known: Any) -> Any:
    return lambda: resolve(plugin(zero, **(config or {})), facts(**known))


def select_by_hand() -> None:
    plugin().selected = True


def assigned(key: str, value: Any) -> Callable[[], Any]:
    def run() -> Any:
        made = plugin()
        made.deepspeed_config[key] = value
        return resolve(made, facts())

    return run


# what is done, words that the message must have: the offending value, the remedy
ERRORS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # the document
    "document-type": (lambda: HfDeepSpeedConfig(3), ("is a int", "path of a DeepSpeed config")),  # type: ignore[arg-type]
    "document-missing": (lambda: HfDeepSpeedConfig("no/such.json"), ("'no/such.json'", "pass the path")),
    "document-not-object": (lambda: HfDeepSpeedConfig("WzFd"), ("this is a list", "JSON object")),
    "document-json": (lambda: HfDeepSpeedConfig('{"a": 1,\n}'), ("JSON text:2:1", "not valid JSON")),
    "document-twice": (lambda: HfDeepSpeedConfig('{"a": 1, "a": 2}'), ("a is there twice", "keep one")),
    "document-remove": (
        lambda: HfDeepSpeedConfig({}).del_config_sub_tree("a.b", must_exist=True),
        ("a.b is not in the DeepSpeed config", "cannot be removed"),
    ),
    # the plugin
    "no-zero": (lambda: DeepSpeedPlugin({}), ("no zero_optimization section", '{"stage": 2}')),
    "zero-no-section": (document(zero_optimization=True), ("zero_optimization is True", "write a section")),
    "fp16-no-section": (document(fp16=True), ("fp16 is True", "write a section")),
    "policy": (lambda: DeepSpeedPlugin(auto_policy="slow"), ("'slow'", "['fast', 'accelerate']")),
    "msamp-stage": (lambda: DeepSpeedPlugin(zero_stage=3, enable_msamp=True), ("stage 3", "use stage 0, 1 or 2")),
    "msamp-level": (
        lambda: DeepSpeedPlugin(enable_msamp=True, msamp_opt_level="O3"),
        ("msamp_opt_level='O3'", "'O1' or 'O2'"),
    ),
    "fill-match": (
        lambda: plugin(gradient_clipping="auto").fill_match("gradient_clipping"),
        ("gradient_clipping is 'auto'", "write a value"),
    ),
    "mismatch": (
        lambda: plugin(gradient_clipping=1.0, train_batch_size=8).deepspeed_config_process(
            gradient_clipping=2.0, train_batch_size=4
        ),
        ("gradient_clipping is 1.0", "2.0 here", "train_batch_size is 8", "write 'auto'"),
    ),
    "precision-conflict": (
        lambda: plugin(fp16={"enabled": True}).set_mixed_precision("bf16", "Accelerator(mixed_precision=...)"),
        ("mixed_precision='bf16' (Accelerator(mixed_precision=...))", "enables fp16", "write 'auto'", "'fp16'"),
    ),
    "fp8-conflict": (
        lambda: plugin(fp16={"enabled": True}).set_mixed_precision("fp8"),
        ("mixed_precision='fp8'", "enables fp16"),
    ),
    "precision": (lambda: choose_mixed_precision("fp4"), ("'fp4'", "'no', 'fp8', 'fp16', 'bf16'")),
    "select": (lambda: plugin().select(), ("accelerator.state.select_deepspeed_plugin(name)",)),
    "selected": (select_by_hand, ("accelerator.state.select_deepspeed_plugin(name)",)),
    # who brings optimizer and scheduler
    "optimizer-twice": (prepared(config={"optimizer": ADAM}), ("optimizer section", "a SGD", "DummyOptim")),
    "optimizer-nowhere": (prepared(optimizer=DUMMY), ("DummyOptim", "no optimizer section", "add one")),
    "scheduler-twice": (
        prepared(config={"scheduler": WARMUP}, scheduler=scheduler(dummy=False)),
        ("scheduler section", "a LambdaLR", "DummyScheduler"),
    ),
    "scheduler-nowhere": (
        prepared(scheduler=scheduler()),
        ("DummyScheduler", "no scheduler section", "lr_scheduler_callable"),
    ),
    "scheduler-callable-twice": (
        prepared(config={"scheduler": WARMUP}, scheduler=scheduler(has_callable=True)),
        ("scheduler section", "lr_scheduler_callable", "remove one"),
    ),
    "dummy-and-real": (
        prepared(config={"optimizer": ADAM}, optimizer=DUMMY, scheduler=scheduler(dummy=False)),
        ("DummyOptim and a LambdaLR", "DummyScheduler"),
    ),
    # batch sizes
    "arithmetic": (
        prepared(config={TOTAL: 30, STEPS: 2}, world_size=4),
        (
            "train_batch_size is 30, but 4 (micro-batch) x 2 (accumulation) x 4 (ranks) = 32",
            'write "auto" or 32',
            "DataLoader, batch size 4",
            "dict argument",
        ),
    ),
    "batch-zero": (prepared(config={MICRO: 0}), (f"{MICRO} is 0 (dict argument)", "at least 1")),
    "batch-text": (prepared(config={TOTAL: "8"}), (f"{TOTAL} is '8'", "whole number", "'auto'")),
    "batch-flag": (prepared(config={STEPS: True}), (f"{STEPS} is True", "whole number")),
    "batch-share": (
        prepared(world_size=8, split_batches=True),
        ("8 ranks", "batch size is 4", "at least batch_size=8"),
    ),
    # an `auto` that no rule serves
    "auto-no-loader": (prepared(loaders=()), (f"{MICRO} is 'auto'", "no DataLoader", "write a number")),
    "auto-no-batch-size": (
        prepared(loaders=(LoaderFact(None, True),)),
        (f"{MICRO} is 'auto'", "without a batch size", f"deepspeed_config['{MICRO}'] ="),
    ),
    "auto-total-uneven": (
        prepared(config={TOTAL: 9}, loaders=(), world_size=2),
        (f"{MICRO} is 'auto'", "no DataLoader"),
    ),
    "auto-optimizer": (
        prepared(config={"optimizer": {"type": "AdamW", "params": {"eps": "auto"}}}, optimizer=DUMMY),
        ("optimizer.params.eps is 'auto'", "DummyOptim(..., eps=...)"),
    ),
    "auto-scheduler": (
        prepared(
            config={"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
            scheduler=scheduler(total_num_steps=None),
        ),
        ("scheduler.params.total_num_steps is 'auto'", "DummyScheduler(..., total_num_steps=...)"),
    ),
    "auto-no-scheduler": (
        prepared(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}),
        ("scheduler.params.warmup_max_lr is 'auto'", "no scheduler", "pass a DummyScheduler"),
    ),
    "auto-no-model": (
        prepared({"reduce_bucket_size": "auto"}, model=None),
        ("zero_optimization.reduce_bucket_size is 'auto'", "write one"),
    ),
    "auto-elsewhere": (
        prepared({"sub_group_size": "auto"}),
        ("zero_optimization.sub_group_size is 'auto'", "leave the key out"),
    ),
    "auto-assigned": (assigned("train_batch_size_per_gpu", "auto"), ("train_batch_size_per_gpu is 'auto'",)),
    # values
    "stage": (prepared({"stage": 4}), ("zero_optimization.stage is 4", "0, 1, 2 and 3")),
    "device": (
        prepared({"offload_optimizer": {"device": "disk"}}),
        ("offload_optimizer.device is 'disk'", "'none', 'cpu' or 'nvme'"),
    ),
    "nvme-path": (
        prepared({"stage": 3, "offload_param": {"device": "nvme"}}),
        ("offload_param.device is 'nvme' without nvme_path", "offload_param_nvme_path=..."),
    ),
    "unmanaged accumulation": (
        prepared(config={"managed_gradient_accumulation": False}),
        ("managed_gradient_accumulation is False", "leave it out"),
    ),
    "clipping": (prepared(config={"gradient_clipping": -1.0}), ("gradient_clipping is -1.0", "0 for no clipping")),
    "both-precisions": (
        prepared(config={"fp16": {"enabled": True}, "bf16": {"enabled": True}}),
        ("fp16.enabled and bf16.enabled are both true", "enable one"),
    ),
    # options
    "activity": (lambda: ProfileKwargs(activities=["tpu"]).build(), ("['tpu']", "'cpu'")),
    "dynamo": (lambda: TorchDynamoPlugin(backend="fast"), ("'fast'", "INDUCTOR")),
}
TYPES: dict[str, type[Exception]] = {
    "document-type": ConfigTypeError,
    "msamp-stage": UnsupportedError,
    "selected": UnsupportedError,
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_the_error_names_the_value_and_the_remedy(name: str) -> None:
    cause, words = ERRORS[name]
    with pytest.raises(TYPES.get(name, ConfigError)) as caught:
        cause()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "two", ("gradient_accumulation_steps", "correct or unset it")),
        ("GRADIENT_CLIPPING", "much", ("gradient_clipping",)),
        ("DEEPSPEED_ZERO_STAGE", "three", ("zero_stage",)),
        ("DEEPSPEED_ZERO3_INIT", "maybe", ("zero3_init_flag", "write true or false")),
    ],
)
@pytest.mark.parametrize("prefix", [environment.PREFIX, environment.FALLBACK_PREFIX])
def test_an_unreadable_variable_is_named_in_full(
    prefix: str, variable: str, text: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prefix + variable, text)
    with pytest.raises(ConfigError) as caught:
        DeepSpeedPlugin()
    for word in (f"{prefix}{variable}={text!r}", *words):
        assert word in str(caught.value)


def test_a_flag_that_is_neither_true_nor_false_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(ConfigError, match=r"ACCELERATE_USE_CPU is 'perhaps'.*write true or false"):
        environment.flag("USE_CPU")


def test_fields_of_a_launch_config_beside_a_document_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "zero_stage,gradient_clipping,mixed_precision")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    with pytest.raises(ConfigError) as caught:
        DeepSpeedPlugin({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    for word in ("sets gradient_clipping, mixed_precision beside", "dict argument", "`zeroaccel config`"):
        assert word in str(caught.value)
    assert "zero_stage" not in str(caught.value), "which says the same as the document"


def test_an_error_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n "zero_optimization": {"stage": 2},\n "train_batch_size": 30\n}')
    with pytest.raises(ConfigError, match=f"{path}:3 "):
        resolve(DeepSpeedPlugin(str(path)), facts())


def test_several_problems_are_told_at_once() -> None:
    made = plugin(
        {"stage": 7, "offload_param": {"device": "nvme"}}, gradient_clipping=-1, optimizer=ADAM, train_batch_size=30
    )
    with pytest.raises(ConfigError) as caught:
        resolve(made, facts(optimizer=REAL))
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 problems in the configuration:"
    words = ("optimizer section", "train_batch_size is 30", "stage is 7", "nvme_path", "gradient_clipping is -1")
    for number, word in enumerate(words, 1):
        assert any(line.startswith(f"  {number}. ") and word in line for line in lines), word


def test_a_misspelt_and_a_removed_key_are_told_with_the_others_of_their_config() -> None:
    problems = schema.check({"train_batchsize": 8, "zero_optimization": {"stge": 2}, "elasticity": {}})
    assert problems[0] == "train_batchsize is no key that DeepSpeed knows: did you mean 'train_batch_size'?"
    assert problems[1] == "zero_optimization.stge is no key that DeepSpeed knows: did you mean 'stage'?"
    assert problems[2].startswith("elasticity cannot be used, remove it: ")
