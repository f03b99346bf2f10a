"""The backbones on a CUDA device, in every mode that a training uses."""

import copy
import warnings

import pytest
import torch
from rest_variants import TINY
from torch import nn
from weights_rule import fill, image

from mmrest import ResT, ResTV2

BACKBONES = {'rest': (ResT, TINY), 'restv2': (ResTV2, TINY)}
BOTH = pytest.mark.parametrize('name', BACKBONES)


def build(name, **options):
    kind, arch = BACKBONES[name]
    model = kind(arch, **options)
    fill(model.state_dict())
    return model


def step(model, x):
    """Outputs and gradients, in float64 on the CPU."""
    model.zero_grad()
    outs = model(x)
    loss = sum(
        (out * image(out.shape, 9).to(out.device, out.dtype)).sum() for out in outs
    )
    loss.backward()
    grads = {
        name: p.grad.double().cpu().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return [out.detach().double().cpu().clone() for out in outs], grads


def assert_close(found, expected, tolerance):
    outs, grads = expected
    for one, other in zip(found[0], outs):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert found[1].keys() == grads.keys()
    for name, grad in grads.items():
        error = float((found[1][name] - grad).abs().max())
        assert error <= tolerance * largest, (name, error, largest)


@BOTH
@pytest.mark.parametrize('size', [(64, 96), (45, 83), (1, 1)])
@pytest.mark.parametrize('attn_impl', ['auto', 'dense'])
def test_float64_equals_the_cpu(name, size, attn_impl):
    model, x = build(name).double().eval(), image((2, 3, *size)).double()
    expected = step(model, x)
    other = build(name, attn_impl=attn_impl).double().cuda().eval()
    assert_close(step(other, x.cuda()), expected, 1e-9)


@BOTH
@pytest.mark.parametrize('training', [False, True])
def test_float32_equals_the_cpu(name, training):
    model, x = build(name).train(training), image((2, 3, 72, 104))
    exact = step(copy.deepcopy(model).double(), x.double())
    assert_close(step(model.cuda(), x.cuda()), exact, 2e-3)


@BOTH
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_training(name, dtype):
    """With GradScaler for float16, as MMEngine's AmpOptimWrapper does it."""
    model, x = build(name).cuda().train(), image((2, 3, 64, 96)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast('cuda', dtype):
            outs = model(x)
            loss = sum((out.float() - 1).square().mean() for out in outs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@BOTH
def test_recomputation_changes_nothing(name):
    x = image((2, 3, 64, 96)).double().cuda()
    plain = step(build(name).double().cuda().train(), x)
    recomputed = step(build(name, with_cp=True).double().cuda().train(), x)
    assert_close(recomputed, plain, 1e-9)


@BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_waits_for_nothing(name, dtype):
    model, x = build(name, drop_path_rate=0.1).cuda().train(), image((2, 3, 64, 96))
    optimizer, x = torch.optim.AdamW(model.parameters(), fused=True), x.cuda()

    def train():
        optimizer.zero_grad()
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            loss = sum(out.float().square().mean() for out in model(x))
        loss.backward()
        optimizer.step()

    train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@BOTH
def test_ddp_of_one_process_has_no_unused_parameter_and_no_warning(name, tmp_path):
    torch.distributed.init_process_group(
        'nccl', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    try:
        model = build(name).cuda().train()
        ddp = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        x = image((2, 3, 64, 96)).cuda()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(2):
                ddp.zero_grad()
                sum(out.sum() for out in ddp(x)).backward()
        assert all(p.grad is not None for p in model.parameters())
        strides = [str(w.message) for w in caught if 'strides' in str(w.message)]
        assert not strides, strides
    finally:
        torch.distributed.destroy_process_group()


@BOTH
@pytest.mark.parametrize('sharded', ['fsdp', 'fsdp2'])
def test_fsdp_of_one_process(name, sharded, tmp_path):
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if sharded == 'fsdp2' and not hasattr(fsdp, 'fully_shard'):
        pytest.skip('needs torch 2.6')
    torch.distributed.init_process_group(
        'nccl', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    try:
        x = image((2, 3, 64, 96)).cuda()
        expected = [out.detach() for out in build(name).cuda().train()(x)]
        model = build(name).cuda().train()
        if sharded == 'fsdp':
            model = fsdp.FullyShardedDataParallel(model, use_orig_params=True)
        else:
            mesh = init_device_mesh('cuda', (1,))
            for block in model.stage3:
                fsdp.fully_shard(block, mesh=mesh)
            fsdp.fully_shard(model, mesh=mesh)
        outs = model(x)
        for found, wanted in zip(outs, expected):
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        sum(out.sum() for out in outs).backward()
    finally:
        torch.distributed.destroy_process_group()


@BOTH
@pytest.mark.parametrize('training', [False, True])
def test_inductor_at_two_sizes(name, training):
    torch._dynamo.reset()
    model = build(name, out_indices=(0, 1)).cuda().train(training)
    reference = copy.deepcopy(model)
    model.compile()
    for size in [(2, 3, 64, 96), (2, 3, 96, 64)]:
        x = image(size).cuda()
        if training:
            reference.load_state_dict(model.state_dict())
            assert_close(step(model, x), step(reference, x), 2e-3)
        else:
            with torch.no_grad():
                for found, wanted in zip(model(x), reference(x)):
                    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@BOTH
def test_cuda_graph_of_the_forward_pass(name):
    model, x = build(name).cuda().eval(), image((1, 3, 64, 96)).cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = model(x)
        x.copy_(image((1, 3, 64, 96), 7))
        graph.replay()
        for found, wanted in zip(outs, model(x)):
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@BOTH
def test_memory_of_a_training_step_does_not_grow_with_the_maps(name, monkeypatch):
    monkeypatch.setenv('MMREST_TILE_BYTES', str(16 * 2**20))

    def peak(attn_impl):
        model = build(name, attn_impl=attn_impl).cuda().train()

        def train(height, width):
            sum(
                out.sum() for out in model(image((1, 3, height, width)).cuda())
            ).backward()

        train(64, 96)  # libraries keep memory of their own
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(768, 1152)
        return torch.cuda.max_memory_allocated() - before

    assert peak('auto') < 0.5 * peak('dense')
