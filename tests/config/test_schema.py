"""The keys that DeepSpeed knows."""

from __future__ import annotations

from typing import Any

import pytest

from zeroaccel.config import schema

# DeepSpeed's documentation of its config, "DeepSpeed Configuration JSON" (deepspeed.ai/docs/config-json), without what
# 0.19 has removed. Sections with their keys.
DOCUMENTED: dict[str, str] = {
    "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
        communication_data_type prescale_gradients gradient_predivide_factor fp16 bf16 gradient_clipping
        zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print
        wall_clock_breakdown dump_state aio flops_profiler autotuning activation_checkpointing data_efficiency
        checkpoint data_types tensorboard wandb csv_monitor comet comms_logger torch_autocast compile timers
        pipeline tensor_parallel hybrid_engine dataloader_drop_last sequence_parallel_size memory_breakdown""",
    "optimizer": "type params",
    "scheduler": "type params",
    "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis
        consecutive_hysteresis min_loss_scale""",
    "bf16": "enabled",
    "zero_optimization": """stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter
        reduce_bucket_size contiguous_gradients offload_param offload_optimizer stage3_max_live_parameters
        stage3_max_reuse_distance stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_gather_16bit_weights_on_model_save sub_group_size elastic_checkpoint round_robin_gradients
        ignore_unused_parameters zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients
        load_from_fp32_weights stage3_gather_fp16_weights_on_model_save""",
    "zero_optimization.offload_param": "device nvme_path pin_memory buffer_count buffer_size max_in_cpu",
    "zero_optimization.offload_optimizer": "device nvme_path pin_memory ratio buffer_count fast_init",
    "aio": "block_size queue_depth single_submit overlap_events",
    "activation_checkpointing": """partition_activations cpu_checkpointing contiguous_memory_optimization
        number_checkpoints synchronize_checkpoint_boundary profile""",
    "flops_profiler": "enabled profile_step module_depth top_modules detailed output_file",
    "autotuning": """enabled results_dir exps_dir overwrite metric start_profile_step end_profile_step fast
        max_train_batch_size mp_size num_tuning_micro_batch_sizes tuner_type tuner_early_stopping
        tuner_num_trials arg_mappings""",
    "data_efficiency": "enabled seed data_sampling data_routing",
    "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write",
    "data_types": "grad_accum_dtype",
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "csv_monitor": "enabled output_path job_name",
    "comms_logger": "enabled verbose prof_all debug prof_ops",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
}


@pytest.mark.parametrize("section", list(DOCUMENTED))
def test_every_documented_key_is_known(section: str) -> None:
    config: dict[str, Any] = dict.fromkeys(DOCUMENTED[section].split(), "auto")
    assert schema.check(config, section) == []


@pytest.mark.parametrize("section", list(DOCUMENTED))
def test_a_misspelt_key_is_found_and_the_nearest_one_named(section: str) -> None:
    for key in DOCUMENTED[section].split():
        misspelt = key[:-1] + "q" if len(key) < 5 else key[:2] + key[3:]
        (problem,) = schema.check({misspelt: "auto"}, section)
        path = f"{section}.{misspelt}" if section else misspelt
        assert problem.startswith(f"{path} is no key that DeepSpeed knows: did you mean ")


def test_keys_of_one_section_are_no_keys_of_another() -> None:
    for misplaced in ("stage", "enabled", "loss_scale", "lr", "params"):
        assert len(schema.check({misplaced: 0})) == 1, misplaced


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 1, "anything": 2}}},
        {"msamp": {"enabled": True, "opt_level": "O1"}},
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {"own_name": {}}}}}},
        {"tensor_parallel": {"partition_config": {"anything": 2}}},
        {"autotuning": {"arg_mappings": {"anything": "--anything"}}},
    ],
)
def test_what_deepspeed_hands_on_is_not_judged(config: dict[str, Any]) -> None:
    assert schema.check(config) == []


