"""A question that all processes of a training answer alike."""

from collections.abc import Callable
from typing import Optional

import torch
import torch.distributed as dist
from mmengine.dist import get_comm_device, get_world_size
from torch import Tensor


class Agreement:
    """Whether any process says yes, known to all at the same call.

    With several processes an answer comes one call late: a call sends this
    process's answer on its way and returns what came of the last one. A GPU is thus
    waited for up to where it was one iteration ago, and goes on working.
    """

    def __init__(self) -> None:
        self._answer: Optional[Tensor] = None
        self._wait: Optional[Callable] = None

    def ask(self, yes: bool) -> bool:
        """Ask once more; every process must do so equally often.

        Args:
            yes (bool): The answer of this process.

        Returns:
            bool: If there is one process, ``yes``. Otherwise whether any said yes
            at the call before; at the first call False.
        """
        if get_world_size() == 1:
            return yes
        agreed = self.collect()
        device = get_comm_device()
        # filled on the device, for a copy to it would wait
        answer = torch.full((1,), float(yes), device=device)
        work = dist.all_reduce(answer, op=dist.ReduceOp.MAX, async_op=True)
        if device.type == 'cuda':
            work.wait()  # the stream does, not this process
            self._answer = torch.empty(1, pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._wait = copied.synchronize
        else:
            self._answer, self._wait = answer, work.wait
        return agreed

    def collect(self) -> bool:
        """What came of the last call, if that is not known yet.

        Returns:
            bool: Whether any process said yes; False if there is nothing to know.
        """
        if self._answer is None:
            return False
        self._wait()
        agreed = bool(self._answer.item())
        self._answer = self._wait = None
        return agreed
