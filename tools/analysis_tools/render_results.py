"""Print the table of results in Markdown, or update a file.

In a file, the part between <!-- results:begin --> and <!-- results:end --> is
replaced.
"""

import argparse
import sys

from mmrest.utils.results import render_table
from mmrest.utils.text import replace_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', nargs='?', help='Markdown file to update')
    args = parser.parse_args()
    if args.file is None:
        print(render_table())
        return
    try:
        replace_section(args.file, 'results', render_table())
    except ValueError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
