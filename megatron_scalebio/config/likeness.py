"""The known word that a user may have meant."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return max(known, key=lambda candidate: likeness(word, candidate))


def likeness(word: str, candidate: str) -> float:
    """From 0 to 2: of dotted keys the last part counts as much as the whole."""
    pairs = (word, candidate), (word.rpartition(".")[2], candidate.rpartition(".")[2])
    return sum(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)
