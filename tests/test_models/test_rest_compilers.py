"""ResT under PyTorch's compilers and exporters, at more than one size."""

import copy

import pytest
import torch
from rest_variants import TINY, VARIANTS, tiny
from weights_rule import fill, image

from mmrest import ResT

SIZES = [(2, 3, 40, 64), (2, 3, 64, 40), (1, 3, 45, 83)]


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


@pytest.mark.parametrize(
    'variant, training',
    [
        ('published', True),
        ('pos_le', False),
        *(
            pytest.param(variant, training, marks=pytest.mark.slow)
            for variant in VARIANTS
            for training in (False, True)
            if (variant, training) not in (('published', True), ('pos_le', False))
        ),
    ],
)
def test_compiles_without_a_break(variant, training):
    torch._dynamo.reset()
    model = tiny(variant).train(training)
    reference = copy.deepcopy(model)
    model.compile(fullgraph=True, backend='aot_eager')
    compare(model, reference, image(SIZES[0]))


def test_compilers_keep_the_operator():
    """No map is stored: three stages of several heads, one operator for each block."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, _):
        targets.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    model = tiny('published')
    model.compile(fullgraph=True, backend=backend)
    model(image(SIZES[0]))
    assert sum('mmrest.head_interaction_attention' in t for t in targets) == 3


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
def test_inductor_at_several_sizes(training):
    """The default backend compiles the second size for all others."""
    torch._dynamo.reset()
    model = ResT(TINY, out_indices=(0, 1)).train(training)
    fill(model.state_dict())
    reference = copy.deepcopy(model)
    model.compile()
    with torch.set_grad_enabled(training):
        for size in SIZES:
            compare(model, reference, image(size))


@pytest.mark.skipif(not hasattr(torch.export.Dim, 'AUTO'), reason='torch before 2.6')
def test_torch_export_with_dynamic_sizes():
    dynamic = torch.export.Dim.AUTO
    model = tiny('published').eval()
    program = torch.export.export(
        model,
        (image(SIZES[0]),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    for size in SIZES:
        x = image(size)
        for found, expected in zip(program.module()(x), model(x)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('variant', ['stem_resnet', 'attn_max'])
def test_torch_export_of_variants(variant):
    model, x = tiny(variant).eval(), image((1, 3, 64, 80))
    program = torch.export.export(model, (x,))
    for found, expected in zip(program.module()(x), model(x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torchscript_at_several_sizes():
    model = tiny('published').eval()
    traced = torch.jit.trace(model, image(SIZES[0]))
    assert 'mmrest::' not in str(traced.inlined_graph)
    for size in SIZES:
        x = image(size)
        for found, expected in zip(traced(x), model(x)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_legacy_onnx_keeps_sizes_dynamic(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    model, path = tiny('published').eval(), str(tmp_path / 'rest.onnx')
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
