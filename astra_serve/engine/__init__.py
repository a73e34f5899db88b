"""vLLM behind the interface of `adapters.protocol`. Only this package and `cpu_lora` import vllm."""