# Misspelt key, in a section at any depth, and the one that is meant.
DEEP: dict[str, tuple[dict[str, Any], str]] = {
    "zero_optimization.offload_param.pin_memry": (
        {"zero_optimization": {"offload_param": {"pin_memry": True}}},
        "pin_memory",
    ),
    "zero_optimization.zenflow.topk_ration": ({"zero_optimization": {"zenflow": {"topk_ration": 1}}}, "topk_ratio"),
    "checkpoint.parallel_write.pipelin_stage": (
        {"checkpoint": {"parallel_write": {"pipelin_stage": True}}},
        "pipeline_stage",
    ),
    "data_efficiency.data_sampling.num_epoch": ({"data_efficiency": {"data_sampling": {"num_epoch": 1}}}, "num_epochs"),
    "data_efficiency.data_routing.random_ltd.random_ltd_layers_num": (
        {"data_efficiency": {"data_routing": {"random_ltd": {"random_ltd_layers_num": 1}}}},
        "random_ltd_layer_num",
    ),
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.own.dificulty_type": (
        {
            "data_efficiency": {
                "data_sampling": {"curriculum_learning": {"curriculum_metrics": {"own": {"dificulty_type": "value"}}}}
            }
        },
        "difficulty_type",
    ),
    "tensor_parallel.autotpsize": ({"tensor_parallel": {"autotpsize": 2}}, "autotp_size"),
    "pipeline.seed_layer": ({"pipeline": {"seed_layer": True}}, "seed_layers"),
    "expert_parallel.autoep_siz": ({"expert_parallel": {"autoep_siz": 2}}, "autoep_size"),
    "autotuning.model_info.num_param": ({"autotuning": {"model_info": {"num_param": 2}}}, "num_params"),
    "timers.throughput.enable": ({"timers": {"throughput": {"enable": True}}}, "enabled"),
}


@pytest.mark.parametrize("path", list(DEEP))
def test_a_misspelt_key_is_found_at_any_depth(path: str) -> None:
    config, meant = DEEP[path]
    (problem,) = schema.check(config)
    assert problem == f"{path} is no key that DeepSpeed knows: did you mean {meant!r}?"
    assert problem.key == path


# Wrong type, and what it should be.
TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "zero_optimization": ({"zero_optimization": 2}, "2: write a section, {...}, or leave it out"),
    "zero_optimization.overlap_comm": ({"zero_optimization": {"overlap_comm": "ja"}}, "'ja': write true or false"),
    "zero_optimization.reduce_bucket_size": (
        {"zero_optimization": {"reduce_bucket_size": "big"}},
        "'big': write a whole number",
    ),
    "zero_optimization.offload_optimizer": (
        {"zero_optimization": {"offload_optimizer": "cpu"}},
        "'cpu': write a section, {...}, or leave it out",
    ),
    "zero_optimization.offload_optimizer.device": (
        {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
        "'disk': write one of 'none', 'cpu' or 'nvme'",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 2}}},
        "2: write a number <= 1.0",
    ),
    "fp16": ({"fp16": True}, "True: write a section, {...}, or leave it out"),
    "fp16.hysteresis": ({"fp16": {"hysteresis": "high"}}, "'high': write a whole number"),
    "gradient_clipping": ({"gradient_clipping": "1.0"}, "'1.0': write a number"),
    "prescale_gradients": ({"prescale_gradients": "false"}, "'false': write true or false"),
    "aio.block_size": ({"aio": {"block_size": "1M"}}, "'1M': write a number"),
    "aio.single_submit": ({"aio": {"single_submit": 3}}, "3: write true or false"),
    "checkpoint.tag_validation": ({"checkpoint": {"tag_validation": 1}}, "1: write a text, such as 'WARN'"),
    "data_efficiency": ({"data_efficiency": True}, "True: write a section, {...}, or leave it out"),
    "comms_logger.prof_ops": ({"comms_logger": {"prof_ops": 3}}, "3: write a list, [...]"),
}


@pytest.mark.parametrize("path", list(TYPES))
def test_a_wrong_type_is_told_with_what_to_write(path: str) -> None:
    config, told = TYPES[path]
    assert schema.check(config) == [f"{path} is {told}"]


