"""Points read off similarity maps as an expectation, with gradients."""

from __future__ import annotations

import torch

from diffrep.errors import ConfigError, UnknownNameError

OUTSIDE = ("zero", "exclude")


def soft_argmax(
    similarity: torch.Tensor,
    beta: float = 0.02,
    window: int | None = None,
    kernel: float | None = None,
    outside: str = "zero",
) -> torch.Tensor:
    """Returns the mean cell under a softmax over each similarity map.

    Window and kernel lie around the cell with the highest similarity, the first of equals; no gradient flows through
    its choice. GeoAware-SC (Zhang et al., 2024) takes windows of 15 (supervised) and 11 cells (zero-shot), and
    multiplies similarities outside by 0. They then still count exp(0 / beta) each, which matters where the peak is
    near or below 0; `outside="exclude"` leaves them out.

    Args:
        similarity: (K, h, w), such as cosines of K queries with every cell of a map.
        beta: Temperature: similarities are divided by it.
        window: Side of a square window, odd; None takes the whole map.
        kernel: Standard deviation, in cells, of a Gaussian that similarities are multiplied by (SFNet, Lee et al.,
            2019; GeoAware-SC's windows below 0).
        outside: What becomes of similarities outside the window: "zero" as published, or "exclude".

    Returns:
        (K, 2) points (x, y) in cells, fp32 or better; the centre of the first cell is (0, 0).

    Raises:
        ConfigError: An argument has a wrong shape or range, or window and kernel are both given.
        UnknownNameError: There is no such `outside`.
    """
    if similarity.ndim != 3 or not similarity.is_floating_point() or 0 in similarity.shape[1:]:
        raise ConfigError(
            f"similarity must be floats (K, h, w), got {similarity.dtype} {tuple(similarity.shape)}; give one map a "
            "query"
        )
    _check(beta, window, kernel, outside)
    scores = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    height, width = scores.shape[1:]
    rows, columns = (torch.arange(n, device=scores.device, dtype=scores.dtype) for n in (height, width))
    if window is not None or kernel is not None:
        peak = scores.detach().flatten(1).argmax(1)
        down = rows - (peak // width)[:, None]  # (K, h) signed distance of each row from the peak's
        across = columns - (peak % width)[:, None]
        if kernel is not None:
            weight = [torch.exp(-offset.square() / (2 * kernel**2)) for offset in (down, across)]
            scores = scores * (weight[0][:, :, None] * weight[1][:, None])
        else:
            near = [offset.abs() <= window // 2 for offset in (down, across)]
            near = near[0][:, :, None] & near[1][:, None]
            scores = scores * near if outside == "zero" else scores.masked_fill(~near, -torch.inf)
    share = (scores / beta).flatten(1).softmax(1).view_as(scores)
    return torch.stack([share.sum(1) @ columns, share.sum(2) @ rows], dim=1)


def _check(beta: float, window: int | None, kernel: float | None, outside: str) -> None:
    if outside not in OUTSIDE:
        raise UnknownNameError("outside", outside, OUTSIDE)
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, got {beta}")
    if window is not None and kernel is not None:
        raise ConfigError(f"window={window} and kernel={kernel} cannot both be given; leave one out")
    if window is not None and (window != int(window) or window < 1 or window % 2 == 0):
        raise ConfigError(f"window must be an odd number of cells, so that it has a centre; got {window}")
    if kernel is not None and not kernel > 0:
        raise ConfigError(f"kernel must be above 0, a standard deviation in cells; got {kernel}")
