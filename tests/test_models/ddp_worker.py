"""Run by torchrun: ResT under DistributedDataParallel, two steps a case."""

import itertools

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmrest import ResT

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)


def run_case(frozen_stages: int, out_indices: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = ResT(ARCH, frozen_stages=frozen_stages, out_indices=out_indices)
    model.init_weights()
    ddp = DistributedDataParallel(model, find_unused_parameters=False)
    for step in range(2):  # an unused parameter is an error in the second step
        model.zero_grad()
        torch.manual_seed(10 * step + dist.get_rank())
        sum(out.square().mean() for out in ddp(torch.rand(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            total = parameter.grad.clone()
            dist.all_reduce(total)
            mean = total / dist.get_world_size()
            assert torch.allclose(parameter.grad, mean, atol=1e-6), name


if __name__ == '__main__':
    dist.init_process_group('gloo')
    cases = [*itertools.product(range(-1, 5), [(0, 1, 2, 3), (1, 2, 3), (1,)])]
    for case in cases:
        run_case(*case)
    if dist.get_rank() == 0:
        print(f'{len(cases)} cases passed')
    dist.destroy_process_group()
