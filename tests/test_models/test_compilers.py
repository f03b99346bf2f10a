"""Both generations under PyTorch's compilers and exporters, at more than one size."""

import copy

import pytest
import torch
from rest_variants import TINY, VARIANTS, tiny
from weights_rule import fill, image

from mmrest import ResT, ResTV2

SIZES = [(2, 3, 40, 64), (2, 3, 64, 40), (1, 3, 45, 83)]
BOTH = pytest.mark.parametrize('kind', [ResT, ResTV2])


def build(kind, **options):
    model = kind(TINY, **options)
    fill(model.state_dict())
    return model


def step(model, x):
    """Outputs, and gradients by name."""
    model.zero_grad()
    outs = model(x)
    if not model.training:
        return outs, {}
    sum((out * image(out.shape, 9)).sum() for out in outs).backward()
    return outs, {name: p.grad for name, p in model.named_parameters()}


def compare(compiled, reference, x):
    reference.load_state_dict(compiled.state_dict())  # running statistics
    outs, grads = step(reference, x)
    found, found_grads = step(compiled, x)
    for out, expected in zip(found, outs):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    largest = max((float(grad.abs().max()) for grad in grads.values()), default=0.0)
    for name, grad in grads.items():
        assert float((found_grads[name] - grad).abs().max()) < 2e-4 * largest, name


def check_sizes(function, model):
    for size in SIZES:
        x = image(size)
        for found, expected in zip(function(x), model(x)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


FAST = [('published', True), ('pos_le', False)]
SLOW = [(variant, training) for variant in VARIANTS for training in (False, True)]


@pytest.mark.parametrize(
    'variant, training',
    [
        *FAST,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [*SLOW, ('v2', False), ('v2', True)]
            if case not in FAST
        ),
    ],
)
def test_compiles_without_a_break(variant, training):
    """In training the backward pass is compiled too."""
    torch._dynamo.reset()
    model = build(ResTV2) if variant == 'v2' else tiny(variant)
    model.train(training)
    reference = copy.deepcopy(model)
    model.compile(fullgraph=True, backend='aot_eager' if training else 'eager')
    compare(model, reference, image(SIZES[0]))


def test_compilers_keep_the_operator():
    """No map is stored: three stages of several heads, one operator for each block."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, _):
        targets.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    model = build(ResT)
    model.compile(fullgraph=True, backend=backend)
    model(image(SIZES[0]))
    assert sum('mmrest.head_interaction_attention' in t for t in targets) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind, training, dynamic', [(ResT, True, None), (ResTV2, False, True)]
)
def test_inductor_at_several_sizes(kind, training, dynamic):
    """By itself the default backend compiles the second size for all others.

    One stage, whose heads interact, has all kinds of layers; most of the time is taken
    by the compiler of C++.
    """
    torch._dynamo.reset()
    model = kind(dict(TINY, num_heads=[2, 2, 3, 4]), out_indices=(0,)).train(training)
    fill(model.state_dict())
    reference = copy.deepcopy(model)
    model.compile(dynamic=dynamic)
    with torch.set_grad_enabled(training):
        for size in SIZES:
            compare(model, reference, image(size))


@BOTH
@pytest.mark.skipif(not hasattr(torch.export.Dim, 'AUTO'), reason='torch before 2.6')
def test_torch_export_with_dynamic_sizes(kind):
    dynamic = torch.export.Dim.AUTO
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    model = build(kind).eval()
    args = (image(SIZES[0]),)
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    check_sizes(program.module(), model)


@pytest.mark.parametrize('variant', ['stem_resnet', 'attn_max'])
def test_torch_export_of_variants(variant):
    model, x = tiny(variant).eval(), image((1, 3, 64, 80))
    program = torch.export.export(model, (x,))
    for found, expected in zip(program.module()(x), model(x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_torchscript_at_several_sizes(kind):
    model = build(kind).eval()
    traced = torch.jit.trace(model, image(SIZES[0]))
    assert 'mmrest::' not in str(traced.inlined_graph)
    check_sizes(traced, model)


@BOTH
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_legacy_onnx_keeps_sizes_dynamic(kind, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    model, path = build(kind).eval(), str(tmp_path / 'rest.onnx')
    torch.onnx.export(
        model,
        (image(SIZES[0]),),
        path,
        dynamo=False,
        opset_version=17,
        input_names=['image'],
        output_names=list('abcd'),
        dynamic_axes={name: {0: 'n', 2: 'h', 3: 'w'} for name in ('image', *'abcd')},
    )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for size in SIZES:
        x = image(size)
        for found, expected in zip(session.run(None, {'image': x.numpy()}), model(x)):
            assert found.shape == expected.shape
            error = (torch.as_tensor(found) - expected).abs().max()
            assert error < 1e-3 * expected.abs().max()
