"""Half precision: large and small scores, and gradients that overflow."""

import pytest
import torch

from mmrest.ops import head_interaction_attention

HALVES = (torch.float16, torch.bfloat16)


def inputs(scores, grad=1.0, queries=256, keys=64, dim=64):
    """Queries and keys whose scores have about this size, in float32."""
    side = scores**0.5
    q = torch.randn(1, 4, queries, dim) * side
    k = torch.randn(1, 4, keys, dim) * side
    v = torch.randn(1, 4, keys, dim)
    weight = torch.eye(4) + 0.1 * torch.randn(4, 4)
    return q, k, v, weight, torch.randn(1, 4, queries, dim) * grad


def run(tensors, dtype, attn_impl):
    """Output and gradients; in halves as under autocast, with a float32 weight."""
    *qkv, weight, grad = tensors
    qkv = [t.to(dtype).requires_grad_() for t in qkv]
    half = dtype in HALVES
    weight = weight.detach().clone().to(torch.float32 if half else dtype)
    weight.requires_grad_()
    with torch.autocast('cpu', dtype=dtype if half else None, enabled=half):
        # several tiles, the last of them smaller
        out = head_interaction_attention(
            *qkv, weight, attn_impl=attn_impl, tile_rows=100
        )
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in qkv), weight.grad]


def errors(found, expected):
    return [
        ((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected)
    ]


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('scores', [0.01, 1.0, 10.0])
def test_tiles_are_no_less_exact_than_stored_maps(dtype, scores):
    """The centred maps of small scores lie near 0, where float16 is coarse."""
    tensors = inputs(scores)
    rounded = [t.to(dtype).double() for t in tensors[:3]]
    exact = run((*rounded, *tensors[3:]), torch.float64, 'dense')
    tiled = errors(run(tensors, dtype, 'tiled'), exact)
    dense = errors(run(tensors, dtype, 'dense'), exact)
    bound = (1e-2 if dtype == torch.float16 else 5e-2) * max(1.0, scores / 2)
    assert max(tiled) < bound, tiled
    assert all(t <= 1.2 * d for t, d in zip(tiled, dense)), (tiled, dense)


def test_large_scores_in_float16():
    """Queries are scaled before the product, so it is the score that must fit."""
    tensors = inputs(scores=3600.0)
    rounded = [t.half().double() for t in tensors[:3]]
    product = (rounded[0] @ rounded[1].mT).abs().max()
    assert product > torch.finfo(torch.float16).max > product / 8
    exact = run((*rounded, *tensors[3:]), torch.float64, 'dense')
    out, *_ = run(tensors, torch.float16, 'tiled')
    assert errors([out], exact)[0] < 0.03
    assert all(g.isfinite().all() for g in run(tensors, torch.float16, 'tiled'))
    assert run(tensors, torch.float16, 'dense')[0].isnan().any()


def test_overflow_is_seen_and_not_swallowed():
    """An infinite gradient reaches every input, so that GradScaler skips the step."""
    *_, grad_q, grad_k, grad_v, grad_weight = run(
        inputs(scores=1.0, grad=60000.0), torch.float16, 'tiled'
    )
    for grad in (grad_q, grad_k, grad_v, grad_weight):
        assert not grad.isfinite().all()


def largest_finite_gradient(attn_impl, keys):
    """The largest power of 2 that the gradient may have in float16."""
    *qkv, weight, grad = inputs(scores=1.0, queries=64, keys=keys, dim=8)
    for power in range(14, -4, -1):
        scaled = grad.clamp(-2, 2) * 2.0**power
        results = run((*qkv, weight, scaled), torch.float16, attn_impl)
        if all(result.isfinite().all() for result in results):
            return power
    return -4


@pytest.mark.parametrize('keys', [64, 1050])
def test_gradients_may_be_as_large_as_with_stored_maps(keys):
    """1 / std of a map grows with its keys and must not multiply float16 products."""
    assert largest_finite_gradient('tiled', keys) >= largest_finite_gradient(
        'dense', keys
    )
