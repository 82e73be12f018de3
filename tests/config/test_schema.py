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
    config: dict[str, Any] = dict.fromkeys(DOCUMENTED[section].split(), 0)
    assert schema.check(config, section) == []


@pytest.mark.parametrize("section", list(DOCUMENTED))
def test_a_misspelt_key_is_found_and_the_nearest_one_named(section: str) -> None:
    for key in DOCUMENTED[section].split():
        misspelt = key[:-1] + "q" if len(key) < 5 else key[:2] + key[3:]
        (problem,) = schema.check({misspelt: 0}, section)
        path = f"{section}.{misspelt}" if section else misspelt
        assert problem.startswith(f"{path} is no key that DeepSpeed knows: did you mean ")


def test_keys_of_one_section_are_no_keys_of_another() -> None:
    for misplaced in ("stage", "enabled", "loss_scale", "lr", "params"):
        assert len(schema.check({misplaced: 0})) == 1, misplaced


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "anything": 2}}},
        {"scheduler": {"type": "WarmupLR", "params": {"anything": 2}}},
        {"msamp": {"enabled": True, "opt_level": "O1"}},
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": False}}}},
        {"tensor_parallel": {"autotp_size": 2}},
    ],
)
def test_what_deepspeed_hands_on_is_not_judged(config: dict[str, Any]) -> None:
    assert schema.check(config) == []


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
