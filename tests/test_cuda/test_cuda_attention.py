"""The attention on a CUDA device: exact, without its maps, and without waiting."""

import pytest
import torch
from attention_cases import Shape, assert_same, make_inputs, run

SHAPES = [
    Shape(1, 2, 50, 13, 8),
    Shape(2, 4, 97, 31, 16),
    Shape(3, 8, 33, 33, 4),
    Shape(2, 2, 7, 1, 8),
    Shape(1, 1, 9, 5, 32),
    Shape(2, 4, 700, 1050, 64),
    Shape(2, 4, 1050, 1050, 64),  # long sums, which are cut
]
# of the largest entry; sums of a thousand products in float32
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def on_cuda(inputs):
    return {
        name: tensor.detach().cuda().requires_grad_() for name, tensor in inputs.items()
    }


def gradient(shape, dtype):
    rng = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.heads, shape.queries, shape.dim)
    return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('tile_rows', [None, 7])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_tiled_equals_dense_on_the_cpu(shape, tile_rows, dtype):
    inputs, grad = make_inputs(shape, torch.float64), gradient(shape, torch.float64)
    expected = run(inputs, grad, attn_impl='dense')
    expected['bias'] = torch.zeros_like(expected['bias'])
    cast = {name: t.detach().to(dtype) for name, t in inputs.items()}
    found = run(
        on_cuda(cast), grad.to(dtype).cuda(), attn_impl='tiled', tile_rows=tile_rows
    )
    assert all(tensor.is_cuda for tensor in found.values())
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_less_exact_than_dense(dtype):
    shape = Shape(2, 4, 500, 300, 64)
    inputs, grad = make_inputs(shape), gradient(shape, torch.float32)
    exact = run(inputs, grad, attn_impl='dense')
    half = on_cuda(inputs)
    half.update((n, half[n].detach().to(dtype).requires_grad_()) for n in 'qkv')

    def distances(attn_impl):
        with torch.autocast('cuda', dtype):
            found = run(half, grad.cuda().to(dtype), attn_impl=attn_impl)
        return {
            name: float((found[name].float().cpu() - exact[name]).norm())
            for name in ('out', 'q', 'k', 'v', 'weight')
        }

    dense = distances('dense')
    for name, distance in distances('tiled').items():
        assert distance <= 1.2 * dense[name], (name, distance, dense[name])


@pytest.mark.parametrize('keys', [64, 1050])
def test_float16_gradients_may_be_as_large_as_with_stored_maps(keys):
    shape = Shape(1, 4, 512, keys, 64)
    inputs, grad = make_inputs(shape), gradient(shape, torch.float32).clamp(-2, 2)
    half = on_cuda(inputs)
    half.update((n, half[n].detach().half().requires_grad_()) for n in 'qkv')

    def largest(attn_impl):
        for power in range(14, -6, -1):
            scaled = (grad * 2.0**power).half().cuda()
            with torch.autocast('cuda', torch.float16):
                found = run(half, scaled, attn_impl=attn_impl)
            if all(tensor.isfinite().all() for tensor in found.values()):
                return power
        return -6

    assert largest('tiled') >= largest('dense')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_step_waits_for_nothing(dtype):
    inputs = on_cuda(make_inputs(Shape(2, 4, 700, 300, 32)))
    inputs.update((n, inputs[n].detach().to(dtype).requires_grad_()) for n in 'qkv')
    grad = torch.ones(2, 4, 700, 32, dtype=dtype, device='cuda')
    run(inputs, grad, attn_impl='tiled')
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(inputs, grad, attn_impl='tiled')
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_memory_does_not_grow_with_the_maps(backward, monkeypatch):
    monkeypatch.setenv('MMREST_TILE_BYTES', str(16 * 2**20))
    shape = Shape(1, 8, 16_800, 2_048, 32)
    map_bytes = 8 * 16_800 * 2_048 * 4  # one set of maps: 1.1 GB
    inputs = on_cuda(make_inputs(shape))
    grad = torch.ones(1, 8, 16_800, 32, device='cuda')
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if backward:
        run(inputs, grad, attn_impl='tiled')
    else:
        with torch.no_grad():
            run.__globals__['head_interaction_attention'](**inputs, attn_impl='tiled')
    assert torch.cuda.max_memory_allocated() - before < map_bytes / 4
