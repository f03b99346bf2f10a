"""One start of a distributed run, watched through its output, for soak.py."""

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Optional

SECONDS_TO_START = 300  # to the first iteration, on a machine that is busy
EARLY = 10  # iterations after which memory is measured first


class SoakError(RuntimeError):
    """A run ended or hung by itself."""


class Session:
    """The processes of ``tools/train.py --resume`` with gloo, without a launcher.

    A launcher would be one more process that could end the others.

    Args:
        train (Path): ``tools/train.py``.
        config (Path): A config with ``logger.interval=1``.
        work_dir (Path): Where it saves.
        processes (int): How many.
        iterations (int): Of the whole run.
    """

    def __init__(
        self, train: Path, config: Path, work_dir: Path, processes: int, iterations: int
    ) -> None:
        self.iteration = self.count = self.saves = self.saving = 0
        self._iterations, self._peaks = iterations, {}
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = self._is_saving = False
        command = [sys.executable, train, config, '--work-dir', work_dir, '--resume']
        command += ['--no-preflight', '--launcher', 'pytorch']
        port = _free_port()
        self._processes = [
            subprocess.Popen(
                [str(part) for part in command],
                env=_environment(rank, processes, port),
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_and_kill(self, rng: random.Random) -> bool:
        """Kill all processes at a random moment; True if the run ends before."""
        self._wait(lambda: self.count > 0)
        time.sleep(rng.uniform(0, 12))
        if rng.random() < 0.5:
            self._is_saving = False
            self._wait(lambda: self._is_saving)
            time.sleep(rng.uniform(0, 0.25))
        return self._ended and self._succeeded()

    def finish(self) -> None:
        """Wait until the run is finished."""
        while not self._ended:
            self._wait(lambda before=self.count: self.count > before)
        self._succeeded()

    def end(self) -> None:
        """Kill what is left of it."""
        self._measure()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._reader.join(60)

    def peak(self) -> Optional[int]:
        """Megabytes that the largest process has had, at the end."""
        return max(self._peaks.values(), default=None)

    def early_peak(self) -> Optional[int]:
        """The same after a few iterations."""
        return self._peaks.get(EARLY)

    def _read(self) -> None:
        for line in self._processes[0].stdout:
            found = re.search(r'Iter\(train\) *\[ *(\d+)/', line)
            with self._news:
                self._lines.append(line)
                if found:
                    self.iteration, self.count = int(found[1]), self.count + 1
                resumed = re.search(r'resumed epoch: \d+, iter: (\d+)', line)
                if resumed:
                    self.iteration = int(resumed[1])
                saving = re.search(r'Saving checkpoint at (\d+) iter', line)
                if saving:
                    self.saving = int(saving[1])
                    self.saves, self._is_saving = self.saves + 1, True
                self._news.notify_all()
            if found and self.count % EARLY == 0:
                self._measure()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _wait(self, happened) -> None:
        with self._news:
            in_time = self._news.wait_for(
                lambda: self._ended or happened(), SECONDS_TO_START
            )
        if not in_time:
            raise SoakError(f'nothing happened any more. {self._end_of_output()}')

    def _succeeded(self) -> bool:
        statuses = [process.wait(SECONDS_TO_START) for process in self._processes]
        if any(statuses) or self.iteration < self._iterations:
            raise SoakError(
                f'a run ended by itself, status {statuses}, after iteration '
                f'{self.iteration}. {self._end_of_output()}'
            )
        return True

    def _end_of_output(self) -> str:
        return 'The end of its output:\n' + ''.join(self._lines[-30:])

    def _measure(self) -> None:
        """Remember the peak resident size; only known on Linux."""
        sizes = []
        for process in self._processes:
            try:
                status = Path(f'/proc/{process.pid}/status').read_text()
            except OSError:
                continue
            found = re.search(r'VmHWM:\s*(\d+) kB', status)
            sizes += [int(found[1]) // 1024] if found else []
        if sizes:
            self._peaks[self.count] = max(sizes)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def _environment(rank: int, processes: int, port: str) -> dict[str, str]:
    return dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=port,
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
        PYTHONPATH=os.pathsep.join(
            [
                str(Path(__file__).resolve().parents[2]),
                os.environ.get('PYTHONPATH', ''),
            ]
        ),
    )
