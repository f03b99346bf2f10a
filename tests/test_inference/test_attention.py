"""The row of a point against the whole map, and the tool that draws it."""

import cv2
import numpy as np
import pytest
import torch
from rest_variants import TINY, VARIANTS, tiny
from torch import nn
from weights_rule import fill

from mmrest import ResTV2
from mmrest.inference import InferenceError, attend, init_inferencer
from mmrest.inference.attention import attend_in_network

VARIANTS_WITH_MAPS = ['published', 'stem_patch', *(n for n in VARIANTS if 'attn' in n)]


def whole_maps(attn, x, size):
    """All maps of an attention, before and after the norm, (h, N, M) each."""
    reduced = attn.reduce(x, size)
    reduced = reduced[0] if isinstance(reduced, tuple) else reduced
    q = attn.split_heads(attn.q(x))
    k = attn.split_heads(attn.kv(reduced).chunk(2, -1)[0])
    maps = q @ k.transpose(-2, -1) * attn.scale
    mix = getattr(attn, 'transform_conv', getattr(attn, 'mix_conv', None))
    maps = (maps if mix is None else mix(maps)).softmax(-1)
    if not hasattr(attn, 'transform_conv'):
        return maps[0], maps[0]
    return maps[0], torch.instance_norm(
        maps, None, None, None, None, True, 0.0, 1e-5, False
    )[0]


@pytest.mark.parametrize('name', [*VARIANTS_WITH_MAPS, 'v2'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_row_is_that_of_the_whole_map(name, dtype):
    if name == 'v2':
        model = ResTV2(TINY)
        fill(model.state_dict())
    else:
        model = tiny(name)
    model = model.to(dtype).eval()
    calls = {}
    for i in range(4):
        model.stage(i)[-1].attn.register_forward_pre_hook(
            lambda module, args: calls.update({module: args})
        )
    x, y = 70, 33
    stages = attend_in_network(model, torch.rand(1, 3, 75, 101, dtype=dtype), x, y)
    tol = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-3)
    assert len(stages) == 4
    for i, found in enumerate(stages):
        tokens, size = calls[model.stage(i)[-1].attn]
        with torch.no_grad():
            maps, normalised = whole_maps(model.stage(i)[-1].attn, tokens, size)
        stride = 4 * 2**i
        assert found.size == size and found.cell == (y // stride, x // stride)
        query = found.cell[0] * size[1] + found.cell[1]
        rows = found.rows.reshape(len(found.rows), -1)
        np.testing.assert_allclose(rows, maps[:, query], **tol)
        wanted = normalised[:, query].numpy()
        rows = found.normalised().reshape(rows.shape)
        floor = np.abs(wanted).max() * (1e-9 if dtype == torch.float64 else 2e-3)
        np.testing.assert_allclose(rows, wanted, rtol=tol['rtol'], atol=floor + 1e-12)
        assert found.features.shape == size


def test_gates_and_last_pixel():
    model = tiny('published').eval()
    gates = []
    model.stem.pos.pa_conv.register_forward_hook(lambda *a: gates.append(a[-1]))
    stages = attend_in_network(model, torch.rand(1, 3, 33, 35), 34, 32, block=0)
    np.testing.assert_allclose(
        stages[0].gates, gates[0][0].sigmoid().mean(0).detach(), rtol=1e-5
    )
    assert [s.cell for s in stages] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    stages = attend_in_network(tiny('pos_none').eval(), torch.rand(1, 3, 32, 32), 0, 0)
    assert stages[0].gates is None
    # one key alone: nothing to choose from
    assert stages[0].rows.item() == 1 and stages[0].normalised().size == 1


def test_refusals():
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(InferenceError, match='Linear has neither ResT nor ResTV2'):
        attend_in_network(nn.Linear(1, 1), image, 0, 0)
    with pytest.raises(InferenceError, match='stage 1 has 1 blocks'):
        attend_in_network(tiny('published'), image, 0, 0, block=3)


def test_hooks_are_gone(model_files):
    model = tiny('published').eval()
    attend_in_network(model, torch.rand(1, 3, 32, 32), 0, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpretrain'])
def test_point_of_an_image(model_files, toolbox):
    """A point of the image, and not of the input, which is resized and cropped."""
    inferencer = init_inferencer(*map(str, model_files(toolbox)), device='cpu')
    image = np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8)
    found = attend(inferencer, image, 100, 60)
    # 96x64; of the classifier the 48x48 in its middle
    left, top = (24, 8) if toolbox == 'mmpretrain' else (0, 0)
    assert found.point == (50 - left, 30 - top)
    assert found.view.shape == ((48, 48, 3) if left else (64, 96, 3))
    half = cv2.resize(image, (96, 64), interpolation=cv2.INTER_AREA)
    size = found.view.shape
    assert (found.view == half[top : top + size[0], left : left + size[1]]).all()
    with pytest.raises(InferenceError, match='outside of what the network sees'):
        attend(inferencer, image, *((2, 2) if left else (192, 2)))


def test_tool(call, model_files, write_image, tmp_path):
    image = write_image(tmp_path / 'a.jpg', 50, 90)
    files = model_files('mmdet')
    tool, options = 'analysis_tools/attention_maps.py', ['--out-dir', 'out']
    output = call(tool, image, *files, '--at', 20, 80, *options, cwd=tmp_path)
    assert output.split('\n')[:1] == ['out/stage1.png'] or 'out/stage1.png' in output
    for index, heads in enumerate((1, 2, 3, 4), 1):
        picture = cv2.imread(str(tmp_path / f'out/stage{index}.png'))
        assert picture.std() > 10
        with np.load(tmp_path / 'out/attention.npz') as arrays:
            assert len(arrays[f'stage{index}_rows']) == heads
    (tmp_path / 'text.jpg').write_text('no image')
    for name, message in [('text.jpg', 'is not an image'), (image, 'is not empty')]:
        output = call(
            tool, name, *files, '--at', 0, 0, *options, cwd=tmp_path, fails=True
        )
        assert message in output and 'Traceback' not in output
