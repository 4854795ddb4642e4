"""Packing of lanes into tiles at least cost."""

import math
from collections.abc import Sequence

__all__ = ["pack_tiles"]


def pack_tiles(lanes: int, widths: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Return the widths of the cheapest tiles that hold the lanes, widest first.

    The padding is at most a tenth of the lanes, if any choice of widths allows it.

    Args:
      lanes: number of lanes, at least 1.
      widths: possible widths of tiles.
      costs: time of a step at each width.
    """
    pairs = sorted(zip(widths, costs, strict=True), reverse=True)
    widest = pairs[0][0]
    full = max(0, lanes // widest - 2)  # tiles that are the widest in any case
    rest = lanes - full * widest
    most = rest + widest
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(math.inf, [])] * most
    for total in range(1, most + 1):
        for width, cost in pairs:
            if width <= total and best[total - width][0] + cost < best[total][0]:
                best[total] = best[total - width][0] + cost, [*best[total - width][1], width]
    totals = range(rest, max(rest, math.floor(1.1 * lanes) - full * widest) + 1)
    tight = [best[total] for total in totals if total <= most]
    _, chosen = min(tight if any(math.isfinite(c) for c, _ in tight) else best[rest:])
    return sorted([widest] * full + chosen, reverse=True)
