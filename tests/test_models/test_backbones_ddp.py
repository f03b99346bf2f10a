"""Backbones in several processes: no parameter unused, the gradients of one process.

The processes are forked, so that this file must come before those that compile.
"""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from rest_variants import OTHERS, TINY, VARIANTS
from torch.nn.parallel import DistributedDataParallel
from toy_runs import exit_codes, in_processes

from mmrest import ResT, ResTV2

BATCH = 4
# BatchNorm sees the images of its own process alone, and SyncBatchNorm needs GPUs: so
# statistics that stay as they are, or norms of each image
NORMS = (dict(norm_eval=True), dict(norm_cfg=dict(type='GN', num_groups=2)))


def build(kind: type, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(TINY, **kwargs)
    model.init_weights()
    for name, buffer in model.named_buffers():
        if name.endswith(('running_mean', 'running_var')):
            buffer.uniform_(0.5, 1.5)
    return model.train()


def loss(outs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return sum((out * out.sin()).mean() for out in outs)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_unused(
    kind: type,
    frozen_stages: int,
    out_indices: tuple[int, ...],
    variant: str = 'published',
) -> None:
    options = dict(frozen_stages=frozen_stages, out_indices=out_indices)
    model = build(kind, **options, **VARIANTS[variant])
    ddp = DistributedDataParallel(model, find_unused_parameters=False)
    for step in range(2):  # an unused parameter is an error in the second step
        model.zero_grad()
        torch.manual_seed(10 * step + dist.get_rank())
        loss(ddp(torch.rand(2, 3, 64, 64))).backward()
    for name, grad in gradients(model).items():
        total = grad.clone()
        dist.all_reduce(total)
        mean = total / dist.get_world_size()
        assert torch.allclose(grad, mean, atol=1e-6), name


def check_equal(kind: type, frozen_stages: int, with_cp: bool, norm: dict) -> None:
    share = BATCH // dist.get_world_size()
    first = share * dist.get_rank()
    # in float64: what float32 rounds differently depends on the processor
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, 72, 104, generator=generator, dtype=torch.float64)
    kwargs = dict(frozen_stages=frozen_stages, **norm)

    alone = build(kind, **kwargs).double()
    loss(alone(images)).backward()
    model = build(kind, with_cp=with_cp, **kwargs).double()
    ddp = DistributedDataParallel(model, find_unused_parameters=False)
    loss(ddp(images[first : first + share])).backward()

    expected, found = gradients(alone), gradients(model)
    assert expected.keys() == found.keys() and expected
    for name, grad in found.items():
        size = expected[name].abs().max()
        error = (grad - expected[name]).abs().max()
        assert error <= 1e-10 * size + 1e-14, f'{name}: {error} of {size}'


ALL_OUTPUTS = (0, 1, 2, 3)
CASES = dict(
    unused=(check_unused, ([ResT], range(-1, 5), [ALL_OUTPUTS, (1, 2, 3), (1,)])),
    unused_v2=(check_unused, ([ResTV2], (-1, 0, 2, 4), [ALL_OUTPUTS, (1,)])),
    variants=(check_unused, ([ResT], (-1, 2), [ALL_OUTPUTS], OTHERS)),
    equal=(check_equal, ([ResT], range(-1, 5), (False, True), NORMS)),
    equal_v2=(check_equal, ([ResTV2], (-1, 2), (False, True), NORMS)),
)


@pytest.mark.parametrize(
    'group, processes',
    [
        ('unused', 2),
        ('variants', 2),
        ('equal', 1),
        ('equal', 2),
        pytest.param('equal', 4, marks=pytest.mark.slow),
        ('unused_v2', 2),
        ('equal_v2', 2),
    ],
)
def test_in_processes(group, processes, tmp_path):
    """``unused``: every parameter takes part in every step.

    ``equal``: the processes, each with its share of the batch, get the gradients that
    one process gets from all of it; for every ``frozen_stages``, with and without
    ``with_cp``, frozen BN and GN.
    """
    check, options = CASES[group]

    def check_all(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for case in itertools.product(*options):
                check(*case)
        # a gradient in another layout than its parameter costs a copy in every step
        assert not [w for w in caught if 'strides do not match' in str(w.message)]

    found = exit_codes(in_processes(check_all, tmp_path, count=processes))
    assert found == [0] * processes
