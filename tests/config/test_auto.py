"""What each `"auto"` becomes, one line a case, and the arithmetic of batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.facts import DUMMY, EVALUATION, MODEL, TRAINING, facts, plugin, scheduler
from zeroaccel.config.auto import FAST_FLOORS, RULES, resolve
from zeroaccel.config.document import HfDeepSpeedConfig, assign, leaves
from zeroaccel.config.facts import Facts, LoaderFact, ModelFact
from zeroaccel.config.plugin import DeepSpeedPlugin
from zeroaccel.errors import ConfigError

ACCUMULATION, MICRO, TOTAL = "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"
REDUCE = "zero_optimization.reduce_bucket_size"
PREFETCH = "zero_optimization.stage3_prefetch_bucket_size"
PERSIST = "zero_optimization.stage3_param_persistence_threshold"
LARGE = ModelFact(numel=10**10, largest_parameter=10**9, hidden_size=None, hidden_size_origin="")
TINY = ModelFact(numel=500, largest_parameter=99, hidden_size=8, hidden_size_origin="model.config")
HUGE = ModelFact(numel=10**12, largest_parameter=10**9, hidden_size=30_000, hidden_size_origin="model.config")


def two(size: int, other: int, training: bool = True) -> tuple[LoaderFact, ...]:
    return LoaderFact(size, True), LoaderFact(other, training)


# key, what is known, value, words in its reason
AUTO: list[tuple[str, dict[str, Any], Any, str]] = [
    (ACCUMULATION, {}, 1, "nobody asked"),
    (ACCUMULATION, {"accumulation_steps": 3, "accumulation_typed": True}, 3, "Accelerator"),
    (ACCUMULATION, {"accumulation_steps": 3}, 3, "earlier prepare"),
    (MICRO, {}, 4, "batch size 4"),
    (MICRO, {"loaders": two(4, 6)}, 4, "smallest of [4, 6]"),
    (MICRO, {"loaders": (EVALUATION, TRAINING)}, 4, "batch size 4"),
    (MICRO, {"loaders": (EVALUATION,)}, 2, "batch size 2"),
    (MICRO, {"world_size": 2, "split_batches": True}, 2, "split over 2 ranks"),
    (MICRO, {"loaders": (), "known_micro_batch_size": 7}, 7, "no loader"),
    (MICRO, {"loaders": (), "implicit_plugin": True}, 1, "nobody configured DeepSpeed"),
    (TOTAL, {"world_size": 2, "accumulation_steps": 3}, 24, "4 (micro-batch) x 3 (accumulation) x 2 (ranks)"),
    (TOTAL, {"world_size": 2, "split_batches": True}, 4, "2 (micro-batch) x 1 (accumulation) x 2 (ranks)"),
    ("gradient_clipping", {}, 0.0, "nobody asked"),
    ("zero_optimization.stage3_gather_16bit_weights_on_model_save", {}, False, ""),
    (REDUCE, {}, 1_000_000, "bounded by the model's size"),
    (REDUCE, {"model": LARGE}, 1_000_014_129, "square root of the largest parameter"),
    (REDUCE, {"model": HUGE}, 900_000_000, "hidden size 30000 (model.config)"),
    (REDUCE, {"model": TINY}, 500, "hidden size squared is 64"),
    (PREFETCH, {}, 1_000_000, "0.9 x hidden size squared is 9000"),
    (PREFETCH, {"model": HUGE}, 810_000_000, "0.9 x hidden size squared"),
    (PERSIST, {}, 100_000, "10 x hidden size is 1000"),
    (PERSIST, {"model": HUGE}, 300_000, "10 x hidden size"),
    ("optimizer.params.lr", {"optimizer": DUMMY}, 0.01, "lr"),
    ("optimizer.params.weight_decay", {"optimizer": DUMMY}, 0.1, "weight_decay"),
    ("optimizer.params.betas", {"optimizer": DUMMY}, (0.9, 0.95), "betas"),
    ("scheduler.params.warmup_min_lr", {"scheduler": scheduler()}, 0, "warm-up"),
    ("scheduler.params.warmup_max_lr", {"scheduler": scheduler()}, 0.01, "learning rate"),
    ("scheduler.params.warmup_num_steps", {"scheduler": scheduler()}, 10, "10 steps"),
    ("scheduler.params.warmup_num_steps", {"scheduler": scheduler(), "world_size": 4}, 3, "/ 4 ranks"),
    ("scheduler.params.warmup_num_steps", {"scheduler": scheduler(warmup_num_steps=0)}, 1, "0 steps"),
    ("scheduler.params.total_num_steps", {"scheduler": scheduler(), "world_size": 3}, 34, "/ 3 ranks"),
    (
        "scheduler.params.total_num_steps",
        {"scheduler": scheduler(), "world_size": 2, "split_batches": True},
        100,
        "100 steps",
    ),
    ("scheduler.params.warmup_type", {"scheduler": scheduler(params={"warmup_type": "linear"})}, "linear", ""),
    ("fp16.enabled", {}, False, ""),
    ("bf16.enabled", {}, False, ""),
]
# The same under policy "accelerate", where it decides otherwise.
ACCELERATE: list[tuple[str, dict[str, Any], Any]] = [
    ("gradient_clipping", {}, 1.0),
    (REDUCE, {}, 10_000),
    (PREFETCH, {}, 9_000),
    (PERSIST, {}, 1_000),
    (REDUCE, {"model": TINY}, 64),
    ("scheduler.params.warmup_num_steps", {"scheduler": scheduler(), "world_size": 4}, 10),
]


def with_auto(key: str, policy: str = "fast", is_train_batch_min: bool = True) -> DeepSpeedPlugin:
    """A plugin whose config has `"auto"` there."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}, ACCUMULATION: "auto"}
    assign(config, key, "auto")
    return DeepSpeedPlugin(config, auto_policy=policy, is_train_batch_min=is_train_batch_min)


