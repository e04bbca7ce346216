"""Muon for matrices and AdamW for the rest, with one learning-rate factor for both.

Muon: the momentum of each matrix is replaced by a nearby matrix whose singular values are all close to one
(a quintic Newton-Schulz iteration). Matrices of one shape go through it together.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
CHUNK = 6  # matrices at a time, so that they stay in the processor's cache


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """[n, out, in] to matrices with the same singular vectors and singular values near one."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-1, -2) if tall else x


class Optimizer:
    """Steps `muon` tensors ([out, in] or [experts, out, in]) with Muon and `adam` groups with AdamW."""

    def __init__(self, muon: list[Tensor], adam: list[dict], lr: float, momentum: float, decay: float) -> None:
        self.adam = torch.optim.AdamW(adam, betas=(0.9, 0.97), eps=1e-10, weight_decay=0.0, foreach=True)
        self.base_rates = [group["lr"] for group in self.adam.param_groups]
        self.lr, self.momentum, self.decay = lr, momentum, decay
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for tensor in muon:
            by_shape[tuple(tensor.shape[-2:])].append(tensor)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros(sum(_count(t) for t in g), *g[0].shape[-2:]) for g in self.groups]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the base learning rates; gradients are cleared."""
        for tensors, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.cat([t.grad.reshape(-1, *t.shape[-2:]) for t in tensors])
            buffer.lerp_(grads, 1 - self.momentum)
            update = torch.cat([orthogonalize(g) for g in grads.lerp(buffer, self.momentum).split(CHUNK)])
            rate = self.lr * factor * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for tensor, part in zip(tensors, update.split([_count(t) for t in tensors]), strict=True):
                tensor.mul_(1 - rate * self.decay).sub_(part.view_as(tensor), alpha=rate)
                tensor.grad = None
        for group, rate in zip(self.adam.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def _count(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim == 3 else 1
