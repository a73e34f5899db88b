"""Forward passes over the calibration batches; each pass continues where the last pass over its batch ended.

Layers are calibrated in groups, from the first block of the model to the last. Whole passes would cost one forward pass
per group. Here all groups together cost one forward pass, plus one block per group, because the block in which a group
ends is computed twice (as in GPTQ).
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

    Between two passes over a batch, the output of one block is kept in main memory: n_tokens x hidden_size values in
    the model's dtype. If a block of the model depends on more than the output of the block before it, which is checked
    at the start, every pass runs from the first block.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._model = model
        self._blocks = _independent_blocks(model, batches[0])
        self._block_of = {layer: i for i, block in enumerate(self._blocks) for layer in block.modules()}
        # FSDP2 gathers and frees weights around whole forward passes, which must not end early.
        self._may_end_early = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self._saved: dict[int, tuple[int, Any]] = {}  # batch number to (block number, output of the block)

    @torch.no_grad()
    def run(self, number: int, layers: Iterable[nn.Module]) -> None:
        """Run batch `number` through at least the blocks from the first of `layers` to the last."""
        blocks = [self._block_of.get(layer) for layer in layers]
        known = [block for block in blocks if block is not None]
        # A layer outside the blocks, such as the head, needs the whole pass.
        first, last = (min(known), max(known)) if len(known) == len(blocks) else (0, len(self._blocks))
        saved, output = self._saved.get(number, (-1, None))
        if saved >= first:  # the saved output comes after the first layer
            saved = -1

        def save_output(_block: nn.Module, _inputs: Any, output: Any) -> None:
            self._saved[number] = last - 1, send_to_device(output, "cpu")

        def end_pass(*_: Any) -> None:
            raise _PassEnded

        with ExitStack() as undo:
            undo.enter_context(_fixed_output(self._blocks[: saved + 1], output))
            if saved < last - 1 < len(self._blocks) - 1:
                undo.callback(self._blocks[last - 1].register_forward_hook(save_output).remove)
            if last < len(self._blocks) and self._may_end_early:
                undo.callback(self._blocks[last].register_forward_hook(end_pass).remove)
                undo.enter_context(suppress(_PassEnded))
            self._model(**_inputs(self.batches[number]))


class _PassEnded(Exception):
    """Ends a forward pass after the last block that is needed."""


def _inputs(batch: Batch) -> Batch:
    return {key: value.to(PartialState().device) for key, value in batch.items() if key != "labels"}


@contextmanager
def _fixed_output(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let `blocks` return `output` without computing; the model's loop over its blocks is unchanged."""
    output = send_to_device(output, PartialState().device)
    before = [vars(block).get("forward") for block in blocks]  # an instance may override the method of its class
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
    """Return the model's blocks in execution order, or none if a block needs more than the output of the one before.

    This is tested on two tokens: the last block must return the same when all blocks before it are skipped.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=()))
    if not blocks:
        return []
    returned: list[tuple[int, Any]] = []

    def record(number: int, output: Any) -> None:
        returned.append((number, output))

    short = {key: value[:1, :2] for key, value in _inputs(batch).items()}
    handles = [
        block.register_forward_hook(lambda _block, _inputs, output, number=i: record(number, output))
        for i, block in enumerate(blocks)
    ]
    try:
        model(**short)
        if [number for number, _ in returned] != list(range(len(blocks))):
            return []
        outputs = [output for _, output in returned]
        with _fixed_output(blocks[:-1], outputs[-2] if len(blocks) > 1 else None):
            model(**short)
    except Exception:  # models of other architectures may raise anything when blocks are skipped
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
