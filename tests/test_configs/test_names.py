"""A config's name says what its backbone is, and there is one for every size."""

import pytest

ADE = 'ade20k_512x512'
# the rate of dropped paths of each size
SIZES = {
    'rest': dict(lite=0.1, small=0.1, base=0.2, large=0.2),
    'restv2': dict(tiny=0.1, small=0.2, base=0.3),
}
OF_CLASSIFIERS = {
    'rest': dict(lite=0.1, small=0.1, base=0.2, large=0.3),
    'restv2': dict(tiny=0.1, small=0.2, base=0.3, large=0.5),
}
RECIPES = {
    'mask_rcnn': dict.fromkeys(SIZES, ['fpn_1x', 'fpn_3x']),
    'retinanet': dict.fromkeys(SIZES, ['fpn_1x', 'fpn_3x']),
    'semantic_fpn': dict(rest=[f'fpn_80k_{ADE}']),
    'upernet': dict.fromkeys(SIZES, [f'upernet_160k_{ADE}']),
    'imagenet': dict(
        rest=['8xb128_in1k'], restv2=['8xb256_in1k', '8xb64_384_in1k']
    ),
}  # fmt: skip
# the path of a config, and its backbone
BACKBONES = {}
for folder, recipes in RECIPES.items():
    is_classifier = folder == 'imagenet'
    for generation, names in recipes.items():
        rates = (OF_CLASSIFIERS if is_classifier else SIZES)[generation]
        for arch, rate in rates.items():
            backbone = dict(
                type=dict(rest='ResT', restv2='ResTV2')[generation],
                arch=arch,
                out_indices=dict(imagenet=(3,), retinanet=(1, 2, 3)).get(
                    folder, (0, 1, 2, 3)
                ),
                drop_path_rate=rate,
            )
            if is_classifier and generation == 'restv2':
                backbone['out_norm'] = 'final'
            if not is_classifier:
                checkpoint = f'pretrained/{generation}_{arch}.pth'
                backbone['init_cfg'] = dict(type='Pretrained', checkpoint=checkpoint)
                if generation == 'rest':
                    backbone['out_norm'] = 'chain'
            if folder in ('mask_rcnn', 'retinanet'):
                backbone['frozen_stages'] = -1
            for name in names:
                BACKBONES[f'{folder}/{generation}_{arch}_{name}.py'] = backbone


def test_the_list_is_complete(repo):
    found = {
        f'{folder}/{path.name}'
        for folder in RECIPES
        for path in (repo / 'configs' / folder).glob('*.py')
        # the same detectors in other ways
        if not path.stem.endswith(('_published', '_fsdp'))
    }
    assert found == {*BACKBONES}


@pytest.mark.parametrize('name', BACKBONES)
def test_backbone(read, name):
    assert read(name).model.backbone == BACKBONES[name]
