"""Every implementation against the dense form, forward and backward."""

from importlib import import_module
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import TOLERANCE, Shape, assert_same, make_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrest.ops import attention, head_interaction_attention
from mmrest.ops.tiled import choose_tile

SHAPES = [
    Shape(1, 2, 50, 13, 8),
    Shape(2, 4, 97, 31, 16),
    Shape(3, 8, 33, 33, 4),
    Shape(2, 2, 7, 1, 8),  # a single key: the map is constant
    Shape(1, 2, 1, 1, 4),
    Shape(1, 2, 1, 9, 4),
    Shape(5, 3, 64, 16, 5),
    Shape(0, 2, 6, 4, 4),
    Shape(1, 16, 40, 10, 3),
]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('tile_rows', [None, 1, 7, 32, 1000])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_dense(shape, tile_rows, dtype):
    inputs = make_inputs(shape, dtype)
    grad = torch.randn(shape.batch, shape.heads, shape.queries, shape.dim, dtype=dtype)
    expected = run(inputs, grad, attn_impl='dense')
    found = run(inputs, grad, attn_impl='tiled', tile_rows=tile_rows)
    expected['bias'] = torch.zeros_like(expected['bias'])
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('shape', [s for s in SHAPES if s.batch], ids=str)
def test_long_sums_of_a_gpu(shape, monkeypatch):
    """A product for each row gives the gradient of the weight, too."""
    inputs = make_inputs(shape, torch.float64)
    grad = torch.randn(inputs['q'].shape, dtype=torch.float64)
    expected = run(inputs, grad, attn_impl='tiled')
    tiled = import_module('mmrest.ops.tiled')
    monkeypatch.setattr(tiled, '_products_of_heads', tiled._products_of_heads_by_rows)
    found = run(inputs, grad, attn_impl='tiled')
    assert_same(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize('rows, keys, cut', [(2**14, 64, True), (2**20, 1, False)])
def test_products_for_each_row_are_smaller_than_the_maps(rows, keys, cut, monkeypatch):
    tiled = import_module('mmrest.ops.tiled')
    calls = []
    monkeypatch.setattr(tiled, '_products_of_heads_by_rows', lambda *x: calls.append(x))
    with FakeTensorMode():
        maps = torch.empty(1, 8, rows, keys, device='cuda')
        tiled._products_of_heads(maps, maps)
    assert bool(calls) is cut


@settings(max_examples=60, deadline=None)
@given(
    shape=st.builds(
        Shape,
        batch=st.integers(1, 4),
        heads=st.integers(1, 9),
        queries=st.integers(1, 70),
        keys=st.integers(1, 40),
        dim=st.integers(1, 12),
    ),
    tile_bytes=st.integers(1, 40_000),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_equals_dense_for_any_shape_and_budget(shape, tile_bytes, threads, seed):
    inputs = make_inputs(shape, torch.float64, seed)
    grad = torch.ones(
        shape.batch, shape.heads, shape.queries, shape.dim, dtype=torch.float64
    )
    expected = run(inputs, grad, attn_impl='dense')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMREST_TILE_BYTES', str(tile_bytes))
        patch.setattr('mmrest.ops.tiled.MIN_ROWS', 3)
        patch.setattr('mmrest.ops.tiled.MIN_PART_ROWS', 1)
        patch.setattr('mmrest.ops.tiled.MIN_PART_BYTES', 1)
        patch.setattr(torch, 'get_num_threads', lambda: threads)
        found = run(inputs, grad, attn_impl='tiled')
    assert_same(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize('wanted', [('q',), ('k', 'v'), ('v',), ('weight',)])
def test_gradients_of_some_inputs_only(wanted):
    shape = Shape(2, 2, 20, 9, 4)
    inputs = make_inputs(shape, torch.float64)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    grad = torch.randn(2, 2, 20, 4, dtype=torch.float64)
    expected = run(inputs, grad, wanted, attn_impl='dense')
    found = run(inputs, grad, wanted, attn_impl='tiled', tile_rows=6)
    assert_same(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    'layout',
    [
        lambda x: x.contiguous(),
        lambda x: x.detach().repeat_interleave(2, dim=3)[..., ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ],
    ids=['contiguous', 'strided', 'transposed', 'channels_last'],
)
def test_any_memory_layout(layout):
    inputs = make_inputs(Shape(2, 4, 21, 10, 6), torch.float64)
    grad = torch.randn(2, 4, 21, 6, dtype=torch.float64)
    expected = run(inputs, grad, ('weight',), attn_impl='dense')
    inputs.update((name, layout(inputs[name])) for name in 'qkv')
    found = run(inputs, layout(grad), ('weight',), attn_impl='tiled', tile_rows=5)
    assert_same(found, expected, TOLERANCE[torch.float64])


def test_gradient_that_is_an_expanded_scalar():
    inputs = make_inputs(Shape(2, 2, 9, 5, 3), torch.float64)
    grad = torch.ones((), dtype=torch.float64).expand(2, 2, 9, 3)
    expected = run(inputs, grad, attn_impl='dense')
    assert_same(run(inputs, grad, attn_impl='tiled', tile_rows=4), expected, 1e-10)


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('dropout_p', [0.0, 0.4])
def test_gradcheck(monkeypatch, dropout_p, threads):
    monkeypatch.setattr('mmrest.ops.tiled.MIN_PART_ROWS', 1)
    monkeypatch.setattr('mmrest.ops.tiled.MIN_PART_BYTES', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    inputs = make_inputs(Shape(2, 3, 7, 4, 3), torch.float64)

    def function(*tensors):
        # the same dropout masks in every evaluation
        torch.manual_seed(0)
        return head_interaction_attention(
            *tensors, dropout_p=dropout_p, attn_impl='tiled', tile_rows=3
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_second_order_gradients_are_refused():
    inputs = make_inputs(Shape(1, 2, 5, 4, 3), torch.float64)
    out = head_interaction_attention(**inputs, attn_impl='tiled')
    (grad_q,) = torch.autograd.grad(out.sum(), inputs['q'], create_graph=True)
    with pytest.raises(NotImplementedError, match="attn_impl='dense'"):
        grad_q.sum().backward()


def test_dense_has_second_order_gradients():
    inputs = make_inputs(Shape(1, 2, 5, 4, 3), torch.float64)

    def function(q, k, v):
        weight = inputs['weight'].detach()
        return head_interaction_attention(q, k, v, weight, attn_impl='dense')

    qkv = tuple(inputs[name] for name in 'qkv')
    assert torch.autograd.gradgradcheck(function, qkv)


@pytest.mark.parametrize('attn_impl', ['dense', 'tiled'])
def test_scale_and_eps_are_those_that_are_given(attn_impl):
    inputs = make_inputs(Shape(2, 3, 9, 7, 4), torch.float64)
    q, k, v, weight, bias = inputs.values()
    scores = torch.einsum('ijab,njxy->nixy', weight, 0.3 * q @ k.transpose(-2, -1))
    maps = (scores + bias[:, None, None]).softmax(-1)
    variance = maps.var((2, 3), unbiased=False, keepdim=True)
    expected = (maps - 1 / 7) / (variance + 0.2).sqrt() @ v
    found = head_interaction_attention(
        **inputs, scale=0.3, eps=0.2, attn_impl=attn_impl
    )
    torch.testing.assert_close(found, expected)


def test_dropout_scales_and_zeroes():
    shape = Shape(1, 2, 200, 30, 30)
    inputs = make_inputs(shape, torch.float64)
    # with v = identity the output is the map itself
    inputs['v'] = torch.eye(30, dtype=torch.float64).expand(1, 2, 30, 30)
    whole = head_interaction_attention(**inputs, attn_impl='tiled')
    dropped = head_interaction_attention(
        **inputs, dropout_p=0.25, attn_impl='tiled', tile_rows=64
    )
    kept = dropped != 0
    assert abs(float(kept.double().mean()) - 0.75) < 0.02
    # the statistics are those of the map before the dropout: to within the
    # factor, which is common to a head
    ratio = dropped[kept] / whole[kept]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 0.75))


def test_dropout_follows_the_global_seed():
    inputs = make_inputs(Shape(1, 2, 20, 10, 4))

    def draw(seed):
        torch.manual_seed(seed)
        return head_interaction_attention(**inputs, dropout_p=0.5, attn_impl='tiled')

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_dropout_of_every_tile_is_drawn_anew():
    inputs = make_inputs(Shape(2, 2, 20, 30, 30), torch.float64)
    inputs['v'] = torch.eye(30, dtype=torch.float64).expand(2, 2, 30, 30)
    maps = head_interaction_attention(
        **inputs, dropout_p=0.5, attn_impl='tiled', tile_rows=10
    )
    tiles = (maps != 0).unflatten(2, (2, 10)).transpose(1, 2).flatten(0, 1)
    assert len(tiles) == 4
    for one, other in combinations(tiles, 2):
        # independent masks agree in half of their entries
        assert 0.3 < float((one == other).double().mean()) < 0.7


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(
    'shape', [(2, 1, 50, 13, 8), (1, 1, 1, 1, 4), (2, 1, 9, 1, 8)], ids=str
)
def test_one_head(shape, dtype):
    inputs = make_inputs(Shape(*shape), dtype)
    qkv = {name: inputs[name] for name in 'qkv'}
    b, h, n, _, d = shape
    grad = torch.randn(b, h, n, d, dtype=dtype)
    expected = run(qkv, grad, 'qkv', attention, attn_impl='dense')
    found = run(qkv, grad, 'qkv', attention, attn_impl='auto')
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(attn_impl='fast'), "attn_impl must be one of 'auto'.*'fast'"),
        (dict(tile_rows=0), 'tile_rows must be at least 1, found 0'),
        (dict(k=torch.zeros(1, 2, 5, 9)), r'found q \(1, 2, 8, 4\), k \(1, 2, 5, 9\)'),
        (dict(weight=torch.zeros(3, 3)), r'weight \(3, 3\)'),
        (dict(q=torch.zeros(8, 4)), r'found q \(8, 4\)'),
        (dict(v=torch.zeros(1, 2, 5, 4).half()), 'one dtype'),
    ],
)
def test_bad_input(change, message):
    options = {**make_inputs(Shape(1, 2, 8, 5, 4)), 'attn_impl': 'tiled', **change}
    with pytest.raises(ValueError, match=message):
        head_interaction_attention(**options)


@pytest.mark.parametrize('value', ['', '0', '-5', '1e6', 'big'])
def test_bad_tile_budget(monkeypatch, value):
    monkeypatch.setenv('MMREST_TILE_BYTES', value)
    with pytest.raises(ValueError, match='MMREST_TILE_BYTES must be a positive'):
        head_interaction_attention(**make_inputs(Shape(1, 2, 8, 5, 4)))


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(0, 40),
    heads=st.integers(1, 16),
    queries=st.integers(0, 10**6),
    keys=st.integers(1, 10**5),
)
def test_tiles_stay_within_the_budget(batch, heads, queries, keys):
    q = torch.empty(batch, heads, queries, 8, device='meta')
    tile = choose_tile(q, keys)
    assert tile.rows >= 1 and tile.images >= 1
    row_bytes = heads * keys * 4
    budget = max(128 * 2**20, 64 * row_bytes)  # meta counts as a large device
    assert tile.images * tile.rows * row_bytes <= budget


