"""An adapter that starts exactly at the base, in the form that PEFT and everything built on it knows.

With A = A0 + dA (r, d_in) and B = B0 + dB (d_out, r) the weight changes by

    delta W  =  s (B A - B0 A0)  =  s (dB A + B0 dA)  =  s [dB | B0] [A ; dA]        s: scaling

The product on the right is a standard LoRA of rank 2r. With B frozen it is s B0 dA, of rank r. The modules below stand
in the places of PEFT's `lora_A` and `lora_B`. Their `weight`, and what state dicts contain, are the two factors on the
right: whatever PEFT, transformers or TRL save, merge or publish is exactly the change that the model computes. The
trained parameters inside are the moves dA and dB, zero at the start; A0 and B0 are frozen. Nothing cancels in low
precision, and at dA = dB = 0 the product is exactly zero: the output before the first step equals the base's bit for
bit. W is never changed, so quantised bases work and one base serves all tasks.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftModelForSequenceClassification
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional as F


class _AdapterOutput(torch.autograd.Function):
    """s (dB A x + B0 dA x) with a backward pass written by hand.

    It reads x and the output gradient as often as plain LoRA does. Autograd would store a float32 copy of x and read x
    twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        d_a: torch.Tensor,
        d_b: torch.Tensor,
        a0: torch.Tensor,
        b0: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return (..., d_out) for x (..., d_in), in the adapter's dtype."""
        a0_x, d_a_x = F.linear(x.to(d_a.dtype), torch.cat([a0, d_a])).chunk(2, dim=-1)
        inner = torch.cat([a0_x + d_a_x, d_a_x], dim=-1)  # A x and dA x, (..., 2r)
        ctx.save_for_backward(x, inner, d_a, d_b, a0, b0)
        ctx.scaling = scaling
        return F.linear(inner, scaling * torch.cat([d_b, b0], dim=1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, dA and dB, given the gradient of the output (..., d_out)."""
        (gradient,) = gradients
        x, inner, d_a, d_b, a0, b0 = ctx.saved_tensors
        rank = len(d_a)
        through_b, through_b0 = F.linear(gradient, ctx.scaling * torch.cat([d_b, b0], dim=1).T).chunk(2, dim=-1)
        grad_d_a_x = through_b + through_b0
        grad_x = grad_d_a = grad_d_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.cat([through_b, grad_d_a_x], dim=-1) @ torch.cat([a0, d_a])).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_d_a = grad_d_a_x.flatten(0, -2).T @ x.to(d_a.dtype).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_d_b = ctx.scaling * gradient.flatten(0, -2).T @ inner[..., :rank].flatten(0, -2)
        return grad_x, grad_d_a, grad_d_b, None, None, None


class Factor(nn.Module):
    """One factor of the LoRA: a frozen start, and the move away from it, which is trained."""

    def __init__(self, start: torch.Tensor, *, trained: bool) -> None:
        super().__init__()
        self.start = nn.Parameter(start, requires_grad=False)
        self.move = nn.Parameter(torch.zeros_like(start), requires_grad=trained)
        self._trained = trained

    def standard(self) -> torch.Tensor:
        """Return the factor of the standard LoRA, as a function of the trained parameters."""
        raise NotImplementedError

    def set_standard(self, weight: torch.Tensor) -> None:
        """Take the values of a factor of the standard LoRA over."""
        raise NotImplementedError

    @property
    def value(self) -> torch.Tensor:
        """Return A or B."""
        return (self.start + self.move).detach()

    @property
    def weight(self) -> torch.Tensor:
        """Return the factor of the standard LoRA, as PEFT reads it."""
        with torch.no_grad():
            return self.standard()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002  torch's signature
        """Yield what is trained: PEFT lets all that it finds here be trained where it activates an adapter."""
        return iter([self.move] if self._trained else [])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.standard() if keep_vars else self.weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        _metadata: Mapping[str, Any],
        _strict: bool,
        missing_keys: list[str],
        _unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = state_dict.get(f"{prefix}weight")
        if found is None:
            missing_keys.append(f"{prefix}weight")
        elif found.shape != self.weight.shape:
            error_msgs.append(f"{prefix}weight has shape {tuple(found.shape)}, not {tuple(self.weight.shape)}")
        else:
            with torch.no_grad():
                self.set_standard(found.to(self.start))


class FactorA(Factor):
    """`lora_A`: [A ; dA] (2r, d_in), or dA (r, d_in) where B is frozen."""

    def __init__(self, start: torch.Tensor, *, b_is_trained: bool) -> None:
        super().__init__(start, trained=True)
        self.is_pair = b_is_trained

    def standard(self) -> torch.Tensor:
        return torch.cat([self.start + self.move, self.move]) if self.is_pair else self.move * 1

    def set_standard(self, weight: torch.Tensor) -> None:
        if not self.is_pair:
            self.move.copy_(weight)
            return
        a, d_a = weight.chunk(2)
        self.move.copy_(d_a)
        if not torch.equal(self.start + d_a, a):  # another start; otherwise A0 stays as it is, to the last bit
            self.start.copy_(a - d_a)


class FactorB(Factor):
    """`lora_B`: [dB | B0] (d_out, 2r), or B0 (d_out, r) where it is frozen."""

    def __init__(self, start: torch.Tensor, *, is_trained: bool) -> None:
        super().__init__(start, trained=is_trained)

    def standard(self) -> torch.Tensor:
        return torch.cat([self.move, self.start], dim=1) if self._trained else self.start * 1

    def set_standard(self, weight: torch.Tensor) -> None:
        if self._trained:
            d_b, b0 = weight.chunk(2, dim=1)
            self.move.copy_(d_b)
            self.start.copy_(b0)
        else:
            self.start.copy_(weight)


class ExactStart(LoraVariant):
    """PEFT's hook into the passes of a layer with such factors; PEFT calls it in place of its own two products."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return result (..., d_out) + s (B A - B0 A0) x for x (..., d_in).

        The products are in autocast's dtype, or in the adapter's own.
        """
        a, b, device = module.lora_A[active_adapter], module.lora_B[active_adapter], x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.move.dtype
        factors = (part.to(dtype) for part in (a.move, b.move, a.start, b.start))
        added: torch.Tensor = _AdapterOutput.apply(x, *factors, module.scaling[active_adapter])  # type: ignore[no-untyped-call]
        return result + added

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return W + s [dB | B0] [A ; dA]."""
        return orig_weight + _change(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the change to W in place."""
        orig_weight.data += _change(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight without the change."""
        return orig_weight - _change(module, active_adapter, orig_weight)


def _change(layer: LoraLayer, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the change of W (d_out, d_in) by an adapter, in W's dtype."""
    change: torch.Tensor = layer.get_delta_weight(adapter)
    return change.to(weight.dtype)


def set_factors(layer: LoraLayer, adapter: str, a0: torch.Tensor, b0: torch.Tensor, *, train_b: bool) -> None:
    """Let the adapter of a layer start at A0 (r, d_in) and B0 (d_out, r); PEFT's own factors say where and how."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    layer.lora_A[adapter] = FactorA(a0.to(a), b_is_trained=train_b)
    layer.lora_B[adapter] = FactorB(b0.to(b), is_trained=train_b)
    layer.lora_variant[adapter] = ExactStart()
    layer.cast_input_dtype_enabled = False  # the products cast; PEFT would keep the copy for the backward pass


def has_start(layer: LoraLayer, adapter: str) -> bool:
    """Return whether an adapter of a layer was made by `set_factors`."""
    return adapter in layer.lora_A and isinstance(layer.lora_A[adapter], FactorA)


def is_pair(layer: LoraLayer, adapter: str) -> bool:
    """Return whether the factors of an adapter that `set_factors` made have rank 2r."""
    return has_start(layer, adapter) and layer.lora_A[adapter].is_pair


class _WithReference(PeftModel):
    """A PeftModel that can have a copy of an adapter: TRL adds one as the reference of DPO and GRPO."""

    astra_settings: Any = None  # those of `trainer.python_api`, if it made the model

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter, as PEFT does; with the config of an adapter that exists, as a copy of its start."""
        copied = next((name for name, config in self.peft_config.items() if config is peft_config), None)
        result = super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        for layer in self.modules():
            if copied is not None and isinstance(layer, LoraLayer) and has_start(layer, copied):
                for factors in (layer.lora_A, layer.lora_B):
                    factors[adapter_name] = copy.deepcopy(factors[copied]).requires_grad_(requires_grad=False)
                layer.lora_variant[adapter_name] = ExactStart()
        return result

    def save_pretrained(
        self, save_directory: str, *args: Any, selected_adapters: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Write the adapters, as PEFT does, but no copies: a trainer would resume from a copy, not from the adapter."""
        names = list(self.peft_config)
        first = {id(config): name for name, config in reversed(self.peft_config.items())}
        own = [name for name in names if first[id(self.peft_config[name])] == name]
        super().save_pretrained(save_directory, *args, selected_adapters=selected_adapters or own, **kwargs)


class AstraModel(_WithReference, PeftModel):
    """PeftModel with exact starts, for models without a task of their own."""


class AstraModelForCausalLM(_WithReference, PeftModelForCausalLM):
    """PeftModelForCausalLM with exact starts."""


class AstraModelForSequenceClassification(_WithReference, PeftModelForSequenceClassification):
    """PeftModelForSequenceClassification with exact starts."""


MODELS: dict[str | None, type[PeftModel]] = {
    "CAUSAL_LM": AstraModelForCausalLM,
    "SEQ_CLS": AstraModelForSequenceClassification,
}


def with_reference(kind: type[PeftModel]) -> type[PeftModel]:
    """Return the class above that corresponds to a class of PEFT; others, and those above, as they are."""
    ours = (AstraModel, AstraModelForCausalLM, AstraModelForSequenceClassification)
    return next((model for model in ours if kind in model.__bases__), kind)
