"""Boxes in VOC's XML or YOLO's text files as COCO files, converted by supervision."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
NAMES_FILES = ('data.yaml', 'dataset.yaml', 'classes.txt')


class ConversionError(ValueError):
    """Files of VOC's or YOLO's kind that cannot be read."""


def convert(
    root: Path, out_dir: Path, split_of: Callable[[Path], str]
) -> tuple[dict[str, tuple[Path, Path]], str]:
    """Convert the annotations of a folder, if they are VOC's or YOLO's.

    Args:
        root (Path): The user's folder. Nothing is written there.
        out_dir (Path): Where the COCO files go.
        split_of (callable): Tells ``'train'``, ``'val'``, ``'test'`` or ``'all'`` from
            a relative path.

    Returns:
        tuple[dict[str, tuple[Path, Path]], str]: For each split its COCO file and its
        images' folder, and a note that names format and library; nothing and an empty
        note if the folder holds no such files.

    Raises:
        ConversionError: If the files cannot be read, or supervision is missing.
    """
    xml_dirs, txt_dirs = _folders(root, '.xml'), _label_folders(root)
    if not xml_dirs and not txt_dirs:
        return {}, ''
    kind = 'VOC XML' if xml_dirs else 'YOLO text'
    try:
        import supervision
    except ImportError as error:
        raise ConversionError(
            f'{root} holds {kind}, which supervision converts. It is not installed: '
            'pip install supervision'
        ) from error
    names_file = None if xml_dirs else _names_file(root, out_dir)
    contents: dict[str, tuple[dict, Path]] = {}
    for folder in xml_dirs or txt_dirs:
        images = _image_folder(root, folder)
        if names_file is None:
            dataset = _read(
                supervision.DetectionDataset.from_pascal_voc, images, folder
            )
        else:
            dataset = _read(
                supervision.DetectionDataset.from_yolo, images, folder, str(names_file)
            )
        content = _to_coco(dataset, out_dir)
        for split, part in _parts(root, folder, content, split_of):
            if split in contents:
                raise ConversionError(
                    f'two folders of annotations for "{split}" in {root}, one of them '
                    f'{folder}; leave one.'
                )
            contents[split] = part, images
    _unite_categories([content for content, _ in contents.values()])
    found = {}
    for split, (content, images) in contents.items():
        path = out_dir / f'{split}.json'
        path.write_text(json.dumps(content))
        found[split] = path, images
    return found, f'{kind}, converted by supervision {supervision.__version__}'


def _folders(root: Path, suffix: str) -> list[Path]:
    """Folders with such files, up to three levels deep."""
    patterns = [f'{"*/" * depth}*{suffix}' for depth in range(4)]
    return sorted({path.parent for pattern in patterns for path in root.glob(pattern)})


def _label_folders(root: Path) -> list[Path]:
    """Folders whose text files have the names of images."""
    return [
        folder
        for folder in _folders(root, '.txt')
        if {path.stem for path in folder.glob('*.txt')}
        & {path.stem for path in _images(_image_folder(root, folder))}
    ]


def _images(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]


def _image_folder(root: Path, folder: Path) -> Path:
    """The folder of the images that annotations in another one are of."""
    parts = folder.relative_to(root).parts
    candidates = [folder]
    for index, part in enumerate(parts):
        if part.lower() in ('annotations', 'labels', 'xmls'):
            candidates += [
                root.joinpath(*parts[:index], name, *parts[index + 1 :])
                for name in ('images', 'JPEGImages', 'Images', 'imgs')
            ]
    candidates += [folder.parent, root / 'images']
    with_images = [path for path in candidates if path.is_dir() and _images(path)]
    return with_images[0] if with_images else folder


def _names_file(root: Path, out_dir: Path) -> Path:
    """YOLO's YAML file with the names of the classes."""
    for name in NAMES_FILES:
        for path in [root / name, *sorted(root.glob(f'*/{name}'))]:
            if not path.is_file():
                continue
            if path.suffix == '.yaml':
                return path
            names = [line.strip() for line in path.read_text().splitlines()]
            written = out_dir / 'data.yaml'
            out_dir.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps(dict(names=[n for n in names if n])))
            return written  # JSON is YAML
    raise ConversionError(
        f'{root} has YOLO text files, and no {" or ".join(NAMES_FILES)} with the names '
        'of the classes.'
    )


def _read(read: Callable[..., Any], images: Path, folder: Path, *args: str) -> Any:
    if not _images(images):
        raise ConversionError(f'the images of {folder} were not found.')
    try:
        return read(str(images), str(folder), *args)
    # what its readers raise for files of another form
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError) as error:
        raise ConversionError(f'{folder} cannot be read: {error}') from error


def _to_coco(dataset: Any, out_dir: Path) -> dict:
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / 'converted.json'
    dataset.as_coco(annotations_path=str(path))
    content = json.loads(path.read_text())
    path.unlink()
    return content


def _parts(
    root: Path, folder: Path, content: dict, split_of: Callable[[Path], str]
) -> list[tuple[str, dict]]:
    """The splits of VOC's lists in ``ImageSets/Main``, or the one of the folder."""
    lists = folder.parent / 'ImageSets' / 'Main'
    parts = []
    for split in ('train', 'val', 'test'):
        if (lists / f'{split}.txt').is_file():
            lines = (lists / f'{split}.txt').read_text().splitlines()
            stems = {line.split()[0] for line in lines if line.strip()}
            images = [
                i for i in content['images'] if Path(i['file_name']).stem in stems
            ]
            if images:
                parts.append((split, part_of(content, images)))
    return parts or [(split_of(folder.relative_to(root) / 'x'), content)]


def part_of(content: dict, images: list[dict]) -> dict:
    """A COCO file's content with only some of its images."""
    ids = {image['id'] for image in images}
    annotations = [a for a in content['annotations'] if a['image_id'] in ids]
    return dict(content, images=images, annotations=annotations)


def _unite_categories(contents: list[dict]) -> None:
    """Give all splits the same list of classes; VOC's files have none."""
    names = {c['name']: None for content in contents for c in content['categories']}
    ids = {name: number for number, name in enumerate(names, 1)}
    for content in contents:
        new = {c['id']: ids[c['name']] for c in content['categories']}
        for annotation in content['annotations']:
            annotation['category_id'] = new[annotation['category_id']]
        content['categories'] = [dict(id=n, name=name) for name, n in ids.items()]
