"""Find images, annotations and classes in a user's folder."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

from conversion import ConversionError, convert, part_of

SPLITS = ('train', 'val', 'test')  # parts of names, such as 'valid' or 'test2017'
HELD_BACK = 0.2  # part of the images for evaluation if there is no split
MAX_VAL = 300  # evaluating more than this many images would take longer than training

LAYOUTS = """Accepted layouts (any file and folder names where * stands):
  DIR/annotations/*train*.json + *val*.json   and folders with the images
  DIR/train/*.json + DIR/valid/*.json         with the images in these folders
  DIR/*.json                                  one file; a split is made
A third split, for testing, is not used if there are train and val.
Annotations in VOC's XML or YOLO's text files are converted (by supervision):
  DIR/Annotations/*.xml + JPEGImages          splits by ImageSets/Main, or made
  DIR/train/*.xml + valid/*.xml               with the images in these folders
  DIR/labels/train + images/train, ...        with data.yaml or classes.txt
  DIR/train/labels + train/images, ...        with data.yaml or classes.txt
Without masks a RetinaNet is trained, with masks a Mask R-CNN."""


class DataError(ValueError):
    """The folder given with ``--data`` cannot be used; says what is wrong."""


class Split(NamedTuple):
    """Absolute paths of one split: its annotation file and its image folder."""

    ann_file: Path
    img_dir: Optional[Path] = None


@dataclass(frozen=True)
class CocoFolder:
    """A data set that is ready to train on.

    Attributes:
        classes (tuple[str]): Names in the order of the annotation file.
        train (Split): Images to learn from.
        val (Split): Images to evaluate on.
        note (str): How the split came about, for the log.
        has_masks (bool): Whether the objects have masks, or only boxes.
    """

    classes: tuple[str, ...]
    train: Split
    val: Split
    note: str
    has_masks: bool = True


def find_data(root, split_dir, seed=0):
    """Detect the layout of a folder and check what it holds.

    Args:
        root (str | Path): The user's folder, in COCO's, VOC's or YOLO's format.
            Nothing is written there.
        split_dir (str | Path): Where annotation files go if a split has to be made or
            another format to be converted.
        seed (int): Chooses the held-back images then. Default: 0.

    Returns:
        CocoFolder: Paths and classes.

    Raises:
        DataError: Something is missing or inconsistent; the message names it.
    """
    root, split_dir = Path(root).expanduser().resolve(), Path(split_dir)
    if not root.is_dir():
        raise DataError(f'{root} is not a folder.')
    found, notes = _find_splits(root, split_dir)
    contents = {name: _read(split.ann_file) for name, split in found.items()}
    for name, (ann_file, img_dir) in found.items():
        img_dir = img_dir or _image_folder(root, ann_file, contents[name])
        found[name] = Split(ann_file, img_dir)
    if 'val' in found:
        train, val = contents['train'], contents['val']
        classes = _classes(found['train'].ann_file, train)
        has_masks = _has_masks(found['train'].ann_file, train)
        if _category_list(val) != _category_list(train):
            raise DataError(
                f'{found["val"].ann_file} lists other categories (or another order) '
                f'than {found["train"].ann_file}; both must have the same list.'
            )
        if _has_masks(found['val'].ann_file, val) != has_masks:
            raise DataError(
                f'one of {found["train"].ann_file} and {found["val"].ann_file} has '
                'masks and the other only boxes; both must have the same.'
            )
        notes.append('train and val as found')
        if len(val['images']) > MAX_VAL:
            notes.append(f'{MAX_VAL} of {len(val["images"])} val images drawn')
            chosen = _shuffled(val['images'], seed)[:MAX_VAL]
            ann_file = _write_part(val, chosen, split_dir / 'val_part.json')
            found['val'] = Split(ann_file, found['val'].img_dir)
    else:
        path, img_dir = found['train'].ann_file, found['train'].img_dir
        classes = _classes(path, contents['train'])
        has_masks = _has_masks(path, contents['train'])
        files, counts = _make_split(contents['train'], split_dir, seed)
        found = {name: Split(file, img_dir) for name, file in zip(SPLITS, files)}
        notes.append(
            '{} images to train on, {} held back (split made here)'.format(*counts)
        )
    note = ', '.join(notes)
    return CocoFolder(classes, found['train'], found['val'], note, has_masks)


def _find_splits(root, split_dir):
    """The files of ``'train'`` and, if there is one, ``'val'``, and notes on them."""
    files = _annotation_files(root)
    if files:
        found, notes = _sort_by_split(root, files), []
    else:
        try:
            converted, note = convert(root, split_dir, _split_of)
        except ConversionError as error:
            raise DataError(str(error)) from error
        if not converted:
            _raise_no_annotations(root)
        found = {name: Split(*paths) for name, paths in converted.items()}
        notes = [note]
    if 'test' in found:
        test = found.pop('test')
        if 'val' in found:
            notes.append(f'test ({test.ann_file.name}) left alone')
        else:
            found['val'] = test
    first = found.get('train') or found.get('all')
    if first is None:
        raise DataError(
            f'{root} has only a validation file ({found["val"].ann_file}), none to '
            'train on.'
        )
    if 'all' in found and ('train' in found) != ('val' in found):
        named = found.get('train') or found.get('val')
        raise DataError(
            f'Cannot tell which split {found["all"].ann_file} is beside '
            f'{named.ann_file}; put "train" and "val" in the names.'
        )
    return {'train': first, **({'val': found['val']} if 'val' in found else {})}, notes


def _annotation_files(root):
    """JSON files up to two folders deep that look like COCO instances."""
    files = [p for p in _json_files(root) if p.is_file() and _looks_like_coco(p)]
    instances = [p for p in files if 'instances' in p.stem]
    return instances or files


def _json_files(root):
    return sorted(p for d in ('', '*/', '*/*/') for p in root.glob(f'{d}*.json'))


def _raise_no_annotations(root):
    looked = ', '.join(str(p.relative_to(root)) for p in _json_files(root)[:5])
    raise DataError(
        'No COCO annotation file (a JSON with "images", "annotations" and '
        f'"categories") in {root}, nor VOC or YOLO files beside images; JSON files '
        f'there: {looked or "none"}.\n{LAYOUTS}'
    )


def _looks_like_coco(path):
    """Look for the three keys without parsing a file of hundreds of MB."""
    content = _read(path) if path.stat().st_size < 2**22 else None
    if content is not None:
        return isinstance(content, dict) and {'images', 'categories'} <= set(content)
    return not any(word in path.stem for word in ('captions', 'keypoints', 'stuff'))


def _sort_by_split(root, files):
    """Map 'train', 'val', 'test' or 'all' to the one file for it."""
    found = {}
    for path in files:
        split = _split_of(path.relative_to(root))
        if split in found:
            raise DataError(
                f'Two annotation files for "{split}": {found[split]} and {path}. '
                f'Leave one of them.\n{LAYOUTS}'
            )
        found[split] = path
    if 'train' in found and 'val' in found:
        found.pop('all', None)
    return {split: Split(path) for split, path in found.items()}


def _split_of(path):
    words = [path.stem.lower()] + [p.lower() for p in path.parts[:-1][::-1]]
    for word in words:
        named = [split for split in SPLITS if split in word]
        if named == ['train', 'val']:  # such as trainval.json
            return 'all'
        if named:
            return named[0]
    return 'all'


def _read(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f'{path} is not valid JSON: {error}.') from error


def _category_list(content):
    return [(c.get('id'), c.get('name')) for c in content.get('categories', [])]


def _classes(path, content):
    """Class names, after checking that the file has what a detector needs."""
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


def _has_masks(path, content):
    """Whether all objects have masks; the alternative is that none has."""
    without = [a for a in content['annotations'] if not a.get('segmentation')]
    if without and len(without) < len(content['annotations']):
        raise DataError(
            f'{path}: annotation {without[0].get("id")} has no segmentation, nor have '
            f'{len(without) - 1} others of {len(content["annotations"])}. Give all of '
            'them polygons or RLE for a Mask R-CNN, or none for a RetinaNet.'
        )
    return not without


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(part_of(content, images)))
    return path
