"""Runs inside the engine's workers: which adapters have a slot there. vLLM mixes this class into its worker's."""

from typing import Any


class WorkerExtension:
    """The calls that `collective_rpc` can make of a worker beside vLLM's own."""

    model_runner: Any  # the worker's

    def adapters_in_slots(self) -> list[int]:
        """Return the ids of the adapters in the slots of the batch, on the device; none without LoRA."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if manager is None:
            return []
        return [number for number in manager._adapter_manager.lora_index_to_id if number is not None]
