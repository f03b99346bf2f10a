"""The chunked MLP against the plain formula, forward and backward."""

import pytest
import torch
from torch import nn

from mmrest.models.rest import Mlp


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 52 tokens forward and 64 backward, for a hidden layer of 24."""
    monkeypatch.setattr('mmrest.ops.chunked_mlp.CPU_CHUNK_BYTES', 10_000)
    monkeypatch.setattr('mmrest.ops.chunked_mlp.MIN_BACKWARD_ROWS', 64)


def plain(mlp, x):
    return mlp.fc2(nn.functional.gelu(mlp.fc1(x)))


def make(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    mlp = Mlp(6, 24).to(dtype)
    return mlp, torch.randn(*shape, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize('shape', [(2, 700), (2, 64), (1, 1), (0, 9), (3, 0)], ids=str)
def test_equals_the_plain_formula(shape):
    mlp, x = make(*shape)
    expected = plain(mlp, x)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
    leaves = (x, *mlp.parameters())
    grad = torch.randn_like(expected)
    out = mlp(x)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
    ):
        torch.testing.assert_close(found, wanted)


def test_sums_over_chunks_are_not_rounded_to_half_precision():
    mlp, x = make(1, 7000, dtype=torch.bfloat16)
    mlp(x).backward(torch.ones_like(x))
    expected = torch.full((6,), 7000.0)
    torch.testing.assert_close(mlp.fc2.bias.grad.float(), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize('layout', ['permuted tokens', 'expanded gradient'])
def test_layouts(layout):
    mlp, x = make(2, 90)
    grad = torch.randn(2, 90, 6, dtype=x.dtype)
    if layout == 'permuted tokens':
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    else:
        grad = grad[:1, :1].expand(2, 90, 6)
    leaves = (x, *mlp.parameters())
    for found, wanted in zip(
        torch.autograd.grad(mlp(x), leaves, grad),
        torch.autograd.grad(plain(mlp, x), leaves, grad),
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize('frozen', ['tokens', 'weights', 'fc1'])
def test_only_what_needs_a_gradient_gets_one(frozen):
    mlp, x = make(1, 130)
    if frozen == 'tokens':
        x.requires_grad_(False)
    else:
        (mlp if frozen == 'weights' else mlp.fc1).requires_grad_(False)
    leaves = [t for t in (x, *mlp.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(mlp(x).square().sum(), leaves)
    expected = torch.autograd.grad(plain(mlp, x).square().sum(), leaves)
    for found, wanted in zip(grads, expected):
        torch.testing.assert_close(found, wanted)


def test_second_order_gradients():
    mlp, x = make(1, 70)
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0].sum(),
            (x, *mlp.parameters())[:-1],
        )
        for f in (mlp, lambda x: plain(mlp, x))
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_result_may_change_in_place():
    """As forward hooks do, and layers with ``inplace=True``."""
    mlp, x = make(2, 70)
    leaves = (x, *mlp.parameters())
    found = torch.autograd.grad(mlp(x).mul_(2).sum(), leaves)
    expected = torch.autograd.grad(plain(mlp, x).mul(2).sum(), leaves)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_func_transforms():
    mlp, x = make(3, 70)
    x = x.detach()

    def loss(f):
        return lambda x: f(x).square().sum()

    expected = torch.func.grad(loss(lambda x: plain(mlp, x)))(x)
    torch.testing.assert_close(torch.func.grad(loss(mlp))(x), expected)
    by_image = torch.func.vmap(torch.func.grad(lambda x: loss(mlp)(x[None])))
    torch.testing.assert_close(by_image(x), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_the_plain_formula(dtype):
    mlp, x = make(2, 500, dtype=torch.float32)
    leaves = (x, *mlp.parameters())
    exact = torch.autograd.grad(plain(mlp, x).sum(), leaves)
    with torch.autocast('cpu', dtype):
        out = mlp(x)
        plain_out = plain(mlp, x)
    assert out.dtype == dtype
    found = torch.autograd.grad(out.float().sum(), leaves)
    usual = torch.autograd.grad(plain_out.float().sum(), leaves)
    for ours, theirs, truth in zip(found, usual, exact):
        assert ours.dtype == torch.float32
        bound = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + bound


def test_hidden_layer_is_never_whole():
    mlp, _ = make(1, 1)
    x = torch.randn(1, 20_000, 6, dtype=torch.float64, requires_grad=True)
    hidden_bytes = 20_000 * 24 * 8
    with torch.profiler.profile(profile_memory=True) as profile:
        mlp(x).sum().backward()
    now = highest = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            now += event.nbytes()
            highest = max(highest, now)
    # the output, its gradient (a broadcast 1) and the tokens' gradient: 1/4 each
    assert highest < 0.9 * hidden_bytes


def test_chunks_stay_within_the_budget(monkeypatch):
    mlp, x = make(2, 700)
    gelu, hidden_bytes = nn.functional.gelu, []

    def noted(hidden):
        hidden_bytes.append(hidden.nbytes)
        return gelu(hidden)

    monkeypatch.setattr(nn.functional, 'gelu', noted)
    with torch.no_grad():
        mlp(x)
    assert len(hidden_bytes) > 1 and max(hidden_bytes) <= 10_000


def test_dropout_acts_in_training_only():
    x = torch.randn(2, 700, 6)
    mlp = Mlp(6, 24, drop=0.5)
    assert not torch.equal(mlp(x), mlp(x))
    torch.testing.assert_close(mlp.eval()(x), plain(mlp, x))