@pytest.mark.parametrize(("key", "known", "value", "words"), AUTO)
def test_auto_becomes(key: str, known: dict[str, Any], value: Any, words: str) -> None:
    resolved = resolve(with_auto(key), facts(**known))
    assert HfDeepSpeedConfig(resolved.config).get_value(key) == value
    entry = next(entry for entry in resolved.entries if entry.key == key)
    assert entry.value == value
    assert words in f"{entry.source}, {entry.reason}"


@pytest.mark.parametrize(("key", "known", "value"), ACCELERATE)
def test_auto_becomes_under_policy_accelerate(key: str, known: dict[str, Any], value: Any) -> None:
    resolved = resolve(with_auto(key, policy="accelerate"), facts(**known))
    assert HfDeepSpeedConfig(resolved.config).get_value(key) == value


def test_every_rule_has_a_case() -> None:
    assert {key for key, *_ in AUTO} >= set(RULES)


@pytest.mark.parametrize(("loaders", "size"), [(two(4, 6), 6), ((EVALUATION, TRAINING), 4), (two(4, 8, False), 8)])
def test_the_largest_of_all_loaders_decides_where_the_plugin_says_so(loaders: Any, size: int) -> None:
    resolved = resolve(with_auto(MICRO, is_train_batch_min=False), facts(loaders=loaders))
    assert resolved.config[MICRO] == size


@pytest.mark.parametrize(
    ("config", "size"), [({TOTAL: 24, ACCUMULATION: 3}, 4), ({TOTAL: 24, ACCUMULATION: 3, MICRO: "auto"}, 4)]
)
def test_without_a_loader_the_micro_batch_follows_from_the_total(config: Any, size: int) -> None:
    assert resolve(plugin(**config), facts(world_size=2, loaders=())).config[MICRO] == size


def test_a_written_number_is_never_replaced() -> None:
    written: dict[str, Any] = {ACCUMULATION: 2, MICRO: 4, TOTAL: 8, "gradient_clipping": 0.25}
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": 8}
    resolved = resolve(plugin(zero, **written), facts()).config
    assert {key: resolved[key] for key in written} == written
    assert {key: resolved["zero_optimization"][key] for key in zero} == zero


@pytest.mark.parametrize("key", list(FAST_FLOORS))
def test_fast_numbers_never_exceed_model_and_formula(key: str) -> None:
    for numel in (1, 1000, 10**6, 10**9):
        model = ModelFact(numel, largest_parameter=numel, hidden_size=1, hidden_size_origin="model.config")
        value = HfDeepSpeedConfig(resolve(with_auto(key), facts(model=model)).config).get_value(key)
        assert 1 <= value <= max(numel, 10)


