"""Class counts of the heads, and the weights that a run starts from."""

import os.path as osp


def check_class_counts(model, dataset) -> list:
    """Compare every head's ``num_classes`` with the classes of a dataset.

    Args:
        model (dict): Model config.
        dataset (CocoDataset): From :func:`.datasets.find_coco_datasets`.

    Returns:
        list[str]: Findings.
    """
    count = len(dataset.classes)
    wrong = {
        f'{where}.num_classes': part['num_classes']
        for where, part in _dicts(model, 'model')
        # A region proposal head tells objects from background alone.
        if isinstance(part.get('num_classes'), int)
        and 'rpn' not in where
        and not part.get('class_agnostic')
        and part['num_classes'] != count
    }
    if not wrong or not count:
        return []
    fields = ', '.join(f'{field} is {value}' for field, value in wrong.items())
    options = ' '.join(f'{field}={count}' for field in wrong)
    return [
        f'model: {dataset.where} has {count} classes, but {fields}. Set --cfg-options '
        f'{options}, or correct the classes of the dataset.'
    ]


def check_weights(cfg, stage: str) -> list:
    """Check that the files to start from exist, and that nothing random is frozen.

    Args:
        cfg (Config): A config.
        stage (str): ``train`` or ``test``; a test never reads ``init_cfg``.

    Returns:
        list[str]: Findings.
    """
    found = []
    start = cfg.get('load_from')
    if start and not _is_there(start):
        found.append(
            f'load_from: the checkpoint {osp.abspath(start)} does not exist. '
            'Correct the path.'
        )
    if stage != 'train':
        return found
    for where, part in _dicts(cfg.get('model', {}), 'model'):
        checkpoint = (_init_cfg(part) or {}).get('checkpoint')
        if checkpoint and not _is_there(checkpoint):
            found.append(_no_pretrained(where, part, checkpoint))
        random = 'init_cfg' in part and _init_cfg(part) is None
        if random and part.get('frozen_stages', -1) >= 0 and not start:
            found.append(
                f'{where}: frozen_stages={part["frozen_stages"]} freezes layers, but '
                'there are no pretrained weights, so random ones would be frozen. Set '
                f'--cfg-options {where}.frozen_stages=-1, or give init_cfg or '
                'load_from.'
            )
    return found


def _no_pretrained(where, part, checkpoint):
    option = f'--cfg-options {where}.init_cfg=None'
    if part.get('frozen_stages', -1) >= 0:
        option += f' {where}.frozen_stages=-1'
    text = (
        f'{where}.init_cfg: the pretrained weights {osp.abspath(checkpoint)} do not '
        'exist. '
    )
    if part.get('type') == 'ResT':
        text += (
            "The ImageNet weights are linked in the README of the ResT authors' "
            'repository, https://github.com/wofmanaf/ResT; save the file for '
            f'arch={part.get("arch")!r} there, no conversion is needed. '
        )
    return text + (
        f'Or name another file: --cfg-options {where}.init_cfg.checkpoint=PATH. To '
        f'train from scratch (far lower accuracy on the same schedule): {option}.'
    )


def _init_cfg(part):
    init = part.get('init_cfg')
    return init if isinstance(init, dict) and init.get('type') == 'Pretrained' else None


def _is_there(path):
    return '://' in path or osp.isfile(path)


def _dicts(part, where):
    """Every dict within a config, with its place."""
    if isinstance(part, dict):
        yield where, part
        for key, value in part.items():
            yield from _dicts(value, f'{where}.{key}')
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield from _dicts(value, f'{where}.{index}')
