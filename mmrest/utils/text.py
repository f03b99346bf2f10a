"""How lists appear in messages."""

from collections.abc import Iterable


def shorten(items: Iterable, limit: int = 8) -> str:
    """Join the first items of a list and count the rest.

    Args:
        items (Iterable): The items; each is written as ``str`` gives it.
        limit (int): How many are written out. Default: 8.

    Returns:
        str: For example ``'a, b, c and 5 more'``.
    """
    items = [str(item) for item in items]
    text = ', '.join(items[:limit])
    rest = len(items) - limit
    return f'{text} and {rest} more' if rest > 0 else text
