"""Operators of exported programs in both runtimes, against those of PyTorch."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmrest.ops import head_interaction_attention

onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')
openvino = pytest.importorskip('openvino', reason='needs the extra [deploy]')
pytest.importorskip('onnxscript', reason='needs the extra [deploy]')

FREE = torch.export.Dim.DYNAMIC


def export(module, inputs, dims):
    """Both runtimes of a module, as functions of tensors, by name."""
    from torch.fx.experimental import _config as shapes

    from mmrest.deployment.onnx_operators import translations

    with shapes.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(
            module.eval(), inputs, dynamic_shapes=dims, strict=False
        )
    exported = torch.onnx.export(
        program,
        dynamo=True,
        custom_translation_table=translations(),
        verbose=False,
    )
    file = io.BytesIO()
    exported.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    names = [value.name for value in session.get_inputs()]
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(file.getvalue(), b''),
        'CPU',
        {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1},
    )

    def in_onnxruntime(*tensors):
        return session.run(None, dict(zip(names, (t.numpy() for t in tensors))))

    def in_openvino(*tensors):
        found = compiled([t.numpy() for t in tensors])
        return [found[output] for output in compiled.outputs]

    return dict(onnxruntime=in_onnxruntime, openvino=in_openvino)


class Attention(nn.Module):
    def forward(self, q, k, v, weight):
        mixed = head_interaction_attention(q, k, v, weight)
        plain = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return mixed, plain


def test_attention_stores_no_map():
    """Of several tiles, the last one filled up, and of one; other batches."""

    def draw(batch, queries, keys):
        shapes = [(batch, 2, n, 8) for n in (queries, keys, keys)]
        return (*map(torch.randn, shapes), torch.randn(2, 2))

    dims = ({0: FREE, 2: FREE}, {0: FREE, 2: FREE}, {0: FREE, 2: FREE}, None)
    runtimes = export(Attention(), draw(2, 20, 12), dims)
    for inputs in (draw(1, 150, 8300), draw(2, 20, 3), draw(3, 1, 5)):
        exact = Attention()(*(x.double() for x in inputs))
        for name, run in runtimes.items():
            for found, expected in zip(run(*inputs), exact):
                floor = 2e-5 * float(expected.abs().max())
                np.testing.assert_allclose(
                    found, expected, rtol=1e-4, atol=floor, err_msg=name
                )


class Steps(nn.Module):
    def forward(self, image, feature, boxes, scores):
        from mmrest.deployment.operators import nms, paste_masks, pyramid_roi_align

        index = nms(boxes, scores, 0.5, 5)
        boxes = boxes[index]
        levels = torch.arange(boxes.shape[0]) % 2
        roi = pyramid_roi_align([image, feature], boxes, levels, [1.0, 0.5], 4, 0)
        rows = torch.arange(image.shape[2]) + 0.5
        columns = torch.arange(image.shape[3]) + 0.5
        masks = paste_masks(roi[:, 0].sigmoid(), boxes, rows, columns, 0.5)
        return index, roi, masks, F.adaptive_avg_pool2d(image, 3)


def test_steps_of_a_detector():
    """NMS, RoIAlign on levels, masks and pooling, also where no box is left."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    def draw(height, width, count):
        corner, extent = torch.rand(count, 2) * 12, torch.rand(count, 2) * 12 + 2
        boxes = torch.cat([corner, corner + extent], dim=1)
        maps = torch.randn(1, 3, height, width), torch.randn(1, 3, height // 2, width)
        return (*maps, boxes, torch.rand(count))

    dims = ({2: FREE, 3: FREE}, {2: FREE, 3: FREE}, {0: FREE}, {0: FREE})
    runtimes = export(Steps(), draw(20, 32, 9), dims)
    some, few, none = draw(23, 31, 30), draw(40, 26, 1), draw(23, 31, 4)
    none[3].fill_(-1.0)
    for inputs in (some, few, none):
        expected = Steps()(*inputs)
        for name, run in runtimes.items():
            found = run(*inputs)
            np.testing.assert_array_equal(found[0], expected[0], err_msg=name)
            for i in (1, 3):
                np.testing.assert_allclose(
                    found[i], expected[i], rtol=0, atol=1e-5, err_msg=name
                )
            assert found[2].shape == expected[2].shape
            assert (found[2] != expected[2].numpy()).sum() <= 2
    index, roi, masks, _ = Steps()(*some)
    assert len(index) == 5 and masks.any()
    pasted, _ = _do_paste_mask(
        roi[:, :1].sigmoid(), some[2][index], *masks.shape[1:], skip_empty=False
    )
    assert ((pasted >= 0.5) != masks).sum() <= 2
