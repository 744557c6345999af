"""Choosing some of a list of names on the command line: by name in any usual spelling, or by number."""

import difflib
import unicodedata
from collections.abc import Callable, Sequence

SHOWN = 12  # names in a message


def chosen(text: str, names: Sequence[str]) -> list[int]:
    """The numbers of the names that `text` has, separated by commas, each as a name or as a number from 0.

    A name may have commas of its own. It is known with or without its leading and trailing spaces, with accents as
    one character or as two, and in any case unless two names differ by just these. `name:` or `index:` before it says
    which of the two is meant. Raises ValueError for what is no name or could mean two.
    """
    pieces, numbers = text.split(","), []
    while pieces:
        for length in range(len(pieces), 0, -1):  # the longest first
            word = ",".join(pieces[:length])
            meanings = _meanings(word, names)
            if meanings:
                break
        else:
            raise ValueError(_unknown(pieces[0].strip(), names))
        if length > 1 and all(_meanings(piece, names) for piece in pieces[:length]):
            each = " or ".join(f"index:{number}" for number in sorted(meanings))
            raise ValueError(f"{word!r} is one name and {length} names; say {each}, or name: before each of several")
        if len(meanings) > 1:
            raise ValueError(_ambiguous(word, meanings, names))
        numbers += meanings
        del pieces[:length]
    return numbers


def _meanings(word: str, names: Sequence[str]) -> set[int]:
    """The numbers that a word may mean."""
    by_name = _named(word, names)
    if by_name:  # even if a name begins with "index:"
        return by_name | _indexed(word, names)
    kind, colon, rest = word.strip().partition(":")
    if colon and kind in ("name", "index"):
        return (_named if kind == "name" else _indexed)(rest, names)
    return _indexed(word, names)


def _indexed(word: str, names: Sequence[str]) -> set[int]:
    return {number for number in range(len(names)) if str(number) == word.strip()}


def _named(word: str, names: Sequence[str]) -> set[int]:
    """The numbers of the names that equal the word in the strictest spelling in which any does."""
    spellings: list[Callable[[str], str]] = [
        str,
        lambda text: unicodedata.normalize("NFC", text),
        lambda text: unicodedata.normalize("NFC", text).strip(),
        lambda text: unicodedata.normalize("NFC", text).strip().casefold(),
    ]
    for spelling in spellings:
        found = {number for number, name in enumerate(names) if spelling(name) == spelling(word)}
        if found:
            return found
    return set()


def _ambiguous(word: str, meanings: set[int], names: Sequence[str]) -> str:
    numbers = _indexed(word, names)
    named = [f"the name {names[number]!r} (say {_sure(number, names)})" for number in sorted(meanings - numbers)]
    numbered = [f"the number of {names[number]!r} (say index:{number})" for number in sorted(numbers)]
    return f"{word.strip()!r} may be {' or '.join(named + numbered)}"


def _sure(number: int, names: Sequence[str]) -> str:
    """A word that means this name and no other."""
    word = f"name:{names[number]}"
    plain = word == word.strip() and "," not in word
    return word if plain and _meanings(word, names) == {number} else f"index:{number}"


def _unknown(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, 1)
    meant = f", but {near[0]!r}" if near else ""
    shown = [repr(name) if "," in name or name != name.strip() else name for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"no class {word!r}{meant}; the model has {', '.join(shown)}{more}"
