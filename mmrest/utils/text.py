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
    """Split a file at a section that is generated.

    The section is between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, which
    stay with what comes before and after it.

    Raises:
        ValueError: If the file does not have both marks once.
    """
    begin, end = f'<!-- {name}:begin -->\n', f'<!-- {name}:end -->'
    text = Path(file).read_text(encoding='utf-8')
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f'{file} needs {begin.rstrip()} and {end} once')
    head, rest = text.split(begin)
    return head + begin, end + rest.split(end)[1]


def replace_section(file: Union[str, Path], name: str, content: str) -> None:
    """Rewrite a file with another content of a section, as above."""
    head, tail = split_at_section(file, name)
    Path(file).write_text(f'{head}{content}\n{tail}', encoding='utf-8')


def parse_size(text: str) -> tuple[int, int]:
    """Read height and width in pixels from ``HxW``, an option of a command line.

    Raises:
        ArgumentTypeError: If they are none.
    """
    height, cross, width = text.partition('x')
    numbers = cross and height.isdecimal() and width.isdecimal()
    if not numbers or not int(height) or not int(width):
        raise argparse.ArgumentTypeError(
            f'a size is HxW, as 800x1333, both above 0; found {text!r}'
        )
    return int(height), int(width)
