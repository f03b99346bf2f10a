"""Finds images, annotations and classes in a user's COCO-format folder."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

TRAIN_WORDS = ('train',)
VAL_WORDS = ('val', 'valid', 'validation', 'test')
HELD_BACK = 0.2  # part of the images kept for evaluation where no split exists
MAX_VAL = 300  # evaluating more than this many images would take longer than training

LAYOUTS = """Accepted layouts (any file and folder names where * stands):
  DIR/annotations/*train*.json + *val*.json   and folders with the images
  DIR/train/*.json + DIR/valid/*.json         with the images beside them
  DIR/*.json                                  one file; a split is made"""


class DataError(ValueError):
    """The folder given with ``--data`` cannot be used; says what is wrong."""


@dataclass(frozen=True)
class Split:
    """Absolute paths of one split: its annotation file and its image folder."""

    ann_file: Path
    img_dir: Path


@dataclass(frozen=True)
class CocoFolder:
    """A data set that is ready to train on.

    Attributes:
        classes (tuple[str]): Names in the order of the annotation file.
        train (Split): Images to learn from.
        val (Split): Images to evaluate on.
        note (str): How the split came about, for the log.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    note: str


def find_coco_data(root, split_dir, seed=0):
    """Detect the layout of a COCO-format folder and check what it holds.

    Args:
        root (str | Path): The user's folder. Nothing is written there.
        split_dir (str | Path): Where the two annotation files go if a split
            has to be made.
        seed (int): Chooses the held-back images then. Default: 0.

    Returns:
        CocoFolder: Paths and classes.

    Raises:
        DataError: Something is missing or inconsistent; the message names it.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f'{root} is not a folder.')
    found = _sort_by_split(root, _annotation_files(root))
    if 'val' in found and 'train' in found:
        train, val = (_read(found[split]) for split in ('train', 'val'))
        classes = _classes(found['train'], train)
        if _category_list(val) != _category_list(train):
            raise DataError(
                f'{found["val"]} lists other categories (or another order) than '
                f'{found["train"]}; both must have the same list.'
            )
        splits = [
            Split(found[split], _image_folder(root, found[split], content))
            for split, content in (('train', train), ('val', val))
        ]
        note = 'train and val as found'
        if len(val['images']) > MAX_VAL:
            note += f', {MAX_VAL} of {len(val["images"])} val images drawn'
            chosen = _shuffled(val['images'], seed)[:MAX_VAL]
            ann_file = _write_part(val, chosen, Path(split_dir) / 'val.json')
            splits[1] = Split(ann_file, splits[1].img_dir)
        return CocoFolder(classes, *splits, note=note)
    path = found.get('all') or found.get('train')
    if path is None:
        raise DataError(
            f'{root} has only a validation file ({found["val"]}), none to train on.'
        )
    content = _read(path)
    classes = _classes(path, content)
    img_dir = _image_folder(root, path, content)
    files, counts = _make_split(content, Path(split_dir), seed)
    note = '{} images to train on, {} held back (split made here)'.format(*counts)
    return CocoFolder(classes, *(Split(f, img_dir) for f in files), note=note)


def _annotation_files(root):
    """JSON files up to two folders deep that look like COCO instances."""
    candidates = sorted(p for d in ('', '*/', '*/*/') for p in root.glob(f'{d}*.json'))
    files = [p for p in candidates if p.is_file() and _looks_like_coco(p)]
    if not files:
        looked = ', '.join(str(p.relative_to(root)) for p in candidates[:5])
        raise DataError(
            f'No COCO annotation file (a JSON with "images", "annotations" and '
            f'"categories") in {root}; JSON files there: {looked or "none"}.\n{LAYOUTS}'
        )
    instances = [p for p in files if 'instances' in p.stem]
    return instances or files


def _looks_like_coco(path):
    """Look for the three keys without parsing a file of hundreds of MB."""
    content = _read(path) if path.stat().st_size < 2**22 else None
    if content is not None:
        return isinstance(content, dict) and {'images', 'categories'} <= set(content)
    return not any(word in path.stem for word in ('captions', 'keypoints', 'stuff'))


def _sort_by_split(root, files):
    """Map 'train', 'val' or 'all' to the one file for it."""
    found = {}
    for path in files:
        split = _split_of(path.relative_to(root))
        if split in found:
            raise DataError(
                f'Two annotation files for "{split}": {found[split]} and {path}. '
                f'Leave one of them.\n{LAYOUTS}'
            )
        found[split] = path
    if 'all' in found and ('train' in found or 'val' in found):
        named = found.get('train') or found.get('val')
        if not ('train' in found and 'val' in found):
            raise DataError(
                f'Cannot tell which split {found["all"]} is beside {named}; put '
                f'"train" and "val" in the names.'
            )
    return found


def _split_of(path):
    words = [path.stem.lower()] + [p.lower() for p in path.parts[:-1][::-1]]
    for word in words:
        train = any(w in word for w in TRAIN_WORDS)
        val = any(w in word for w in VAL_WORDS)
        if train != val:
            return 'train' if train else 'val'
        if train:  # such as trainval.json
            return 'all'
    return 'all'


def _read(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f'{path} is not valid JSON: {error}.') from error


def _category_list(content):
    return [(c.get('id'), c.get('name')) for c in content.get('categories', [])]


def _classes(path, content):
    """Class names, after checking that the file has what a Mask R-CNN needs."""
    for key in ('images', 'annotations', 'categories'):
        if not content.get(key):
            raise DataError(f'{path} has no (or empty) "{key}".')
    names = [name for _, name in _category_list(content)]
    if None in names or len(set(names)) < len(names):
        raise DataError(f'{path}: category names are missing or not unique: {names}.')
    ids = {number for number, _ in _category_list(content)}
    images = {image['id'] for image in content['images']}
    for annotation in content['annotations']:
        label = f'{path}: annotation {annotation.get("id")}'
        missing = {'image_id', 'category_id', 'bbox', 'area'} - set(annotation)
        if missing:
            raise DataError(f'{label} has no {", ".join(sorted(missing))}.')
        if not annotation.get('segmentation'):
            raise DataError(
                f'{label} has no segmentation; a Mask R-CNN needs polygons or RLE.'
            )
        if annotation['category_id'] not in ids:
            raise DataError(
                f'{label} has category_id {annotation["category_id"]}, which is not '
                'among the categories.'
            )
        if annotation['image_id'] not in images:
            raise DataError(
                f'{label} is for image {annotation["image_id"]}, which is not among '
                'the images.'
            )
    return tuple(names)


def _image_folder(root, ann_file, content):
    """The folder from which every ``file_name`` of the file can be reached."""
    folders = [ann_file.parent, root]
    folders += sorted(p for d in ('*', '*/*') for p in root.glob(d) if p.is_dir())
    # Names that say the split come first: train2017 before val2017 for train.
    split = _split_of(ann_file.relative_to(root))
    folders.sort(key=lambda p: split not in p.name.lower())
    names = [image['file_name'] for image in content['images']]
    best, best_missing = None, names
    for folder in folders:
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(best_missing):
            best, best_missing = folder, missing
    if best is None:
        raise DataError(
            f'None of the {len(names)} images of {ann_file} (the first: {names[0]}) '
            f'was found in {root} or its folders.'
        )
    raise DataError(
        f'{len(best_missing)} of {len(names)} images of {ann_file} are not in {best}; '
        f'the first: {best_missing[0]}.'
    )


def _make_split(content, split_dir, seed):
    """Write train.json and val.json with a random part of the images held back."""
    images = _shuffled(content['images'], seed)
    if len(images) < 2:
        raise DataError('A split needs at least 2 images, 1 was found.')
    num_val = min(MAX_VAL, max(1, round(HELD_BACK * len(images))))
    parts = dict(train=images[num_val:], val=images[:num_val])
    files = [
        _write_part(content, part, split_dir / f'{split}.json')
        for split, part in parts.items()
    ]
    return files, (len(parts['train']), num_val)


def _shuffled(images, seed):
    images = sorted(images, key=lambda image: image['id'])
    random.Random(seed).shuffle(images)
    return images


def _write_part(content, images, path):
    """Write ``content`` with only some of its images; returns ``path``."""
    ids = {image['id'] for image in images}
    annotations = [a for a in content['annotations'] if a['image_id'] in ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content, images=images, annotations=annotations)))
    return path