# Wrong names of optimizers and schedulers, and of their parameters.
CONSTRUCTORS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer.type": (
        {"optimizer": {"type": "AdamWW"}},
        "optimizer.type is 'AdamWW', which DeepSpeed does not know: did you mean 'AdamW'?",
    ),
    "scheduler.type": (
        {"scheduler": {"type": "WarmUpLR"}},
        "scheduler.type is 'WarmUpLR', which DeepSpeed does not know: did you mean 'WarmupLR'?",
    ),
    "optimizer.params.beta": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1, "beta": (0.9, 0.99)}}},
        "optimizer.params.beta is no parameter of Adam: did you mean 'betas'?",
    ),
    "optimizer.params.momentun": (
        {"optimizer": {"type": "SGD", "params": {"lr": 1, "momentun": 0.9}}},
        "optimizer.params.momentun is no parameter of SGD: did you mean 'momentum'?",
    ),
    "scheduler.params.warmup_steps": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_steps": 3}}},
        "scheduler.params.warmup_steps is no parameter of WarmupLR: did you mean 'warmup_num_steps'?",
    ),
}


@pytest.mark.parametrize("path", list(CONSTRUCTORS))
def test_optimizers_and_schedulers_take_what_their_constructors_take(path: str) -> None:
    config, told = CONSTRUCTORS[path]
    assert [(problem.key, problem) for problem in schema.check(config)] == [(path, told)]


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adagrad", "Lamb", "Lion", "SGD", "RMSprop", "MuAdam", "Muon"])
def test_documented_optimizers_are_known(kind: str) -> None:
    assert schema.check({"optimizer": {"type": kind, "params": {"lr": 0.1, "weight_decay": 0.1}}}) == []


@pytest.mark.parametrize("kind", ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "StepLR"])
def test_documented_schedulers_are_known(kind: str) -> None:
    assert schema.check({"scheduler": {"type": kind, "params": {}}}) == []


@pytest.mark.parametrize("section", [name for name in schema._MODELS if "." not in name])
def test_the_model_of_a_section_is_the_one_that_deepspeed_reads_it_with(section: str) -> None:
    """A fact about DeepSpeed: it refuses an unknown key by the name of that class."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        DeepSpeedConfig({"train_batch_size": 1, section: {"no_such_key": 1}})
    assert caught.value.title in (schema._model(section).__name__, "DeepSpeedMonitorConfig")


def test_all_problems_are_told_at_once() -> None:
    config = {"train_batch": 4, "zero_optimization": {"stages": 2, "overlap_comm": "ja", "offload_param": {"x": 1}}}
    keys = {problem.key for problem in schema.check(config)}
    assert keys == {
        "train_batch",
        "zero_optimization.stages",
        "zero_optimization.overlap_comm",
        "zero_optimization.offload_param.x",
    }


# What DeepSpeed's config class refuses though keys and types are right.
REFUSED = {
    "sum at stage 3": {"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"},
    "unknown operation": {"gradient_allreduce_op": "max"},
    "partial offload below stage 3": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    },
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_deepspeed_itself_has_the_last_word(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 12, **REFUSED[name]}
    told = [*schema.check(config), *schema.refusal(config)]
    assert len(told) in (1, 2), "and nothing else is wrong"
    assert capfd.readouterr().out == "", "stdout is the script's"


def test_a_config_with_auto_everywhere_is_not_refused() -> None:
    config = {"zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"}, "fp16": {"enabled": "auto"}}
    assert schema.refusal({**config, "gradient_clipping": "auto", "train_batch_size": "auto"}) == []


def test_keys_that_this_deepspeed_has_given_up_are_told_with_its_reason() -> None:
    removed = {"sparse_attention": {}, "zero_optimization": {"mics_shard_size": 2}}
    first, second = schema.check(removed)
    assert first.startswith("sparse_attention cannot be used, remove it: DeepSpeed Sparse Attention has been removed")
    assert second.startswith("zero_optimization.mics_shard_size cannot be used, remove it: MiCS")


def test_templates_of_this_library_pass() -> None:
    from zeroaccel.config.plugin import DeepSpeedPlugin

    made = DeepSpeedPlugin(zero_stage=3, offload_optimizer_device="nvme", offload_optimizer_nvme_path="/n")
    made.set_mixed_precision("fp16")
    assert schema.check(made.deepspeed_config) == []