@pytest.mark.parametrize(
    'threads, batch, queries, keys, expected',
    [
        (1, 1, 4200, 1050, (1, 248, 1)),
        (2, 1, 4200, 1050, (1, 248, 2)),
        (4, 3, 4200, 1050, (1, 248, 4)),
        (8, 1, 4200, 1050, (1, 248, 1)),  # fewer than 32 rows each
        (2, 1, 196, 49, (1, 196, 1)),  # too little work
        (2, 5, 400, 196, (3, 400, 1)),  # images, which need no parts
        (3, 1, 1051, 1000, (1, 213, 3)),
    ],
)
def test_one_part_for_each_thread(monkeypatch, threads, batch, queries, keys, expected):
    """Images, rows and parts of a tile."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    assert choose_tile(torch.empty(batch, 4, queries, 8), keys) == expected


def test_dropout_does_not_depend_on_the_threads(monkeypatch):
    inputs = make_inputs(Shape(1, 4, 901, 500, 8))
    outputs = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=threads: n)
        torch.manual_seed(0)
        out = head_interaction_attention(**inputs, dropout_p=0.5, attn_impl='tiled')
        outputs.append(out.detach())
    torch.testing.assert_close(*outputs)


def test_triton_falls_back_to_tiled_with_a_warning():
    inputs = make_inputs(Shape(1, 2, 8, 5, 4))
    with pytest.warns(UserWarning, match="'triton' cannot.*'tiled' is used"):
        found = head_interaction_attention(**inputs, attn_impl='triton')
    assert torch.equal(found, head_interaction_attention(**inputs, attn_impl='tiled'))


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(
    'threads, batch, heads, rows, seen',
    [
        (1, 1, 1, 24, 1),
        (2, 1, 1, 24, 2),
        (2, 1, 1, 25, 5),
        (2, 1, 1, 23, 1),  # nothing divides it
        (8, 1, 2, 24, 4),
        (8, 3, 1, 24, 9),
        (2, 2, 1, 24, 2),
        (8, 1, 1, 8, 1),  # too short
    ],
)
def test_rows_in_parts_for_the_threads(
    monkeypatch, threads, batch, heads, rows, seen, dtype
):
    """PyTorch's backward pass on CPUs has one thread for each image and head."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    # the package has a function of the module's name
    module = import_module('mmrest.ops.head_interaction_attention')
    monkeypatch.setattr(module, 'MIN_PART_ROWS', 3)
    fused, batches = F.scaled_dot_product_attention, []

    def note(q, *args, **kwargs):
        batches.append(len(q))
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', note)
    inputs = make_inputs(Shape(batch, heads, rows, 7, 8), dtype)
    q, k, v = (inputs[name].detach().requires_grad_() for name in 'qkv')
    grad = torch.randn(q.shape, dtype=dtype)
    results = {}
    for impl in ('dense', 'auto'):
        out = attention(q, k, v, attn_impl=impl)
        gradients = torch.autograd.grad(out, (q, k, v), grad)
        results[impl] = dict(zip(('out', *'qkv'), (out, *gradients)))
    assert batches == [seen]
    assert_same(results['auto'], results['dense'], TOLERANCE[dtype])
    with torch.no_grad():
        attention(q, k, v)
    assert batches == [seen, batch]
