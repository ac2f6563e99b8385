"""What a protocol makes of an image: the frame it is matched in, its cells, and where points lie among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffrep.config.protocol import Protocol
from diffrep.data.frame import Frame, frame_of


@dataclass(frozen=True)
class Layout:
    """The cells of one image.

    Grid coordinates (x, y) count cells from the centre of the first one, which is (0, 0).

    Attributes:
        frame: From the image to the protocol's frame.
        grid: (rows, columns) of cells.
        protocol: The rules.
    """

    frame: Frame
    grid: tuple[int, int]
    protocol: Protocol

    @property
    def cell(self) -> np.ndarray:
        """Sides of a cell in pixels of the frame, (x, y)."""
        return np.array(self.frame.canvas[::-1]) / self.grid[::-1]

    @property
    def last(self) -> np.ndarray:
        """Grid coordinates (x, y) of the last cell."""
        return np.array(self.grid[::-1]) - 1

    def lookup(self, points: np.ndarray) -> np.ndarray:
        """Returns the grid coordinates at which the descriptors of annotated points are read.

        Whole numbers with the queries "floor" and "round". Points outside the frame take its nearest cell.

        Args:
            points: (K, 2) as annotated.
        """
        protocol, framed = self.protocol, self.frame.to_canvas(points)
        if protocol.query == "aligned":
            found = framed / self.frame.canvas[::-1] * self.last
        elif protocol.query == "floor":
            # Rounding first: 252 / 14 must be 18 after a trip through the frame as well.
            found = np.floor(np.round(framed / self.cell, 9))
        else:
            found = framed / self.cell - protocol.centre
        found = found.clip(0, self.last)
        return np.rint(found) if protocol.query == "round" else found

    def middles(self, axis: int) -> np.ndarray:
        """Returns the positions in the image, from its corner, of the centres of columns (axis 0) or rows (axis 1)."""
        count = self.grid[1 - axis]
        return ((np.arange(count) + 0.5) * self.cell[axis] - self.frame.offset[axis]) / self.frame.scale[axis]

    def position(self, found: np.ndarray) -> np.ndarray:
        """Takes grid coordinates (..., 2) to positions in the image, from its corner."""
        return self.frame.to_original((np.asarray(found) + 0.5) * self.cell)

    def annotate(self, found: np.ndarray) -> np.ndarray:
        """Takes grid coordinates (..., 2) to points of the image as they are annotated."""
        return self.frame.to_original((np.asarray(found) + self.protocol.centre) * self.cell)

    def mirror(self, points: np.ndarray) -> np.ndarray:
        """Returns where annotated points (K, 2) are annotated in the mirrored image."""
        width = self.frame.original[1]
        # Cells that are numbered from 0 end at the last one, positions end at the edge.
        end = width - (1 - 2 * self.protocol.centre) * self.cell[0] / self.frame.scale[0]
        return np.stack([end - points[:, 0], points[:, 1]], axis=1)


def layout_of(protocol: Protocol, original: tuple[int, int]) -> Layout:
    """Returns the cells of an image.

    Args:
        protocol: The rules.
        original: (H, W) of the image.
    """
    frame = _frame(protocol, original)
    grid = frame.canvas if protocol.grid is None else (protocol.grid, protocol.grid)
    return Layout(frame, grid, protocol)


def _frame(protocol: Protocol, original: tuple[int, int]) -> Frame:
    if protocol.size is None:
        return frame_of(original, None)
    size = (protocol.size, protocol.size)
    if protocol.fit == "resize":
        return frame_of(original, size)
    # GeoAware-SC moves points by the exact scale, though the picture's short side is rounded to whole pixels.
    scale = protocol.size / max(original)
    offset = frame_of(original, size, "pad").offset if protocol.fit == "pad" else (0.0, 0.0)
    return Frame(tuple(original), size, (scale, scale), offset)
