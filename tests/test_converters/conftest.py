"""Checkpoints in the published form, and the models they become."""

import json

import pytest
import torch
from mmengine.config import Config
from published_form import empty
from weights_rule import fill


@pytest.fixture(scope='session')
def detector_shapes(data_dir):
    """Keys and shapes of the four published detectors, by 'kind_rest_arch'."""
    return json.loads((data_dir / 'detectron2_checkpoint_keys.json').read_text())


@pytest.fixture(scope='session')
def published(detector_shapes, data_dir):
    """Make the state dict of a published detector: published(kind, arch)."""
    gains = json.loads((data_dir / 'detector_gains.json').read_text())
    made = {}

    def make(kind, arch):
        if (kind, arch) not in made:
            shapes = detector_shapes[f'{kind}_rest_{arch}']
            made[kind, arch] = fill(empty(shapes), gains[kind])
        return dict(made[kind, arch])

    return make


@pytest.fixture(scope='session')
def published_config(repo):
    """Read a _published config: published_config(kind, arch)."""

    def read(kind, arch):
        return Config.fromfile(
            repo / 'configs' / kind / f'rest_{arch}_fpn_1x_published.py'
        )

    return read


@pytest.fixture(scope='session')
def native(published, published_config):
    """Build mmdet's model with converted weights: native(kind, arch)."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmrest.converters import to_mmdet

    def build(kind, arch):
        register_all_modules(init_default_scope=True)  # a tool's run forgets it
        model = MODELS.build(published_config(kind, arch).model)
        weights = to_mmdet(published(kind, arch)).state_dict
        model.load_state_dict(weights, strict=True)
        return model.eval()

    return build


@pytest.fixture(scope='session')
def detect():
    """Run an mmdet model on an image as it is: detect(model, image).

    Gives the features of the FPN and the detections.
    """

    @torch.no_grad()
    def run(model, image):
        from mmdet.structures import DetDataSample

        size = image.shape[:2]
        sample = DetDataSample(
            metainfo={
                'img_shape': size,
                'ori_shape': size,
                'scale_factor': (1.0, 1.0),
            }
        )
        inputs = torch.from_numpy(image).permute(2, 0, 1)
        data = model.data_preprocessor(
            {'inputs': [inputs], 'data_samples': [sample]}, False
        )
        features = model.extract_feat(data['inputs'])
        result = model.predict(data['inputs'], data['data_samples'], rescale=True)
        return features, result[0].pred_instances

    return run
