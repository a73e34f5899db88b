"""Forward passes over the calibration batches, each from where the last one over its batch ended.

The layers are calibrated group after group, from a model's first block to its last. Without this every group would cost
a pass of its own; as in GPTQ, only the block in which a group ends is computed twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.data import Batch


class Passes:
    """A model and its calibration batches.

    Between two passes over a batch the output of one block stays in main memory: n_tokens x hidden values in the
    model's dtype. A model whose blocks hand on more than their output is found out, and runs from its beginning.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._model = model
        self._blocks = _independent_blocks(model, batches[0])
        self._block_of = {layer: i for i, block in enumerate(self._blocks) for layer in block.modules()}
        # FSDP2 gathers and frees weights around whole forward passes, which must not be cut short
        self._may_end_early = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._kept: dict[int, tuple[int, Any]] = {}  # by batch: a block and what it returned

    @torch.no_grad()
    def run(self, number: int, layers: Iterable[nn.Module]) -> None:
        """Run batch `number` at least from before the first of `layers` to behind the last."""
        places = [self._block_of.get(layer) for layer in layers]
        inside = [place for place in places if place is not None]
        first, last = (min(inside), max(inside)) if len(inside) == len(places) else (0, len(self._blocks))
        done, output = self._kept.get(number, (-1, None))
        if done >= first:
            done = -1

        def keep(_block: nn.Module, _inputs: Any, output: Any) -> None:
            self._kept[number] = last - 1, send_to_device(output, "cpu")

        def end(*_: Any) -> None:
            raise _AllSeen

        with ExitStack() as undo:
            undo.enter_context(_returning(self._blocks[: done + 1], output))
            if done < last - 1 < len(self._blocks) - 1:
                undo.callback(self._blocks[last - 1].register_forward_hook(keep).remove)
            if last < len(self._blocks) and self._may_end_early:
                undo.callback(self._blocks[last].register_forward_hook(end).remove)
                undo.enter_context(suppress(_AllSeen))
            self._model(**_inputs(self.batches[number]))


class _AllSeen(Exception):
    """Ends a forward pass."""


def _inputs(batch: Batch) -> Batch:
    return {key: value.to(PartialState().device) for key, value in batch.items() if key != "labels"}


@contextmanager
def _returning(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let `blocks` compute nothing and return `output`; a model's own loop over them stays as it is."""
    output = send_to_device(output, PartialState().device)
    before = [vars(block).get("forward") for block in blocks]  # an instance may have one of its own
    for block in blocks:
        block.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@torch.no_grad()
def _independent_blocks(model: nn.Module, batch: Batch) -> Sequence[nn.Module]:
    """Return the model's blocks in the order in which they run; none where one needs more than the last one's output.

    Tried out on two tokens: the last block must return the same when all before it are left out.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=()))
    if not blocks:
        return []
    returned: list[tuple[int, Any]] = []

    def note(number: int, output: Any) -> None:
        returned.append((number, output))

    short = {key: value[:1, :2] for key, value in _inputs(batch).items()}
    handles = [
        block.register_forward_hook(lambda _block, _inputs, output, number=i: note(number, output))
        for i, block in enumerate(blocks)
    ]
    try:
        model(**short)
        if [number for number, _ in returned] != list(range(len(blocks))):
            return []
        outputs = [output for _, output in returned]
        with _returning(blocks[:-1], outputs[-2] if len(blocks) > 1 else None):
            model(**short)
    except Exception:  # whatever a model of another kind says when its blocks are left out
        return []
    finally:
        for handle in handles:
            handle.remove()
    same = [torch.equal(a, b) for a, b in zip(_tensors(outputs[-1]), _tensors(returned[-1][1]), strict=True)]
    return blocks if all(same) else []


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [part for part in output if isinstance(part, torch.Tensor)]
