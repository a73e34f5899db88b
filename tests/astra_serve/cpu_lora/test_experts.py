"""Experts on a CPU: the kernels without LoRA where no adapter may change them."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    UnquantizedMoeBackend,
    select_unquantized_moe_backend,
)

from astra_serve.cpu_lora.experts import compute_without_lora


@pytest.mark.parametrize(
    ("targets", "backend"),
    [
        (["q_proj", "gate_proj"], UnquantizedMoeBackend.CPU),
        (["q_proj", "experts"], UnquantizedMoeBackend.TRITON),
        (None, UnquantizedMoeBackend.TRITON),
    ],
)
def test_experts_that_no_adapter_may_change_are_computed_by_the_cpus_kernels(targets, backend) -> None:
    compute_without_lora()
    lora = LoRAConfig(max_lora_rank=8, target_modules=targets)
    vllm_config = VllmConfig()
    vllm_config.lora_config = lora
    with set_current_vllm_config(vllm_config):
        config = FusedMoEConfig(
            num_experts=4,
            experts_per_token=2,
            hidden_dim=64,
            intermediate_size=32,
            num_local_experts=4,
            num_logical_experts=4,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.float32,
            is_lora_enabled=True,
        )
        assert select_unquantized_moe_backend(config)[0] == backend
