"""Sizes of a decoder and the kinds of its layers; from these, its parameters, FLOPs and attention shapes.

Letters: h hidden size, H and K query and key/value heads, D and E head dims of queries and values, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

from ..costmodel.devices import Shape


@dataclass(frozen=True)
class Model:
    """Sizes of a causal language model.

    Attributes:
        source: where the sizes come from, in words.
        hidden: hidden size.
        tied: whether embedding and head share their weights.
        windows: per layer, the keys that a query sees (its own included), None for all.
        sparse: per layer, whether experts replace the dense MLP.
        ff: width of the dense MLP, which has three matrices (gate, up, down).
        expert_ff, shared_ff: widths of one expert, and of the experts that every token passes.
        q_rank, kv_rank, rope_dim: multi-head latent attention (DeepSeek); 0 without.
        qk_norm: "" without, "head" for one per head dim, "whole" for one over all heads.
        norms: RMS norms of a layer.
        wide_norm: whether norms keep their result in fp32 (Gemma).
    """

    name: str
    source: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    ff: int
    vocab: int
    tied: bool
    windows: tuple[int | None, ...]
    sparse: tuple[bool, ...]
    experts: int = 0
    experts_per_token: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    qk_norm: str = ""
    norms: int = 2
    wide_norm: bool = False

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def q_width(self) -> int:
        """Elements of a token's queries, `H D`."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys and values, `K (D + E)`."""
        return self.kv_heads * (self.head_dim + self.v_head_dim)

    @property
    def out_width(self) -> int:
        """Elements of a token's attention output, `H E`."""
        return self.heads * self.v_head_dim

    @property
    def attention_matrices(self) -> int:
        """Weights of the projections of a layer's attention."""
        h, out = self.hidden, self.out_width * self.hidden
        if not self.kv_rank:
            return h * (self.q_width + self.kv_width) + out
        query = h * self.q_rank + self.q_rank * self.q_width if self.q_rank else h * self.q_width
        nope = self.head_dim - self.rope_dim
        keys = h * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * (nope + self.v_head_dim)
        return query + keys + out

    @property
    def _attention_vectors(self) -> int:
        vectors = self.qkv_bias * (self.q_width + self.kv_width) + self.out_bias * self.hidden
        vectors += self.heads * self.sinks + self.q_rank + self.kv_rank
        keys = self.kv_heads * self.head_dim
        return vectors + {"": 0, "head": 2 * self.head_dim, "whole": self.q_width + keys}[self.qk_norm]

    def mlp_matrices(self, layer: int, active: bool = False) -> int:
        """Return the weights of a layer's MLP, with `active` only those that one token is multiplied with."""
        if not self.sparse[layer]:
            return 3 * self.hidden * self.ff
        experts = self.experts_per_token if active else self.experts
        router = self.hidden * self.experts + self.hidden * self.shared_gate
        return 3 * self.hidden * (experts * self.expert_ff + self.shared_ff) + router

    def _mlp_vectors(self, layer: int) -> int:
        if not self.sparse[layer]:
            return self.mlp_bias * (2 * self.ff + self.hidden)
        per_expert = self.expert_bias * (2 * self.expert_ff + self.hidden)
        return self.experts * (per_expert + self.router_bias)

    def layer_parameters(self, layer: int) -> int:
        """Return the number of parameters of one layer."""
        vectors = self._attention_vectors + self._mlp_vectors(layer) + self.norms * self.hidden
        return self.attention_matrices + self.mlp_matrices(layer) + vectors

    @property
    def non_layer_parameters(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.non_layer_parameters + sum(map(self.layer_parameters, range(self.layers)))

    @property
    def largest_layer_parameters(self) -> int:
        return max(map(self.layer_parameters, range(self.layers)))

    @property
    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: all active matrices and the head, but not the embedding."""
        layers = sum(self.attention_matrices + self.mlp_matrices(n, active=True) for n in range(self.layers))
        return layers + self.vocab * self.hidden

    @property
    def window_counts(self) -> Counter[int | None]:
        """Number of layers by window, None for layers without one."""
        return Counter(self.windows)

    def count_pairs(self, length: int) -> int:
        """Return the visible pairs of query and key in all layers: `s (s + 1) / 2` in each without a window."""
        return sum(count * count_visible_pairs(length, window) for window, count in self.window_counts.items())

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of the score and the weighted value of one pair in the forward: `2 H (D + E)`."""
        return 2 * self.heads * (self.head_dim + self.v_head_dim)

    def shape(self, bytes_per_element: int, num_rows: int = 1) -> Shape:
        """Return an attention layer for the cost model."""
        return Shape(self.heads, self.kv_heads, self.head_dim, self.v_head_dim, bytes_per_element, num_rows)


def count_visible_pairs(length: int, window: int | None) -> int:
    """Return the visible pairs of a causal sequence in which each query sees at most `window` keys, None for all.

    >>> count_visible_pairs(4, None), count_visible_pairs(4, 2)
    (10, 7)
    """
    max_keys = length if window is None else min(window, length)
    return max_keys * (max_keys + 1) // 2 + (length - max_keys) * max_keys
