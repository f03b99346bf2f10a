"""The command ``python -m mmrest.doctor``."""

import argparse
import dataclasses
import json
import sys
import textwrap

from .checks import OPTIONAL, REQUIRED, diagnose, stack_name
from .probe import probe


def main(argv=None) -> int:
    """Prints the facts and the findings.

    Returns:
        0 if everything that is installed fits, 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmrest.doctor',
        description='Prints what is installed, what fits, and how to mend the rest.',
    )
    parser.add_argument('--json', action='store_true', help='print JSON instead')
    parser.add_argument(
        '--require',
        nargs='+',
        default=[],
        choices=OPTIONAL,
        metavar='MODULE',
        help=f'optional modules that must be there: {", ".join(OPTIONAL)}',
    )
    args = parser.parse_args(argv)

    facts = probe()
    findings = diagnose(facts, require=(*REQUIRED, *args.require))
    errors = [finding for finding in findings if finding.level == 'error']
    if args.json:
        report = {
            'fits': not errors,
            'facts': facts,
            'findings': [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        print(render(facts, findings))
    return 1 if errors else 0


def render(facts: dict, findings: list) -> str:
    """Returns the report as text."""
    lines = [
        f'mmrest doctor: Python {facts["python"]} ({facts["executable"]}), '
        f'{facts["platform"]}',
        f'  {"stack":<13} {stack_name(facts["distributions"])}',
    ]
    for name, fact in facts['modules'].items():
        if fact['found'] and fact['error'] is None:
            state = '; '.join([fact['version'] or 'found', *fact['notes']])
        elif fact['found']:
            state = f'{fact["version"] or "found"}; BROKEN: {fact["error"]}'
        else:
            state = 'not installed'
        lines.append(f'  {name:<13} {state}')
    for finding in findings:
        lines.append('')
        lines.append(f'{finding.level}: {finding.what}')
        if finding.found:
            lines.append(_labelled('found', finding.found))
        lines.append(_labelled('fix', finding.fix))
    errors = sum(finding.level == 'error' for finding in findings)
    lines.append('')
    if errors:
        lines.append(f'{errors} problem{"s" if errors > 1 else ""} to mend')
    else:
        lines.append('Everything that is installed fits together.')
    return '\n'.join(lines)


def _labelled(label: str, text: str) -> str:
    head = f'  {label}: '.ljust(10)
    return textwrap.fill(
        text,
        width=100,
        initial_indent=head,
        subsequent_indent=' ' * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == '__main__':
    sys.exit(main())
