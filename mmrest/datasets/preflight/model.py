"""Check channels and class counts, and the weights from which a run starts."""

import os.path as osp
from collections.abc import Iterator
from typing import Any, Union

import torch
from mmengine.registry import MODELS
from torch.random import fork_rng

from ...checkpoint import CheckpointError, read_checkpoint
from ...checkpoint.state_dict import find_state_dict
from ...models import ResT, ResTV2
from ...utils.config_types import find_type, type_name
from ...utils.text import shorten
from ...weights import advise
from .coco import CocoDataset
from .reading import bases, walk
from .segmentation import SegDataset

# Heads that do not learn the classes of the dataset, but pixels of another label set or
# boundaries
OTHER_HEADS = {'FusedSemanticHead', 'SCNetSemanticHead', 'STDCHead'}

# Necks that keep the channels, and do not state them
POOLING_NECKS = {'GlobalAveragePooling', 'GeneralizedMeanPooling'}
HEADS = ('head', 'decode_head', 'rpn_head')
CHANNELS = (int, list, tuple)


def check_backbones(model: Any) -> Iterator[str]:
    """Check the options of each ResT, and the channels that the next part states."""
    for where, part, cfg in _backbones(model):
        options = {k: v for k, v in cfg.items() if k not in ('init_cfg', 'pretrained')}
        try:
            backbone = _build(options)
        except (TypeError, ValueError) as error:
            yield f'{where}.backbone: {error}.'
            continue
        dims = [backbone.arch.embed_dims[i] for i in backbone.out_indices]
        for name, taker in _takers(part, where):
            yield from _check_channels(name, taker, f'{where}.backbone', dims)


def check_unused_maps(cfg: Any) -> Iterator[str]:
    """Find output norms without gradients, at which DistributedDataParallel stops.

    A neck with ``start_level`` leaves out the first maps. With ``out_norm='chain'``,
    the next stage takes them.
    """
    wrapper = cfg.get('model_wrapper_cfg')
    # MMEngine reads find_unused_parameters from one of the two
    prefix, ddp = ('', cfg) if wrapper is None else ('model_wrapper_cfg.', wrapper)
    if (
        cfg.get('launcher', 'none') == 'none'
        or ddp.get('find_unused_parameters')
        or (wrapper or {}).get('static_graph')  # it allows for unused parameters
        or type_name(wrapper or {}) not in ('', 'MMDistributedDataParallel')
        or cfg.get('strategy')
    ):
        return
    for where, part, options in _backbones(cfg.get('model') or {}):
        name, neck = _first_neck(part)
        start, channels = neck.get('start_level'), neck.get('in_channels')
        maps = options.get('out_indices', tuple(range(4)))
        branches = find_type(options, MODELS) is ResTV2 or (
            options.get('out_norm') == 'branch'
        )
        if not branches or not isinstance(start, int) or start <= 0:
            continue
        if not isinstance(maps, (list, tuple)):  # check_backbones names it
            continue
        changes = [f'{where}.backbone.out_indices={_as_option(list(maps)[start:])}']
        if isinstance(channels, (list, tuple)):
            kept = list(channels)[start:]
            changes.append(f'{where}.{name}.in_channels={_as_option(kept)}')
        yield (
            f'{where}.{name}.start_level={start} leaves out maps of '
            f'{where}.backbone, whose norms then have no gradient. '
            'DistributedDataParallel would stop in the second step. Set '
            f'--cfg-options {" ".join(changes)} {where}.{name}.start_level=0, or '
            f'{prefix}find_unused_parameters=True.'
        )


def _backbones(model: Any) -> Iterator[tuple[str, dict, dict]]:
    """Yield each part with a ResT, its place, and the config of the ResT."""
    for where, part in walk(model, 'model'):
        cfg: Any = part.get('backbone')
        # a subclass may return other maps
        if isinstance(cfg, dict) and find_type(cfg, MODELS) in (ResT, ResTV2):
            yield where, part, cfg


def _first_neck(model: dict) -> tuple[str, dict]:
    """Return the key and the config of the neck, or of the first in a list."""
    neck, name = model.get('neck'), 'neck'
    if isinstance(neck, (list, tuple)) and neck:
        neck, name = neck[0], 'neck.0'
    return name, neck if isinstance(neck, dict) else {}


def _as_option(values: Any) -> str:
    return str(values).replace(' ', '')


def _check_channels(
    where: str, taker: dict, backbone: str, dims: list[int]
) -> Iterator[str]:
    """Compare the channels that a part states with those of the maps that it takes."""
    stated, index = taker['in_channels'], taker.get('in_index')
    if isinstance(stated, int):
        chosen = index if isinstance(index, int) else -1
        if not -len(dims) <= chosen < len(dims):
            yield (
                f'{where}.in_index is {chosen}, but {backbone} returns {len(dims)} '
                f'maps. Set --cfg-options {where}.in_index=-1, or correct '
                'out_indices of the backbone.'
            )
            return
        given: Any = dims[chosen]
        # some necks take the first map
        fits = stated == given or ('in_index' not in taker and stated == dims[0])
        found = f'map of {backbone} that it takes has {given} channels'
    else:
        indices = index if isinstance(index, (list, tuple)) else range(len(dims))
        given = [dims[i] for i in indices if i < len(dims)]
        # YOLOV3Neck has them in reverse
        fits = sorted(map(str, given)) == sorted(map(str, stated))
        found = f'maps of {backbone} that it takes have {shorten(given)} channels'
    if not fits:
        option = f'{where}.in_channels={_as_option(given)}'
        if isinstance(stated, tuple):  # some necks insist on the type
            option = f'"{where}.in_channels={_as_option(tuple(given))}"'
        yield (
            f'{where}.in_channels is {stated}, but the {found}. Set --cfg-options '
            f'{option}, or correct the backbone.'
        )


