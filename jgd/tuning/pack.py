"""Packs lanes into tiles at least cost."""

import math
from collections.abc import Sequence

__all__ = ["pack_tiles"]


def pack_tiles(lanes: int, widths: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Return the cheapest widths that hold the lanes, widest first, with at most a tenth to spare.

    Args:
      lanes: at least 1.
      widths: widths of tiles; with 1 among them any number of lanes fits exactly.
      costs: the time of a step at each width.
    """
    pairs = sorted(zip(widths, costs, strict=True), reverse=True)
    widest = pairs[0][0]
    whole = max(0, lanes // widest - 2)  # beyond that only tiles of the widest can be cheapest
    rest = lanes - whole * widest
    most = rest + widest
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(math.inf, [])] * most
    for total in range(1, most + 1):
        for width, cost in pairs:
            if width <= total and best[total - width][0] + cost < best[total][0]:
                best[total] = best[total - width][0] + cost, [*best[total - width][1], width]
    tight = range(rest, max(rest, math.floor(1.1 * lanes) - whole * widest) + 1)
    within = [best[total] for total in tight if total <= most]
    _, chosen = min(within if any(math.isfinite(c) for c, _ in within) else best[rest:])
    return sorted([widest] * whole + chosen, reverse=True)
