"""The attention under PyTorch's compilers, transforms and exporters."""

import io

import pytest
import torch
from attention_cases import Shape, make_inputs, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmrest.models.rest import EMSA, Mlp
from mmrest.ops import head_interaction_attention


class Attention(nn.Module):
    """EMSA on a fixed map, so that exporters see a module with one input."""

    def __init__(self, num_heads: int = 4, attn_impl: str = 'auto') -> None:
        super().__init__()
        self.emsa = EMSA(16, num_heads, sr_ratio=2, attn_impl=attn_impl)
        self.mlp = Mlp(16, 32)

    def forward(self, x):
        return self.mlp(self.emsa(x, (6, 5)))


def test_operator_is_well_formed():
    inputs = make_inputs(Shape(2, 2, 9, 5, 3))
    weight = inputs['weight'].reshape(2, 2)
    args = (*(inputs[n] for n in 'qkv'), weight, inputs['bias'], 0.5, 1e-5, 0.0)
    operator = torch.ops.mmrest.head_interaction_attention.default
    torch.library.opcheck(operator, (*args, None, 4))


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(
        head_interaction_attention, fullgraph=True, backend=counter
    )
    for seed, shape in enumerate([(2, 2, 20, 9, 4), (2, 2, 20, 9, 4)]):
        inputs = make_inputs(Shape(*shape), torch.float64, seed)
        grad = torch.randn(2, 2, 20, 4, dtype=torch.float64)
        expected = run(inputs, grad)
        found = run(inputs, grad, function=compiled)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])
    assert counter.frame_count == 1
    # other sizes may compile once more, for dynamic shapes; then no more
    for queries in (21, 33, 47, 60):
        compiled(**make_inputs(Shape(2, 2, queries, 9, 4), torch.float64))
    assert counter.frame_count == 2


def test_compiles_whole_without_the_kernels_of_triton():
    """What they cannot do is computed in tiles, with a warning, also when compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(
        head_interaction_attention, fullgraph=True, backend='aot_eager'
    )
    inputs = make_inputs(Shape(1, 2, 6, 5, 4))
    with pytest.warns(UserWarning, match="cannot be used here: .* 'tiled' is used"):
        found = compiled(**inputs, attn_impl='triton')
    torch.testing.assert_close(found, head_interaction_attention(**inputs))


def test_export_keeps_the_operator():
    model = Attention().eval()
    x = torch.randn(2, 30, 16)
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any('mmrest.head_interaction_attention' in target for target in targets)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('num_heads', [1, 4])
def test_torchscript_needs_nothing_of_ours(num_heads):
    model = Attention(num_heads).eval()
    x = torch.randn(1, 30, 16)
    traced = torch.jit.trace(model, x)
    assert 'mmrest::' not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    y = torch.randn(1, 30, 16)
    torch.testing.assert_close(torch.jit.load(file)(y), model(y))


def test_onnx_needs_nothing_of_ours(tmp_path):
    onnx = pytest.importorskip('onnx', reason='needs onnx')
    pytest.importorskip('onnxscript', reason='needs onnxscript')
    path = tmp_path / 'emsa.onnx'
    torch.onnx.export(Attention().eval(), (torch.randn(1, 30, 16),), path, dynamo=True)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {'', 'ai.onnx'}


@pytest.mark.parametrize('attn_impl', ['auto', 'dense'])
def test_func_grad(attn_impl):
    inputs = make_inputs(Shape(2, 2, 9, 5, 3), torch.float64)
    leaves = {name: tensor.detach() for name, tensor in inputs.items()}

    def loss(q):
        # a registered operator's autograd formula has no functorch form
        changed = {**leaves, 'q': q, 'attn_impl': attn_impl}
        return head_interaction_attention(**changed).square().sum()

    out = head_interaction_attention(**inputs)
    (expected,) = torch.autograd.grad(out.square().sum(), inputs['q'])
    torch.testing.assert_close(torch.func.grad(loss)(leaves['q']), expected)


def test_tiled_says_what_can_be_exported():
    inputs = make_inputs(Shape(1, 2, 9, 5, 3))
    q, k, v, weight = (inputs[name].detach() for name in ('q', 'k', 'v', 'weight'))

    def function(q):
        return head_interaction_attention(q, k, v, weight, attn_impl='tiled')

    with pytest.raises(RuntimeError, match="attn_impl='auto' or 'dense'"):
        torch.jit.trace(function, q)


def test_func_vmap():
    inputs = make_inputs(Shape(6, 2, 9, 5, 3), torch.float64)
    q, k, v = (inputs[name].detach() for name in 'qkv')
    weight = inputs['weight'].detach()

    def function(q, k, v):
        return head_interaction_attention(q, k, v, weight)

    expected = function(q, k, v)
    stacked = (x.unflatten(0, (3, 2)) for x in (q, k, v))
    found = torch.func.vmap(function)(*stacked)
    torch.testing.assert_close(found.flatten(0, 1), expected)


@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_memory_does_not_grow_with_the_maps(backward):
    """Peak of allocated bytes, counted by the profiler, against the map's size."""
    shape = Shape(1, 4, 4096, 2048, 8)
    map_bytes = 4 * 4096 * 2048 * 4  # 128 MiB for one set of maps
    inputs = make_inputs(shape)
    grad = torch.ones(1, 4, 4096, 8)

    def peak(impl):
        with torch.profiler.profile(profile_memory=True) as profile:
            if backward:
                run(inputs, grad, attn_impl=impl)
            else:
                with torch.no_grad():
                    head_interaction_attention(**inputs, attn_impl=impl)
        events = profile.profiler.kineto_results.events()
        now = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == '[memory]':
                now += event.nbytes()
                highest = max(highest, now)
        return highest

    assert peak('dense') > map_bytes
    assert peak('tiled') < map_bytes / 4
