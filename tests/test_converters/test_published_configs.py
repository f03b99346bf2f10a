"""The _published configs change what the published files need, and only that."""

import pytest
from mmengine.config import Config
from published_form import PUBLISHED

PIXELS = {
    'mean': [103.53, 116.28, 123.675],
    'std': [1.0, 1.0, 1.0],
    'bgr_to_rgb': False,
}


@pytest.mark.parametrize(('kind', 'arch'), PUBLISHED)
def test_differences_from_the_1x_config(kind, arch, repo, published_config):
    config = published_config(kind, arch).to_dict()
    base = Config.fromfile(repo / 'configs' / kind / f'rest_{arch}_fpn_1x.py').to_dict()
    base['model']['data_preprocessor'].update(PIXELS)
    if kind == 'retinanet':
        base['model']['bbox_head']['type'] = 'ClipLastRetinaHead'
        base['model']['bbox_head']['bbox_coder']['clip_border'] = False
        config.pop('custom_imports')
        base.pop('custom_imports')
    assert config == base
    (resize,) = (t for t in config['test_pipeline'] if t['type'] == 'Resize')
    assert resize['backend'] == 'pillow' and resize['scale'] == (1333, 800)
