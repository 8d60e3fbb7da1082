"""Perplexity of the same held-out text at several context lengths.

The text is cut into windows of the longest length once. For a shorter length, every window is cut into parts of that
length: all lengths therefore predict the same tokens (but for the first of each part) and differ only in the number of
preceding tokens. The mean is over tokens, not over windows, and a window is always full: no padding, no sliding.

By position: the mean over the tokens of the longest windows that have 1, 2-3, 4-7, ... tokens before them (Kaplan et
al. 2020 plot the loss this way): a model that cannot use its context stops improving, one that is beyond the length it
was trained for gets worse.

B rows of a batch, N windows, S tokens in a window, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm


@dataclass(frozen=True)
class LengthResult:
    """The measurement at one context length.

    Attributes:
        length: tokens of context.
        num_tokens: how many tokens were predicted.
        loss: their mean loss in nats.
        position_losses: the same for each of `position_buckets(length)`.
    """

    length: int
    num_tokens: int
    loss: float
    position_losses: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # 700: the largest that a float holds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity}


def evaluation_windows(documents: Iterable[Sequence[int]], length: int, max_windows: int | None = None) -> Tensor:
    """Cut tokenised documents into full windows, each from one document; the rest of a document is left out.

    The windows are taken in rounds, the first of every document before the second of any: `max_windows` of them come
    from as many documents as possible.

    Args:
        documents: token ids of each.
        length (`int`): tokens of a window.
        max_windows (`int`, *optional*): return at most this many.

    Returns:
        int64 token ids `[N, length]`.

    Raises:
        ValueError: if every document is shorter.
    """
    tokens = [torch.as_tensor(document, dtype=torch.long) for document in documents]
    num_rounds = max((len(row) // length for row in tokens), default=0)
    windows = [
        row[i * length : (i + 1) * length] for i in range(num_rounds) for row in tokens if (i + 1) * length <= len(row)
    ]
    if not windows:
        longest = max((len(row) for row in tokens), default=0)
        raise ValueError(
            f"no held-out document has {length} tokens (the longest of {len(tokens)} has {longest}). "
            "Evaluate at shorter lengths or hold out longer documents."
        )
    return torch.stack(windows[:max_windows])


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Return the (first, last) number of preceding tokens of each bucket: (1, 1), (2, 3), (4, 7), ...

    Buckets double in size; the last one ends at `length` - 1.
    """
    return [(1 << i, min((2 << i) - 1, length - 1)) for i in range((length - 1).bit_length())]


@torch.no_grad()
def perplexity_by_length(
    model: torch.nn.Module,
    windows_NS: Tensor,
    lengths: Sequence[int],
    tokens_per_batch: int = 8192,
    progress: str | None = None,
) -> list[LengthResult]:
    """Measure a causal language model on the same windows at each context length.

    Args:
        model: called as `model(input_ids=..., use_cache=False).logits`. Put into evaluation mode for the time of the
            call.
        windows_NS (`Tensor`): the result of `evaluation_windows`, int64 token ids.
        lengths: context lengths, each a divisor of S.
        tokens_per_batch (`int`): short windows are batched up to this many tokens; a longer window goes alone. Logits
            of one batch are in memory at once.
        progress (`str`, *optional*): shows a progress bar with this text.

    Returns:
        A result for each length, in order.

    Raises:
        ValueError: if a length does not divide S, or is below 2.
    """
    longest = windows_NS.shape[1]
    for length in lengths:
        if length < 2 or longest % length:
            raise ValueError(f"context length {length} must be at least 2 and divide the windows of {longest} tokens.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    results = []
    with tqdm(total=windows_NS.numel() * len(lengths), desc=progress, unit="tok", disable=progress is None) as bar:
        for length in lengths:
            rows = windows_NS.reshape(-1, length)
            # Summed over windows; by number of preceding tokens, from 1.
            losses_S = torch.zeros(length - 1, dtype=torch.float64)
            for batch in rows.split(max(1, tokens_per_batch // length)):
                logits_BSV = model(input_ids=batch.to(device), use_cache=False).logits
                for row, logits_SV in zip(batch, logits_BSV, strict=True):
                    losses = F.cross_entropy(logits_SV[:-1].float(), row[1:].to(device), reduction="none")
                    losses_S += losses.double().cpu()
                bar.update(batch.numel())
            buckets = [
                losses_S[first - 1 : last].mean().item() / len(rows) for first, last in position_buckets(length)
            ]
            num_tokens = len(rows) * (length - 1)
            results.append(LengthResult(length, num_tokens, losses_S.sum().item() / num_tokens, tuple(buckets)))
    model.train(was_training)
    return results
