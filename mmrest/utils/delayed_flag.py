"""Flags that the processes of a training share without waiting for each other."""

from typing import Callable, Optional

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size
from torch import Tensor


class DelayedFlag:
    """Flags that are sent in one iteration and read in the next.

    By then the device has computed them, so that reading blocks neither the process nor
    the device. A flag that one process sets is set on all.
    """

    def __init__(self) -> None:
        self._flags: Optional[Tensor] = None
        self._wait: Optional[Callable[[], object]] = None

    def send(self, flags: Tensor) -> None:
        """Send flags; all processes must call it equally often.

        Args:
            flags (Tensor): Floating point, of shape (N,); above 0 means set. With
                several processes it is changed in place.
        """
        work = None
        if get_world_size() > 1:
            work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)
        if not flags.is_cuda:
            self._flags, self._wait = flags, work and work.wait
            return
        if work is not None:
            work.wait()  # makes the stream wait, not this process
        self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._wait = copied.synchronize

    def receive(self) -> list[bool]:
        """Read the flags that were sent last.

        Returns:
            list[bool]: The flags; empty if none were sent since the last call.
        """
        if self._flags is None:
            return []
        if self._wait is not None:
            self._wait()
        flags, self._flags, self._wait = self._flags.tolist(), None, None
        return [flag > 0 for flag in flags]
