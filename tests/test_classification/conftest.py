"""Class folders, a config for them as a user writes one, and published files."""

import numpy as np
import pytest
import torch
from PIL import Image
from weights_rule import fill

CLASSES = ('blue', 'green', 'grey', 'red', 'striped', 'white')

CONFIG = """
_base_ = 'mmrest::imagenet/rest_lite_8xb128_in1k.py'

classes = {classes!r}
model = dict(
    data_preprocessor=dict(num_classes=6),
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[8, 16, 24, 32],
            num_heads=[1, 2, 3, 4],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=2,
        ),
    ),
    head=dict(num_classes=6, in_channels=32),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={root!r}, metainfo=dict(classes=classes)),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={root!r}, metainfo=dict(classes=classes)),
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""


def picture(name, rng):
    """A noisy picture of 60x80 pixels in the colour of its class."""
    colours = dict(blue=(0, 0, 200), green=(0, 160, 0), grey=(128,) * 3)
    colours.update(red=(200, 0, 0), striped=(90,) * 3, white=(230,) * 3)
    pixels = np.full((60, 80, 3), colours[name], dtype=np.int64)
    if name == 'striped':
        pixels[:, ::8] = 250
    pixels += rng.integers(-20, 21, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope='session')
def class_folders(tmp_path_factory):
    """A folder with config.py, train/<class>/*.png and val/<class>/*.png."""
    root = tmp_path_factory.mktemp('class_folders')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(name, rng).save(folder / f'{i}.png')
    text = CONFIG.format(classes=CLASSES, root=str(root))
    (root / 'config.py').write_text(text)
    return root


@pytest.fixture(scope='session')
def published_lite(published_shapes, tmp_path_factory):
    """Write the published ResT-Lite, filled by the rule, in a published form."""
    shapes = published_shapes['rest_lite']
    dtypes = {k: torch.long if 'tracked' in k else torch.float for k in shapes}
    state = fill({k: torch.zeros(s, dtype=dtypes[k]) for k, s in shapes.items()})

    def write(wrapper=None, prefix=''):
        tensors = {f'{prefix}{key}': tensor for key, tensor in state.items()}
        path = tmp_path_factory.mktemp('published') / 'rest_lite.pth'
        torch.save({wrapper: tensors} if wrapper else tensors, path)
        return str(path)

    return write