def test_an_optimizer_of_the_scripts_own_is_allowed_and_a_false_is_named() -> None:
    resolved = resolve(plugin(zero_allow_untested_optimizer=False), facts())
    assert resolved.config["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer: True" in resolved.warnings[0]
    own = resolve(plugin(optimizer={"type": "AdamW", "params": {}}), facts(optimizer=DUMMY))
    assert "zero_allow_untested_optimizer" not in own.config


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param (cpu) works at stage 3 only"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}, "uses CPU memory instead"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1 to 3"),
    ],
)
def test_settings_without_effect_at_this_stage_are_told(zero: dict[str, Any], words: str) -> None:
    assert any(words in warning for warning in resolve(plugin(zero), facts()).warnings)


fast = settings(max_examples=80, deadline=None, derandomize=True)
SIZES = st.integers(1, 64)


@fast
@given(micro=SIZES, steps=st.integers(1, 16), world_size=st.integers(1, 16), split=st.booleans())
def test_total_is_micro_batch_times_accumulation_times_ranks(
    micro: int, steps: int, world_size: int, split: bool
) -> None:
    loader = LoaderFact(micro * world_size if split else micro, True)
    known = facts(world_size=world_size, split_batches=split, loaders=(loader,), accumulation_steps=steps, model=MODEL)
    resolved = resolve(plugin(None, "fast", **dict.fromkeys((MICRO, TOTAL, ACCUMULATION), "auto")), known).config
    assert (resolved[MICRO], resolved[ACCUMULATION]) == (micro, steps)
    assert resolved[TOTAL] == micro * steps * world_size


@fast
@given(micro=SIZES, steps=st.integers(1, 8), world_size=st.integers(1, 8), total=st.integers(1, 512))
def test_three_numbers_are_accepted_exactly_where_they_agree(
    micro: int, steps: int, world_size: int, total: int
) -> None:
    known = Facts(world_size=world_size, model=MODEL)
    made = plugin({"stage": 3}, "fast", **{MICRO: micro, ACCUMULATION: steps, TOTAL: total})
    if total == micro * steps * world_size:
        assert resolve(made, known).config[TOTAL] == total
    else:
        with pytest.raises(ConfigError, match=rf"= {micro * steps * world_size}\n"):
            resolve(made, known)


def zero_of(**zero: Any) -> dict[str, Any]:
    """What DeepSpeed gets, in dotted keys, where the config says this of ZeRO; and fp16 switched off."""
    config = resolve(plugin(zero, fp16={"enabled": "auto", "auto_cast": True}), facts()).config
    return dict(leaves(config))


def test_what_deepspeed_must_not_follow_is_kept_from_it_and_explained() -> None:
    offloaded = zero_of(stage=2, offload_optimizer={"device": "cpu"})
    assert offloaded["zero_force_ds_cpu_optimizer"] is False
    assert "fp16.auto_cast" not in offloaded
    assert "zero_force_ds_cpu_optimizer" not in zero_of(stage=2)
    assert not [key for key in zero_of(stage=0, offload_optimizer={"device": "cpu"}) if "offload_optimizer" in key]
    made = plugin({"offload_optimizer": {"device": "cpu"}})
    (entry,) = [e for e in resolve(made, facts()).entries if e.key == "zero_force_ds_cpu_optimizer"]
    assert (entry.value, entry.source) == (False, "rule")
    assert "refuses even its own CPU Adagrad" in entry.reason


def test_the_library_says_why_it_put_a_value() -> None:
    (entry,) = [e for e in resolve(plugin(), facts()).entries if e.key == "steps_per_print"]
    assert (entry.source, entry.reason) == ("rule", "DeepSpeed's progress lines stay off stdout")
    made = plugin()
    made.deepspeed_config["steps_per_print"] = 10
    (entry,) = [e for e in resolve(made, facts()).entries if e.key == "steps_per_print"]
    assert (entry.source, entry.reason) == ("deepspeed_config[...] of the script", "")
