"""Not in the paper: states centred by language, so that "the same" can no longer mean "what all prompts share".

On published models one large vector makes up most of every hidden state, whatever the prompt, so that prompts which
have nothing to do with each other are nearly as collinear as translations. The plain loss is then low before it has
compared any meaning. Here the mean state of each language is taken away first; what is left differs from prompt to
prompt. `data/results/README.md` says what that changes.
"""

import torch
from torch import nn


class CentredByLanguage(nn.Module):
    """States minus the mean of their language, and then the extractor: (n, m, d_h) -> what the extractor makes of it.

    kind "running": the mean over all batches so far, with at least a tenth of the newest; it moves in training only,
    that is where gradients are recorded. "batch": the mean of these n states alone, in which each of them has a part.
    No gradient goes through the means. All groups must have the same m languages in the same order.
    """

    def __init__(self, extractor: nn.Module, kind: str, languages: int, hidden_size: int):
        super().__init__()
        self.extractor, self.kind = extractor, kind
        self.register_buffer("mean", torch.zeros(languages, hidden_size))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for another number of languages than it was made for."""
        if states.shape[1] != len(self.mean):
            raise ValueError(f"centring needs all {len(self.mean)} languages of each prompt, got {states.shape[1]}")
        own = states.detach().float().mean(0)  # (m, d_h)
        if self.kind == "batch":
            return self.extractor(states - own)
        if torch.is_grad_enabled():
            self.batches += 1
            self.mean.lerp_(own, torch.clamp(1 / self.batches, min=0.1))
        return self.extractor(states - self.mean)
