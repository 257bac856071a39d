"""Penalties beside koff.py's hinge: a lambda that follows the gap, and a Lagrangian.

Both look ahead. AdamW's momentum keeps moving the gates for about nine more steps, and only the loss can reopen gates
that closed too far. So they penalise the gap between target and sparsity that is predicted for then.
"""

import math

import torch

import koff

MOMENTUM = 9  # steps: the sum of 0.9, 0.9^2, ...


class LookAhead(koff.Hinge):
    """Base of both: computes the current gap, the predicted gap and the growth of the gap since the last step."""

    def __init__(self, start):
        super().__init__(start)
        self.register_buffer("last", torch.full((2,), math.nan))  # sparsity and gap at the last step

    def gaps(self, sparsity, target):
        """(gap, predicted gap, growth of the gap), scalars. Only the predicted gap has a gradient."""
        gap = target - sparsity.detach()
        now = torch.stack([sparsity.detach(), gap])
        last = torch.where(self.last.isnan(), now, self.last)
        speed, growth = now - last
        self.last = now
        return gap, target - (sparsity + MOMENTUM * speed), growth


class ScaledHinge(LookAhead):
    """The hinge with a lambda that adapts. (The paper scales lambda automatically and does not say how.)

    Lambda grows by 3% a step while there is a gap that does not shrink, and falls by as much while there is no gap. A
    smaller lambda leaves more of the choice of gates to the loss.
    """

    CLOSE = 0.002  # of all parameters: a smaller gap is none
    GROWTH = 1.03
    LARGEST = 6000.0  # a larger lambda would leave nothing of the loss

    def forward(self, sparsity, target):
        gap, gap_ahead, growth = self.gaps(sparsity, target)
        loss = self.multiplier * gap_ahead.clamp(min=0)
        while_behind = torch.where(growth >= 0, self.GROWTH, 1.0)
        factor = torch.where(gap > self.CLOSE, while_behind, 1 / self.GROWTH)
        self.multiplier = (self.multiplier * factor).clamp(1.0, self.LARGEST)
        return loss


class Lagrangian(LookAhead):
    """lambda_1 gap + lambda_2 gap^2; both multipliers climb their own gradients (Sheared LLaMA, arXiv 2310.06694).

    It also pulls back gates that closed too far. lambda_2 starts at three times `start`, because a square is small;
    this is also the rate at which both climb. lambda_1 starts at 0 and climbs slowly: otherwise what it gathers on the
    way would carry the gates far beyond the target.
    """

    UP, DOWN = 0.01, 0.15  # of its gradient, for lambda_1

    def __init__(self, start):
        super().__init__(0.0)  # lambda_1
        self.rate = 3 * start
        self.register_buffer("squared", torch.tensor(3.0 * start))  # lambda_2

    def forward(self, sparsity, target):
        gap, gap_ahead, _ = self.gaps(sparsity, target)
        loss = self.multiplier * gap_ahead + self.squared * gap_ahead.square()
        slowly = torch.where(gap > 0, self.UP, self.DOWN)
        self.multiplier = (self.multiplier + self.rate * slowly * gap).clamp(min=0)  # the loss opens gates by itself
        self.squared = (self.squared + self.rate * gap.square()).clamp(min=0)
        return loss


koff.PENALTIES |= {"scaled": ScaledHinge, "lagrangian": Lagrangian}
