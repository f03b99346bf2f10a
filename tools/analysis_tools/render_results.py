"""Print the table of results in Markdown, or put it into a file.

With a file, what stands between <!-- results:begin --> and <!-- results:end -->
is replaced.
"""

import argparse
import sys
from pathlib import Path

from mmrest.utils.results import render_table

BEGIN, END = '<!-- results:begin -->', '<!-- results:end -->'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', nargs='?', type=Path, help='Markdown file to update')
    args = parser.parse_args()
    if args.file is None:
        print(render_table())
        return 0
    text = args.file.read_text(encoding='utf-8')
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f'error: {args.file} needs {BEGIN} and {END} once', file=sys.stderr)
        return 1
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    table = f'{BEGIN}\n{render_table()}\n{END}'
    args.file.write_text(f'{head}{table}{tail}', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
