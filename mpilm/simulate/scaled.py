"""A protocol on fewer parameters than the model that it stands for, in the same time.

Scale       A protocol of P parameters runs on P/s of them. In machine.py a message of
            n bytes takes L + n/B: with n/s bytes and B/s the same time, so

                n -> n/s,   bandwidth -> bandwidth/s,   eager_bytes -> eager_bytes/s

            changes no time, but for messages that do not grow with the model (a
            lease, an agreement): their bytes seem s times slower, some microseconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mpilm.learner.flat import Layout


def scaled(layout: Layout, num_parameters: int) -> tuple[Layout, float]:
    """Return the layout with about `num_parameters` elements, and how many fewer.

    >>> small, scale = scaled(Layout.of([("w", (40, 10), "w"), ("b", (4,), "w")]), 101)
    >>> [(s.name, s.size) for s in small], scale
    ([('w', 100), ('b', 1)], 4.0)
    """
    factor = max(1.0, layout.size / num_parameters)
    if factor == 1.0:
        return layout, 1.0
    parts = [(s.name, (max(1, round(s.size / factor)),), s.component) for s in layout]
    small = Layout.of(parts)
    return small, layout.size / small.size


def scaled_settings(settings: Any, scale: float) -> Any:
    """Return a strategy's settings with sizes in bytes divided by `scale`."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    sizes = _scaled_sizes(values, scale)
    if "settings" in values:  # of the inner strategy of `hierarchical`
        inner = values["settings"]
        sizes["settings"] = inner | _scaled_sizes(inner, scale)
    return dataclasses.replace(settings, **sizes)


def _scaled_sizes(values: dict[str, Any], scale: float) -> dict[str, Any]:
    return {
        name: max(1, round(value / scale))
        for name, value in values.items()
        if name.endswith("_bytes") and value
    }
