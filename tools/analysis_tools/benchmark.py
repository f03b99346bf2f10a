"""Measure time and memory of ResT, its dense form, and other backbones.

Each model runs in its own process. Only one of them is measured at a time, and their
steps alternate, so that changes of the machine's speed affect all of them.
docs/benchmark.md describes the method.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_report import (
    Row,
    growths,
    heading,
    machine,
    ratio_lines,
    table,
    to_json,
)
from benchmark_subjects import Shape, Subject, list_subjects
from benchmark_worker import Settings, SubjectFailed, Worker

from mmrest.models import rest, restv2
from mmrest.utils.text import parse_count, parse_size

ARCHS = (*rest.ARCHS, *(f'v2-{arch}' for arch in restv2.ARCHS))
DTYPES = ('float32', 'bfloat16', 'float16')
SWEEP = ('320x320', '480x640', '640x1024', '800x1344', '1120x1792', '1600x2560')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--arch', nargs='+', choices=ARCHS, default=['small', 'base'])
    add('--shape', nargs=2, type=parse_count, metavar=('H', 'W'), help='[800 1344]')
    add('--batch', type=parse_count, default=1, metavar='N', help='images a step [1]')
    add('--dtype', nargs='+', choices=DTYPES, default=['float32'])
    add('--train', action='store_true', help='forward and backward')
    add('--with-cp', action='store_true', help='also with_cp=True; with --train')
    add('--compile', action='store_true', help='also through torch.compile')
    add('--peers', action='store_true', help="also MMDetection's backbones")
    add('--repeats', type=parse_count, default=5, metavar='N', help='steps [5]')
    add('--warmup', type=parse_count, default=1, metavar='N', help='more steps [1]')
    add('--threads', type=parse_count, metavar='N', help="[PyTorch's choice]")
    add('--device', default=default, help=f'[{default}]')
    add('--memory-limit', type=float, metavar='GIB', help='of a process [what is free]')
    add('--matmul', type=int, default=4096, metavar='N', help='side; 0: none [4096]')
    add(
        '--sweep',
        nargs='*',
        type=parse_size,
        metavar='HxW',
        help='sizes instead of --shape; a model that fails at one is not tried at '
        f'the next [{" ".join(SWEEP)}]',
    )
    add('--json', type=Path, metavar='OUT', help='write the results; a new file')
    add('--plot', type=Path, metavar='DIR', help='draw the sweep into a folder')
    args = parser.parse_args()
    if args.sweep == []:
        args.sweep = [parse_size(text) for text in SWEEP]
    if args.with_cp and not args.train:
        parser.error('--with-cp saves memory in training only: add --train')
    if args.plot and not args.sweep:
        parser.error('--plot draws a sweep: add --sweep')
    if args.shape and args.sweep:
        parser.error('--shape is one size, --sweep several: give one of them')
    if args.matmul < 0:
        parser.error(f'--matmul must not be negative, found {args.matmul}')
    if args.memory_limit is not None and not args.memory_limit > 0:
        parser.error(f'--memory-limit must be above 0, found {args.memory_limit}')
    if args.json and args.json.exists():
        parser.error(f'{args.json} exists: move it, or choose another name')
    return args


def measure(
    subjects: list[Subject], shape: Shape, settings: Settings, repeats: int
) -> list[Row]:
    """Measure the subjects at one shape, step by step in turn."""
    rows = [Row(s, shape, settings.batch, settings.train) for s in subjects]
    workers = {}

    def attempt(index: int, action: str) -> None:
        row = rows[index]
        try:
            if action == 'begin':
                row.memory = workers[index].peak_memory()
                # waits for the end of the warm-up
                workers[index].time_step()
            else:
                row.seconds.append(workers[index].time_step())
        except SubjectFailed as error:
            row.failure = str(error)
            row.seconds.clear()
            workers.pop(index).stop()

    try:
        for index, row in enumerate(rows):
            workers[index] = Worker(row.subject, shape, settings)
        for index, row in enumerate(rows):
            _progress(f'{row.subject.name}, {row.subject.dtype}')
            attempt(index, 'begin')
        for repeat in range(repeats):
            _progress(f'step {repeat + 1} of {repeats}')
            for index in list(workers):
                attempt(index, 'step')
    finally:
        for worker in workers.values():
            worker.stop()
    _progress('')
    return rows


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f'\r{text:60}', end='\r', file=sys.stderr, flush=True)


def main() -> int:
    args = parse_args()
    settings = Settings(
        args.batch, args.train, args.device, args.threads, args.warmup,
        args.memory_limit,
    )  # fmt: skip
    if args.threads:
        torch.set_num_threads(args.threads)
    subjects = list_subjects(
        args.arch, args.dtype, args.with_cp, args.compile, args.peers,
        # in training there is no rate to compare it with
        matmul=0 if args.train else args.matmul,
        device=args.device,
    )  # fmt: skip
    result = dict(
        machine=machine(), settings=dict(asdict(settings), repeats=args.repeats)
    )
    print(', '.join(f'{key} {value}' for key, value in result['machine'].items()))

    rows = []
    for shape in args.sweep or [tuple(args.shape or (800, 1344))]:
        failed = {row.subject for row in rows if row.failure}
        left = [subject for subject in subjects if subject not in failed]
        new = measure(left, shape, settings, args.repeats)
        rows += new
        print(f'\n{heading(shape, args.batch, args.train)}\n{table(new)}')
        for line in ratio_lines(new):
            print(line)
        # after each shape, since a sweep may be interrupted
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            result.update(to_json(rows))
            args.json.write_text(json.dumps(result, indent=1), encoding='utf-8')
    if args.sweep:
        print('\ngrowth', *growths(rows), sep='\n')
    if args.plot:
        from benchmark_plot import draw

        for path in draw(dict(result, **to_json(rows)), args.plot):
            print(path)
    measured = [row for row in rows if row.seconds and not row.subject.matmul]
    return 0 if measured else 1


if __name__ == '__main__':
    sys.exit(main())
