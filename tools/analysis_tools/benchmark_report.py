"""Measurements, the ratios between them, and their output as text and JSON."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Optional

import torch
from benchmark_subjects import Shape, Subject

MIB = 2**20


@dataclass
class Row:
    """The measurement of a subject at a shape.

    Attributes:
        subject (Subject): The subject.
        shape (tuple[int, int]): Height and width of the images.
        batch (int): Images per step.
        train (bool): Whether a step is forward and backward.
        memory (int, optional): Bytes that the first step needs, without the model.
        seconds (list[float]): Of each measured step.
        failure (str, optional): Why there is no result.
    """

    subject: Subject
    shape: Shape
    batch: int
    train: bool
    memory: Optional[int] = None
    seconds: list[float] = field(default_factory=list)
    failure: Optional[str] = None

    @property
    def time(self) -> float:
        """Median of the seconds per image (for a product, per product)."""
        return median(self.seconds) / (1 if self.subject.matmul else self.batch)

    @property
    def rate(self) -> Optional[float]:
        """FLOP/s of the forward pass, two per multiply-accumulate."""
        macs = self.subject.macs(self.shape)
        return None if self.train or macs is None else 2 * macs / self.time


def machine() -> dict[str, Any]:
    """Describe the processor, cores, PyTorch, and whether there is AMX."""
    cpuinfo = Path('/proc/cpuinfo')
    text = cpuinfo.read_text() if cpuinfo.exists() else ''
    names = [
        line.split(':')[1].strip()
        for line in text.splitlines()
        if line.startswith('model name')
    ]
    usable = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count() or 1))
    return dict(
        cpu=names[0] if names else platform.processor() or platform.machine(),
        cores=len(usable(0)),
        threads=torch.get_num_threads(),
        amx='amx_tile' in text,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch=torch.__version__,
        python=platform.python_version(),
    )


def to_json(rows: list[Row]) -> dict[str, Any]:
    """Return rows and ratios for JSON."""
    content = []
    for row in rows:
        entry = dict(name=row.subject.name, dtype=row.subject.dtype)
        entry.update(asdict(row), macs=row.subject.macs(row.shape))
        if row.seconds:
            entry.update(time=row.time, rate=row.rate)
        content.append(entry)
    return dict(rows=content, ratios=ratios(rows))


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """Return all comparisons within a shape.

    ``faster`` is the speed of ``name`` as a multiple of that of ``than``; ``memory`` is
    its memory as a share of that of ``than``.
    """
    done = [row for row in rows if row.seconds]
    return [
        dict(
            name=row.subject.name,
            dtype=row.subject.dtype,
            than=other.subject.name,
            than_dtype=other.subject.dtype,
            shape=row.shape,
            faster=other.time / row.time,
            memory=row.memory / other.memory if row.memory and other.memory else None,
        )
        for row in done
        for other in done
        if row.shape == other.shape and _comparable(row.subject, other.subject)
    ]


def _comparable(subject: Subject, other: Subject) -> bool:
    if not subject.arch or subject.attn_impl == 'dense' or other.matmul:
        return False
    if subject.dtype != other.dtype:
        return subject.name == other.name and other.dtype == 'float32'
    if other.peer:
        return not (subject.with_cp or subject.compile)
    faster = {'triton': ('dense', 'tiled'), 'amx': ('dense', 'auto')}
    slower = faster.get(subject.attn_impl, ('dense',))
    return subject.arch == other.arch and other.attn_impl in slower


def growths(rows: list[Row]) -> Iterator[str]:
    """Describe how the time of a subject grows from each shape to the next."""
    previous = {}
    for row in (row for row in rows if row.seconds and not row.subject.matmul):
        first = previous.get(row.subject)
        previous[row.subject] = row
        if first is None:
            continue
        areas = [r.shape[0] * r.shape[1] for r in (first, row)]
        macs = [r.subject.macs(r.shape) for r in (first, row)]
        counted = f', MACs x{macs[1] / macs[0]:.2f}' if macs[0] else ''
        yield (
            f'{row.subject.name}, {row.subject.dtype}, {_size(first.shape)} to '
            f'{_size(row.shape)}: time x{row.time / first.time:.2f}, '
            f'area x{areas[1] / areas[0]:.2f}{counted}'
        )


def table(rows: list[Row]) -> str:
    """Return an aligned line for each row."""
    header = ['', 'dtype', 'ms/image', '(min - max)', 'MiB', 'GFLOP/s', 'of product']
    products = {
        (row.subject.dtype, row.shape): row.rate
        for row in rows
        if row.subject.matmul and row.seconds
    }
    lines = [header]
    for row in rows:
        line = [row.subject.name, row.subject.dtype]
        if not row.seconds:
            lines.append([*line, row.failure])
            continue
        scale = row.time / median(row.seconds) * 1e3
        line += [
            f'{row.time * 1e3:.1f}',
            f'({min(row.seconds) * scale:.1f} - {max(row.seconds) * scale:.1f})',
            '-' if row.memory is None else f'{row.memory / MIB:.0f}',
            '-' if row.rate is None else f'{row.rate / 1e9:.0f}',
        ]
        best = products.get((row.subject.dtype, row.shape))
        line.append(f'{row.rate / best:.0%}' if row.rate and best else '-')
        lines.append(line)
    whole = [line for line in lines if len(line) == len(header)]
    widths = [max(map(len, column)) for column in zip(*whole)]
    widths[0] = max(len(line[0]) for line in lines)
    return '\n'.join(_aligned(line, widths) for line in lines)


def _aligned(line: list[str], widths: list[int]) -> str:
    cells = [
        text.ljust(width) if column < 2 else text.rjust(width)
        for column, (text, width) in enumerate(zip(line, widths))
    ]
    return '  '.join(cells).rstrip()


def ratio_lines(rows: list[Row]) -> Iterator[str]:
    """Return the ratios as sentences."""
    for ratio in ratios(rows):
        memory = ratio['memory']
        if ratio['dtype'] != ratio['than_dtype']:
            than = ratio['than_dtype']
        else:
            than = ratio['than']
        share = '' if memory is None else f', {memory:.2f} of the memory'
        yield (
            f'{ratio["name"]} ({ratio["dtype"]}) against {than}: '
            f'{ratio["faster"]:.2f}x the speed{share}'
        )


def heading(shape: Shape, batch: int, train: bool) -> str:
    """Return the heading of a table."""
    work = 'forward + backward' if train else 'forward'
    return f'{work}, {_size(shape)}, batch {batch}'


def _size(shape: Shape) -> str:
    return f'{shape[0]}x{shape[1]}'
