"""Lists in messages, sizes in options, and generated sections of Markdown files."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Union


def shorten(items: Iterable, limit: int = 8) -> str:
    """Join the first items of a list and count the rest: ``'a, b, c and 5 more'``."""
    items = [str(item) for item in items]
    text = ', '.join(items[:limit])
    rest = len(items) - limit
    return f'{text} and {rest} more' if rest > 0 else text


def split_at_section(file: Union[str, Path], name: str) -> tuple[str, str]:
    """Split a file at a generated section, and leave out its content.

    The section is between the lines ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``,
    which are kept.

    Raises:
        ValueError: If the file does not contain both lines once.
    """
    begin, end = f'<!-- {name}:begin -->\n', f'<!-- {name}:end -->'
    text = Path(file).read_text(encoding='utf-8')
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f'{file} needs {begin.rstrip()} and {end} once')
    head, rest = text.split(begin)
    return head + begin, end + rest.split(end)[1]


def replace_section(file: Union[str, Path], name: str, content: str) -> None:
    """Replace the content of a generated section of a file."""
    head, tail = split_at_section(file, name)
    Path(file).write_text(f'{head}{content}\n{tail}', encoding='utf-8')


def parse_count(text: str) -> int:
    """Parse a number of 1 or more, for an option.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer above 0, found {text!r}')
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    """Parse a height and width in pixels, ``HxW``, for an option.

    Raises:
        ArgumentTypeError: If the text has another form.
    """
    height, cross, width = text.partition('x')
    numbers = cross and height.isdecimal() and width.isdecimal()
    if not numbers or not int(height) or not int(width):
        raise argparse.ArgumentTypeError(
            f'a size is HxW, as 800x1333, both above 0; found {text!r}'
        )
    return int(height), int(width)
