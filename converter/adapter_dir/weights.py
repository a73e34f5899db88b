"""Whether an engine can compute with the weights of a LoRA: none is so large that answers overflow."""

from pathlib import Path

from converter.adapter_dir.errors import MalformedAdapter
from converter.adapter_dir.lora import LoraAdapter

LARGEST_FACTOR = 65504.0  # float16's largest number, in which an engine may store lora_A and scaling * lora_B
LARGEST_CHANGE = 1e4  # of one weight of the base; training changes weights by less than 10


def check_weights(folder: Path, lora: LoraAdapter) -> None:
    """Raise MalformedAdapter if a weight of `lora`, read from `folder`, is too large; `load_lora` found all finite.

    The largest change of a weight of a layer is estimated from above: s sum_r max |lora_B[:, r]| max |lora_A[r]|.
    """
    for module, (a, b) in lora.layers.items():
        largest_a, largest_b = a.abs().amax(1).double(), lora.scaling(module, len(a)) * b.abs().amax(0).double()
        factor = max(largest_a.max().item(), largest_b.max().item())
        if factor > LARGEST_FACTOR:
            raise MalformedAdapter(f"{folder}: {module!r} has weights of {factor:.1e}, allowed are {LARGEST_FACTOR:g}")
        change = (largest_a @ largest_b).item()
        if change > LARGEST_CHANGE:
            raise MalformedAdapter(
                f"{folder}: {module!r} may change a weight of the base by {change:.1e}, allowed are "
                f"{LARGEST_CHANGE:g}: answers would overflow"
            )
