"""L2-regularised multinomial logistic regression for several penalties at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from diffrep.heads import LinearHead

# More pairs than the usual 10: features are strongly correlated, and a pair costs little beside a product with them.
HISTORY = 30
TOLERANCE = 1e-4


class LogisticPath:
    """Fits one linear classifier for each penalty, together.

    Minimises mean cross-entropy + penalty / 2 * |W|^2 on standardised features; biases are free. scikit-learn's C for
    the same problem is 1 / (penalty * N). With several labels a sample, each label is a logistic regression of its
    own: the loss is the mean over samples of the binary cross-entropies' sum over labels.

    All penalties share each product with the feature matrix; each has its own L-BFGS memory and step length (Nocedal
    and Wright, 2006, algorithm 7.4), so none waits for or disturbs another.

    Args:
        penalties: L2 penalties.
        max_iter: Most iterations.
    """

    def __init__(self, penalties: tuple[float, ...], max_iter: int = 100):
        self.penalties = penalties
        self.max_iter = max_iter

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int) -> LogisticPath:
        """Fits on features (N, ...) and labels (N,) int64 below `classes`, or (N, classes) of 0 and 1."""
        x = features.flatten(1).float()
        self.mean, self.std = standardisation(x)
        x = (x - self.mean) / self.std
        x = torch.cat([x, torch.ones(len(x), 1, device=x.device)], dim=1)
        target = one_hot(labels, classes).to(x)
        entropy = _binary_entropies if labels.ndim == 2 else _cross_entropy
        penalty = torch.tensor(self.penalties, device=x.device)[:, None, None].repeat(1, x.shape[1], 1)
        penalty[:, -1] = 0
        count, width = len(self.penalties), x.shape[1]

        def loss_and_gradient(flat: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, strength = flat.view(-1, width, classes), penalty[which]
            # One product for all penalties, (N, D) x (D, K * S). Penalties lie innermost: a softmax over contiguous
            # rows is many times as fast as one over a last dimension of ten.
            scores = (x @ weights.permute(1, 2, 0).reshape(width, -1)).view(len(x), classes, -1)
            loss, residual = entropy(scores, target[..., None])
            loss = loss / len(x) + (strength * weights.square()).sum((1, 2)) / 2
            # Not x.T @ residual: with ten narrow columns that product is ten times as slow on CPUs.
            product = (residual.view(len(x), -1).T @ x).view(classes, -1, width).permute(1, 2, 0)
            return loss, (product / len(x) + strength * weights).reshape(len(flat), -1)

        start = torch.zeros(count, width * classes, device=x.device)
        self.weights = minimise(loss_and_gradient, start, self.max_iter).view(count, width, classes)
        return self

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (S, N, K) of features (N, ...) for each penalty."""
        x = (features.flatten(1).float() - self.mean) / self.std
        return torch.einsum("nd,sdk->snk", x, self.weights[:, :-1]) + self.weights[:, -1:]

    def head(self, index: int) -> LinearHead:
        """Returns the classifier of one penalty as a module, in eval mode."""
        weights = self.weights[index]
        return LinearHead.from_fit(self.mean, self.std, weights[:-1].T, weights[-1])


def standardisation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation (D,) of features (N, D)."""
    return x.mean(0), divisor(x.std(0, correction=0))


def divisor(std: torch.Tensor) -> torch.Tensor:
    """Returns what features of these standard deviations (D,) are divided by: 1 where they are constant.

    A constant feature carries nothing, and 1 leaves it at zero after centring.
    """
    return torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.ones_like(std))


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Returns targets (N, classes) of labels (N,), or labels (N, classes) of 0 and 1 as they are."""
    return labels if labels.ndim == 2 else F.one_hot(labels, classes)


def _cross_entropy(scores: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sum of losses (S,) of scores (N, K, S) for targets (N, K, 1), and its gradient (N, K, S)."""
    logs = F.log_softmax(scores, dim=1)
    return -(logs * target).sum((0, 1)), logs.exp_().sub_(target)


def _binary_entropies(scores: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for labels that are independent of each other."""
    return (F.softplus(scores) - scores * target).sum((0, 1)), scores.sigmoid() - target


@torch.no_grad()
def minimise(
    loss_and_gradient: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    start: torch.Tensor,
    max_iter: int,
) -> torch.Tensor:
    """Minimises S independent convex functions side by side with L-BFGS.

    Args:
        loss_and_gradient: Maps points (R, P) of the problems (R,) int64 to losses (R,) and gradients (R, P).
        start: First points (S, P).
        max_iter: Most iterations; a problem rests, and costs no more, once its gradient has shrunk by 1e-4.

    Returns:
        The points reached, (S, P).
    """
    result, which = start.clone(), torch.arange(len(start), device=start.device)
    point = start
    loss, gradient = loss_and_gradient(point, which)
    goal = TOLERANCE * gradient.norm(dim=1).clamp(min=1e-12)
    moves: list[torch.Tensor] = []
    turns: list[torch.Tensor] = []
    for _ in range(max_iter):
        active = gradient.norm(dim=1) > goal
        if not active.all():
            result[which] = point
            which, point, loss, gradient, goal = (one[active] for one in (which, point, loss, gradient, goal))
            moves, turns = [one[active] for one in moves], [one[active] for one in turns]
        if not len(which):
            return result
        direction = -_inverse_hessian(gradient, moves, turns)
        slope = (direction * gradient).sum(1)
        # Without a memory the scale of the gradient says nothing about the step.
        step = torch.ones_like(loss) if moves else 1 / gradient.norm(dim=1).clamp(min=1.0)
        for _ in range(20):
            trial = point + step[:, None] * direction
            trial_loss, trial_gradient = loss_and_gradient(trial, which)
            enough = trial_loss <= loss + 1e-4 * step * slope + 1e-7 * loss.abs()
            if enough.all():
                break
            step = torch.where(enough, step, step / 2)
        moves, turns = [*moves, trial - point][-HISTORY:], [*turns, trial_gradient - gradient][-HISTORY:]
        point, loss, gradient = trial, trial_loss, trial_gradient
    result[which] = point
    return result


def _inverse_hessian(gradient: torch.Tensor, moves: list[torch.Tensor], turns: list[torch.Tensor]) -> torch.Tensor:
    """Applies the L-BFGS estimate of the inverse Hessian of each problem to its gradient (two-loop recursion)."""
    result = gradient.clone()
    pairs = []
    for move, turn in zip(reversed(moves), reversed(turns), strict=True):
        curvature = (move * turn).sum(1)
        # A problem that cannot be bettered any more does not move: its pair is zero and must count for nothing.
        rho = torch.where(curvature > 1e-20, 1 / curvature.clamp(min=1e-20), torch.zeros_like(curvature))
        alpha = rho * (move * result).sum(1)
        result -= alpha[:, None] * turn
        pairs.append((move, turn, rho, alpha))
    if moves:
        curvature, size = (moves[-1] * turns[-1]).sum(1), turns[-1].square().sum(1)
        scale = torch.where(size > 0, curvature / size.clamp(min=1e-30), torch.ones_like(size))
        result *= scale[:, None]
    for move, turn, rho, alpha in reversed(pairs):
        beta = rho * (turn * result).sum(1)
        result += (alpha - beta)[:, None] * move
    return result
