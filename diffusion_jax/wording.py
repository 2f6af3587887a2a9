"""Numbers and lists in messages, worded so that they read well for one thing and for many."""

from collections.abc import Sequence


def counted(number: int, one: str, many: str) -> str:
    """Write a number and the words that go with it, for one thing or for any other number.

    >>> counted(1, "is missing", "are missing"), counted(1200, "image", "images")
    ('1 is missing', '1,200 images')
    """
    return f"{number:,} {one if number == 1 else many}"


def few_of(names: Sequence[str], shown: int = 10) -> str:
    """Write the first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
