"""Did you mean …?"""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like `word`, or None where nothing is close."""
    import difflib  # needed for mistakes only, and these can wait for it

    known = list(known)
    folded = {k.lower().replace("-", "_"): k for k in known}
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    if matches:
        return folded[matches[0]]
    # "lr" for "optimizer.lr": the last part of a dotted key is what people remember.
    tails = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    return tails[0] if tails else None
