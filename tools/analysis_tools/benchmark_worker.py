"""Measure time and memory of a subject in its own process."""

import ctypes
import gc
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch
from benchmark_subjects import Shape, Subject, build_model

GIB = 2**30
# Of a step that loads libraries and starts threads before memory is measured
SMALL_SHAPE = (64, 96)


@dataclass(frozen=True)
class Settings:
    """Settings of all subjects of a run.

    Attributes:
        batch (int): Images per step.
        train (bool): Whether a step is forward and backward, in training mode.
        device (str): Device of model and images.
        threads (int, optional): Threads of PyTorch. Default: None, PyTorch's choice.
        warmup (int): Steps between the first one and the measured ones.
        memory_limit (float, optional): GiB that the process (on a CPU) or
            PyTorch's allocator (elsewhere) may use.
    """

    batch: int = 1
    train: bool = False
    device: str = 'cpu'
    threads: Optional[int] = None
    warmup: int = 1
    memory_limit: Optional[float] = None


class SubjectFailed(Exception):
    """A subject cannot be measured; the message is the reason."""


class Worker:
    """The parent's interface to the process of a subject.

    Raises:
        SubjectFailed: From all methods, if the process reports an error or dies.
    """

    def __init__(self, subject: Subject, shape: Shape, settings: Settings) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, other_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other_end, subject, shape, settings), daemon=True
        )
        self.process.start()
        # so that recv() ends if the process dies
        other_end.close()

    def peak_memory(self) -> Optional[int]:
        """Run the first step, and return the bytes it needs at its peak."""
        self._send('begin')
        return self._receive()

    def time_step(self) -> float:
        """Run another step, and return its seconds."""
        self._send('step')
        return self._receive()

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _send(self, word: str) -> None:
        # a process that has died is noticed by _receive()
        with suppress(ConnectionError):
            self.connection.send(word)

    def _receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise SubjectFailed(_death(self.process.exitcode)) from None
        if kind == 'failed':
            raise SubjectFailed(value)
        return value


def _death(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return 'killed, probably out of memory'
    if exitcode < 0:
        return f'died of {signal.Signals(-exitcode).name}'
    return f'ended with exit status {exitcode}'


def _serve(
    connection: Connection, subject: Subject, shape: Shape, settings: Settings
) -> None:
    warnings.simplefilter('ignore')
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = torch.device(settings.device)
        step = _make_step(subject, settings, device)
        # all processes import and build at the same time, and then wait for their turn
        connection.recv()
        # memory of the image is not measured
        image = torch.randn(settings.batch, 3, *shape, device=device)
        small = torch.randn(settings.batch, 3, *SMALL_SHAPE, device=device)
        # compile for the shape before memory is measured
        step(image if subject.compile else small)
        _limit_memory(settings)
        connection.send(('memory', _peak_memory(lambda: step(image), device)))
        for _ in range(settings.warmup):
            step(image)
        while connection.recv() == 'step':
            connection.send(('time', step(image)))
    except EOFError:  # the parent has ended
        return
    except Exception as error:
        connection.send(('failed', _reason(error)))


def _reason(error: Exception) -> str:
    text = str(error)
    signs = ("can't allocate memory", 'out of memory', 'bad_alloc', 'bad alloc')
    if isinstance(error, MemoryError) or any(s in text.lower() for s in signs):
        return 'out of memory'
    line = next(iter(text.strip().splitlines()), '')
    return f'{type(error).__name__}: {line}'


def _make_step(
    subject: Subject, settings: Settings, device: torch.device
) -> Callable[[torch.Tensor], float]:
    """Return a function that runs a step on images and returns its seconds."""
    run = _product(subject, device) if subject.matmul else None
    run = run or _backbone(subject, settings, device)

    def step(image: torch.Tensor) -> float:
        start = time.perf_counter()
        run(image)
        return time.perf_counter() - start

    def step_on_cuda(image: torch.Tensor) -> float:
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # of the device, which need not be the current one
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        run(image)
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return step_on_cuda if device.type == 'cuda' else step


def _product(subject: Subject, device: torch.device) -> Callable:
    dtype = getattr(torch, subject.dtype)
    a, b = (torch.randn(subject.matmul, subject.matmul, device=device) for _ in 'ab')
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def _backbone(subject: Subject, settings: Settings, device: torch.device) -> Callable:
    model = build_model(subject).to(device)
    model.train(settings.train)  # some of MMDetection's return None here
    call = torch.compile(model, dynamic=False) if subject.compile else model
    grads = {}

    def autocast() -> Any:
        if subject.dtype == 'float32':
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, subject.dtype))

    def forward(image: torch.Tensor) -> None:
        with torch.no_grad(), autocast():
            call(image)

    def forward_backward(image: torch.Tensor) -> None:
        with autocast():
            outs = call(image)
        if image.shape not in grads:
            # random, since the sum has a gradient of 0 before a LayerNorm
            grads[image.shape] = [torch.randn_like(out) for out in outs]
        torch.autograd.backward(outs, grads[image.shape])
        model.zero_grad(set_to_none=True)

    return forward_backward if settings.train else forward


def _peak_memory(run: Callable, device: torch.device) -> Optional[int]:
    """Return the bytes that ``run`` needs at its peak, or None if unknown."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if _status('VmRSS') is None:
        run()
        return None
    _trim_heap()
    before = _status('VmRSS')
    # 5 resets the peak (VmHWM)
    Path('/proc/self/clear_refs').write_text('5')
    run()
    return max(0, _status('VmHWM') - before)


def _status(field: str) -> Optional[int]:
    """A field of Linux's /proc/self/status, in bytes."""
    status = Path('/proc/self/status')
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f'{field}:'))
    return int(line.split()[1]) * 1024


def _trim_heap() -> None:
    """Return free memory to the system, if the C library (glibc) can."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def _limit_memory(settings: Settings) -> None:
    """Let allocations beyond the limit fail."""
    limit = settings.memory_limit
    device = torch.device(settings.device)
    if device.type == 'cuda':
        if limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, limit * GIB / total)
            torch.cuda.set_per_process_memory_fraction(share, device)
        return
    resident = _status('VmRSS')
    if resident is None:
        return
    import resource

    free = _available()
    if limit is not None:
        free = min(free, int(limit * GIB) - resident)
    # the address space includes libraries, so the limit is on further allocations
    soft = _status('VmSize') + max(0, free)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _available() -> int:
    """Bytes of memory that the machine has free."""
    lines = Path('/proc/meminfo').read_text().splitlines()
    line = next(line for line in lines if line.startswith('MemAvailable:'))
    return int(line.split()[1]) * 1024
