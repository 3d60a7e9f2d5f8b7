"""How numbers are shown to people: rates in per cent, few digits, readable durations."""

from __future__ import annotations

import math
import re

# Fractions of one by their names. keypoint_nmse and losses are not among them.
_RATE = re.compile(r"(^|_)(top\d+|acc|accuracy|map|map_\d+|mar_\d+|ap|ap_\d+|auroc|auc|f1|precision|recall|iou|miou|nmi|ari|dice)(_|$)")


def is_rate(name: str) -> bool:
    """Whether a metric is a fraction of one, shown in per cent: `val/top1`, `val/worst_group_top1`, `val/map_50`."""
    return bool(_RATE.search(name.split("/", 2)[min(1, name.count("/"))]))  # val/map_class/dog is a map


def show(name: str, value: float | None) -> str:
    """The value of the metric `name`, for a table or a line."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if is_rate(name):
        return f"{100 * value:.2f} %"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10_000 else f"{value:.3e}"


def duration(seconds: float) -> str:
    """4 s, 1 min 12 s, 3 h 05 min, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"
