"""The error that every function of this package raises."""

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit.

    The message says what is wrong, what was found and what to do.
    """


class RefusedError(CheckpointError):
    """A checkpoint holds an object that safe loading refuses.

    Args:
        message (str): What is wrong and what to do.
        name (str): The object, as ``'os.system'``.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def shorten(items: Iterable[str], limit: int = 8) -> str:
    """Join the first items of a list and count the rest.

    Args:
        items (Iterable[str]): The items.
        limit (int): How many are written out. Default: 8.

    Returns:
        str: For example ``'a, b, c and 5 more'``.
    """
    items = list(items)
    text = ', '.join(items[:limit])
    rest = len(items) - limit
    return f'{text} and {rest} more' if rest > 0 else text