def _build(cfg: dict) -> Any:
    """Build a part without memory, unless that fails."""
    try:
        with torch.device('meta'):
            return MODELS.build(dict(cfg))
    except Exception:  # parts of the user may read values
        with fork_rng():
            return MODELS.build(dict(cfg))


def _takers(model: dict, where: str) -> Iterator[tuple[str, dict]]:
    """The parts that take maps of the backbone and state their channels."""
    name, neck = _first_neck(model)
    if neck and type_name(neck) not in POOLING_NECKS:
        if isinstance(neck.get('in_channels'), CHANNELS):
            yield f'{where}.{name}', neck
        return
    for key, value in model.items():
        outer = f'{where}.{key}'
        for place, part in walk(value, outer):
            channels = part.get('in_channels')
            # mmseg's heads choose maps; by default these take the last one
            takes = 'in_index' in part or (
                place == outer and (key in HEADS or not isinstance(channels, int))
            )
            if takes and key != 'backbone' and isinstance(channels, CHANNELS):
                yield place, part


def check_class_counts(
    model: Any, dataset: Union[CocoDataset, SegDataset]
) -> Iterator[str]:
    """Compare ``num_classes`` of all heads with the classes of a dataset."""
    classes, things = len(dataset.classes), len(dataset.things)
    if not classes or model.get('language_model'):  # its classes are words
        return
    wrong, right = [], []
    for where, part in walk(model, 'model'):
        if (
            'rpn' in where  # without classes
            or part.get('class_agnostic')
            or part.get('contrastive_cfg')  # its classes are words
            or OTHER_HEADS & {type_name(part), *bases(part, MODELS)}
        ):
            continue
        expected = dict(num_classes=things)
        if isinstance(part.get('num_things_classes'), int):
            stuff = classes - things
            expected = dict(num_things_classes=things, num_stuff_classes=stuff)
        for field, count in expected.items():
            if isinstance(part.get(field), int) and part[field] != count:
                wrong.append(f'{where}.{field} is {part[field]}')
                right.append(f'{where}.{field}={count}')
    if wrong:
        yield (
            f'model: {dataset.where} has {classes} classes, but {", ".join(wrong)}. '
            f'Set --cfg-options {" ".join(right)}, or correct the classes of the '
            'dataset.'
        )


def check_weights(cfg: Any, stage: str) -> Iterator[str]:
    """Check that pretrained weights exist, and that no random ones are frozen."""
    start = cfg.get('load_from')
    if start and not _is_there(start):
        yield (
            f'load_from: the checkpoint {_in_full(start)} does not exist. '
            'Correct the path.'
        )
    if stage != 'train' or cfg.get('resume'):
        return
    for where, part in walk(cfg.get('model') or {}, 'model'):
        checkpoint = _pretrained(part)
        freezes = part.get('frozen_stages') not in (None, -1)
        if checkpoint and not _is_there(checkpoint):
            advice = advise(checkpoint)
            if not advice and type_name(part) in ('ResT', 'ResTV2'):
                advice = '`python -m mmrest.weights --list` names the published ones.'
            advice += ' ' if advice else ''
            unfreeze = f' {where}.frozen_stages=-1' if freezes else ''
            yield (
                f'{where}.init_cfg: the pretrained weights {_in_full(checkpoint)} '
                f'do not exist. {advice}Or name another file: --cfg-options '
                f'{where}.init_cfg.checkpoint=PATH. To train from scratch (far lower '
                'accuracy on the same schedule): --cfg-options '
                f'{where}.init_cfg=None{unfreeze}.'
            )
        elif checkpoint and where == 'model' and 'prefix' not in part['init_cfg']:
            yield from _check_level(part, checkpoint)
        random = 'init_cfg' in part and not checkpoint and not part.get('pretrained')
        if random and freezes and not start:
            yield (
                f'{where}: frozen_stages={part["frozen_stages"]} freezes layers, but '
                'there are no pretrained weights, so random ones would be frozen. Set '
                f'--cfg-options {where}.frozen_stages=-1, or give init_cfg or '
                'load_from.'
            )


def _check_level(model: dict, path: str) -> Iterator[str]:
    """Find weights of the backbone that are used for the whole model."""
    parts = [
        key for key, part in model.items() if part and isinstance(part, (dict, list))
    ]
    if '://' in path or 'ImageClassifier' in bases(model, MODELS):
        return  # an ImageClassifier accepts the published form
    try:
        names = list(find_state_dict(read_checkpoint(path), path).tensors)
    except CheckpointError:
        return  # the loader reports the problem
    starts = {name.removeprefix('module.').partition('.')[0] for name in names}
    if not starts & set(parts):
        yield (
            f'model.init_cfg: {path} holds {shorten(names, 3)}, none of which belongs '
            f'to a part of the model ({", ".join(parts)}), so nothing would be loaded. '
            "If they are the backbone's, name the file there: --cfg-options "
            'model.init_cfg=None model.backbone.init_cfg.type=Pretrained '
            f'model.backbone.init_cfg.checkpoint={path}.'
        )


def _pretrained(part: dict) -> str:
    """The file of ``init_cfg=dict(type='Pretrained', ...)``, alone or in a list."""
    init = part.get('init_cfg')
    for item in init if isinstance(init, (list, tuple)) else [init]:
        named = type_name(item) in ('Pretrained', 'PretrainedInit')
        if named and isinstance(item, dict):
            return str(item.get('checkpoint') or '')
    return ''


def _in_full(path: str) -> str:
    return osp.abspath(osp.expanduser(path))


def _is_there(path: str) -> bool:
    # a sharded checkpoint is a folder; the loaders take ~ as well
    return '://' in path or osp.exists(osp.expanduser(path))
