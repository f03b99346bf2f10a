"""``attn_impl='amx'``: exact where it applies, and 'tiled' with a reason elsewhere."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from attention_cases import Shape, make_inputs, relative_error, run

from mmrest import ResT
from mmrest.ops import head_interaction_attention

amx = import_module('mmrest.ops.amx_head_interaction')


@pytest.fixture(scope='module')
def operator():
    """The compiled operator."""
    if problem := amx._machine_problem():
        pytest.skip(f"attn_impl='amx' does not run here: {problem}")
    return amx._attention_op


SHAPES = [
    Shape(1, 2, 50, 13, 8),
    Shape(2, 4, 97, 31, 16),
    Shape(3, 8, 33, 33, 4),
    Shape(1, 2, 130, 32, 96),
    Shape(2, 2, 7, 1, 8),  # a single key: the map is constant
    Shape(1, 2, 1, 1, 2),
    Shape(0, 2, 6, 4, 4),
    Shape(1, 8, 300, 260, 64),
]


def distances(found, exact):
    """For output and gradients, with a floor where a gradient is 0 in theory."""
    return {name: relative_error(found[name], exact[name], 1.0) for name in exact}


@pytest.mark.parametrize('tile_rows', [None, 1, 40])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_is_no_less_exact_than_tiled(operator, shape, tile_rows):
    inputs = make_inputs(shape, torch.bfloat16)
    size = (shape.batch, shape.heads, shape.queries, shape.dim)
    grad = torch.randn(size, dtype=torch.bfloat16)
    wide = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    exact = run(wide, grad.double(), attn_impl='dense')
    found = run(inputs, grad, attn_impl='amx', tile_rows=tile_rows)
    assert not found['bias'].any()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and tensor.shape == exact[name].shape
    allowed = distances(run(inputs, grad, attn_impl='tiled'), exact)
    for name, error in distances(found, exact).items():
        assert error <= max(allowed[name], 0.01), (name, error, allowed[name])


@pytest.mark.parametrize('factor', [0.01, 1.0, 30.0])
def test_small_and_large_scores(operator, factor):
    """The centred maps of small scores lie near 0; large ones have one key a row."""
    inputs = make_inputs(Shape(1, 4, 256, 64, 64), torch.bfloat16)
    inputs['q'] = (inputs['q'] * factor).detach().requires_grad_()
    grad = torch.randn(1, 4, 256, 64, dtype=torch.bfloat16)
    wide = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    exact = run(wide, grad.double(), attn_impl='dense')
    for name in ('out', 'q', 'k', 'v', 'weight'):
        found = run(inputs, grad, attn_impl='amx')[name].double()
        error = (found - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, (name, error)


@pytest.mark.parametrize(
    'layout',
    [
        lambda x: x.contiguous(),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    ],
    ids=['heads first', 'channels first', 'slice'],
)
def test_takes_any_layout(operator, layout):
    inputs = make_inputs(Shape(2, 2, 40, 20, 8), torch.bfloat16)
    grad = torch.randn(2, 2, 40, 8, dtype=torch.bfloat16)
    expected = run(inputs, grad, attn_impl='amx')
    other = dict(inputs)
    for name in 'qkv':
        other[name] = layout(inputs[name].detach()).requires_grad_()
    found = run(other, layout(grad), attn_impl='amx')
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_scale_eps_and_a_float32_weight(operator):
    inputs = make_inputs(Shape(1, 2, 40, 20, 8), torch.bfloat16)
    inputs['weight'] = inputs['weight'].detach().float().requires_grad_()
    options = dict(scale=0.7, eps=0.01)
    wide = {k: v.detach().double() for k, v in inputs.items()}
    exact = head_interaction_attention(**wide, **options, attn_impl='dense')
    with torch.autocast('cpu', torch.bfloat16):
        out = head_interaction_attention(**inputs, **options, attn_impl='amx')
    assert relative_error(out, exact, 1.0) < 0.01
    out.sum().backward()
    assert inputs['weight'].grad.dtype == torch.float32


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_is_not_hidden(operator, value):
    """A row with it is NaN, as with stored maps, and the norm spreads it."""
    inputs = {k: v.detach() for k, v in make_inputs(Shape(1, 2, 40, 20, 8)).items()}
    inputs = {k: v.bfloat16() for k, v in inputs.items()}
    inputs['q'][0, 0, 3, 2] = value
    found = head_interaction_attention(**inputs, attn_impl='amx')
    assert found.isnan().all()
    assert head_interaction_attention(**inputs, attn_impl='dense').isnan().all()


def test_does_not_depend_on_the_threads(operator):
    inputs = make_inputs(Shape(1, 4, 901, 100, 32), torch.bfloat16)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(head_interaction_attention(**inputs, attn_impl='amx'))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_is_an_operator_that_compilers_know(operator):
    inputs = make_inputs(Shape(1, 2, 40, 20, 8), torch.bfloat16)
    args = (*inputs.values(), 0.3, 1e-5, None)
    q, k, v, weight, bias = args[:5]
    torch.library.opcheck(operator, (q, k, v, weight[..., 0, 0], bias, *args[5:]))


def test_cannot_be_differentiated_twice(operator):
    inputs = make_inputs(Shape(1, 2, 8, 5, 4), torch.bfloat16)
    out = head_interaction_attention(**inputs, attn_impl='amx')
    (grad,) = torch.autograd.grad(out.sum(), inputs['q'], create_graph=True)
    with pytest.raises(NotImplementedError, match="attn_impl='dense'"):
        grad.sum().backward()


def test_backbone(operator):
    """All maps and the gradient of the image, under autocast."""
    torch.manual_seed(0)
    model = ResT(arch='lite', attn_impl='amx')
    model.init_weights()
    exact = ResT(arch='lite', attn_impl='dense').double()
    exact.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 130)

    def outputs(model, x):
        x = x.clone().requires_grad_()
        maps = model.eval()(x)
        grads = torch.autograd.grad(sum(m.float().square().mean() for m in maps), x)
        return [m.detach().double() for m in maps] + [grads[0].double()]

    expected = outputs(exact, x.double())
    with torch.autocast('cpu', torch.bfloat16):
        found = outputs(model, x)
        for block in model.modules():
            if hasattr(block, 'attn_impl'):
                block.attn_impl = 'dense'
        stored = outputs(model, x)
    for a, b, e in zip(found, stored, expected):
        # what else is in bfloat16 adds as much, at random
        assert (a - e).norm() <= 2 * (b - e).norm() + 1e-3 * e.norm()


@pytest.mark.parametrize(
    'change, reason',
    [
        (dict(dtype=torch.float32), 'supports bfloat16 .* found float32'),
        (dict(heads=3), '2, 4 or 8 heads, found 3'),
        (dict(dim=5), 'an even number of channels per head, found 5'),
        (dict(dropout_p=0.5), 'no dropout, found dropout_p=0.5'),
    ],
)
def test_falls_back_to_tiled_with_a_reason(change, reason):
    options = dict(dtype=torch.bfloat16, heads=2, dim=4, dropout_p=0.0) | change
    shape = Shape(1, options['heads'], 8, 5, options['dim'])
    inputs = make_inputs(shape, options['dtype'])
    outputs = []
    for impl in ('amx', 'tiled'):
        torch.manual_seed(0)
        call = dict(inputs, dropout_p=options['dropout_p'], attn_impl=impl)
        if impl == 'amx':
            with pytest.warns(UserWarning, match=f"'amx' cannot.*{reason}.*'tiled'"):
                outputs.append(head_interaction_attention(**call))
        else:
            outputs.append(head_interaction_attention(**call))
    assert torch.equal(*outputs)


def test_falls_back_to_tiled_without_the_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False, False)
    amx._find_machine_problem.cache_clear()
    try:
        x = torch.randn(1, 2, 8, 4, dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="no AMX.*'tiled' is used"):
            head_interaction_attention(x, x, x, torch.eye(2), attn_impl='amx')
    finally:
        amx._find_machine_problem.cache_clear()


def attend_in_a_process(code='', **env):
    """Run the attention in a process of its own, since the library is in this one."""
    code = (
        'import torch; from mmrest.ops import head_interaction_attention as attend\n'
        f'x = torch.randn(1, 2, 8, 4, dtype=torch.bfloat16)\n{code}\n'
        "attend(x, x, x, torch.eye(2), attn_impl='amx')\n"
    )
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    'env, code',
    [
        (dict(CXX='no-such-compiler'), ''),
        ({}, "import sys; sys.modules['setuptools'] = None"),
        ({}, 'torch.ops.load_library = torch.utils.cpp_extension = None'),
    ],
    ids=['compiler', 'setuptools', 'cpp_extension'],
)
def test_falls_back_to_tiled_where_it_cannot_be_built(operator, tmp_path, env, code):
    done = attend_in_a_process(code, TORCH_EXTENSIONS_DIR=str(tmp_path), **env)
    assert done.returncode == 0, done.stderr
    assert 'it cannot be built here' in done.stderr
    assert not list(tmp_path.glob('*')), 'nothing half built is left'


def test_falls_back_to_tiled_where_onednn_leaves_amx_out(operator):
    done = attend_in_a_process(ONEDNN_MAX_CPU_ISA='AVX512_CORE')
    assert done.returncode == 0, done.stderr
    assert "'tiled' is used" in done.stderr
    inputs = make_inputs(Shape(1, 2, 8, 5, 4), torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        with pytest.warns(UserWarning, match="mkldnn.enabled is False.*'tiled'"):
            head_interaction_attention(**inputs, attn_impl='amx')


def test_wrong_tiles_are_named_in_the_forward_pass(operator):
    inputs = make_inputs(Shape(1, 2, 8, 5, 4), torch.bfloat16)
    with pytest.raises(ValueError, match='tile_rows must be at least 1, found 0'):
        head_interaction_attention(**inputs, attn_impl='amx', tile_rows=0)


def test_an_exported_program_loads_the_library(operator, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, x):
            weight = torch.eye(2)
            return head_interaction_attention(x, x, x, weight, attn_impl='amx')

    x = torch.randn(1, 2, 8, 4, dtype=torch.bfloat16)
    file = tmp_path / 'attention.pt2'
    torch.export.save(torch.export.export(Attention(), (x,)), file)
    done = attend_in_a_process(f'torch.export.load({str(file)!r}).module()(x)')
    assert done.returncode == 0, done.stderr
