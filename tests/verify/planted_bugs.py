"""Models with a mistake that makes a shard differ from the whole sequence, each of a kind that users make."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ring_hf.hf import ContextParallelCollator
from tests.hf.models import llama


class HarmlessForCausalLM(LlamaForCausalLM):
    """Computes the same as its base class, but is not proven by name."""


class LocalPositionsForCausalLM(LlamaForCausalLM):
    """Ignores the position_ids of the batch."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class LocalLabelsForCausalLM(LlamaForCausalLM):
    """Shifts the labels of a shard."""

    def forward(self, input_ids: Any = None, shift_labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class MeanLossForCausalLM(LlamaForCausalLM):
    """Divides by the targets of a shard."""

    def forward(self, input_ids: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class LocalAttention(nn.Module):
    """Attention that calls PyTorch's function itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj
        self.head_dim = layer.head_dim

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> tuple[Any, None]:
        projected = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (x.view(shape).transpose(1, 2) for x in projected)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Centred(nn.Module):
    """A feed-forward layer that subtracts the mean over tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(1, keepdim=True))


class Smoothed(nn.Module):
    """A feed-forward layer that averages a token with the one before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class LostGradient(nn.Module):
    """A feed-forward layer whose input gets no gradient where the sequence is sharded."""

    def __init__(self, layer: nn.Module, length: int) -> None:
        super().__init__()
        self.layer, self.length = layer, length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x if x.shape[1] == self.length else x.detach())


class LocalPositionsCollator(ContextParallelCollator):
    """Counts positions from 0 on every rank."""

    def __call__(self, features: Any, return_tensors: Any = None) -> dict[str, Any]:
        batch = super().__call__(features, return_tensors)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return batch


class Dropped(nn.Module):
    """A feed-forward layer with dropout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x))


def with_layer(kind: Any, name: str, *arguments: Any) -> LlamaForCausalLM:
    """Return a Llama whose second layer has another `self_attn` or `mlp`."""
    model = llama()
    layer = model.model.layers[1]
    setattr(layer, name, kind(getattr(layer, name), *arguments))
    return model


def of_class(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return kind(llama().config)
