"""Make class folders for MMPretrain from the objects of data in COCO format.

Each object is cut out, with a margin, to OUT/SPLIT/CLASS/NUMBER.png. Without --images
and --annotations, the demo's fruit is generated and cut out.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fruitset.coco import SPLITS, generate
from PIL import Image

MARGIN = 0.15  # of the box's longer side, on each side
MIN_SIDE = 12  # pixels; smaller boxes are skipped


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='folder to create')
    parser.add_argument('--images', type=Path, help='folder of pictures')
    parser.add_argument('--annotations', type=Path, help='their file in COCO format')
    parser.add_argument(
        '--val-share', type=float, default=0.25, help='of --images held back [0.25]'
    )
    return parser.parse_args()


def cut_out(images: Path, content: dict, folders: dict[int, Path]) -> int:
    """Write the objects of some pictures.

    Args:
        images (Path): Folder of the pictures.
        content (dict): What the annotation file holds.
        folders (dict[int, Path]): For the id of each picture that is to be cut, where
            its objects go.

    Returns:
        int: How many were written.
    """
    names = {category['id']: category['name'] for category in content['categories']}
    files = {image['id']: images / image['file_name'] for image in content['images']}
    count = 0
    for annotation in content['annotations']:
        left, top, width, height = annotation['bbox']
        target = folders.get(annotation['image_id'])
        crowd = annotation.get('iscrowd', 0)
        if target is None or crowd or min(width, height) < MIN_SIDE:
            continue
        # a square around the middle of the box, so that nothing is distorted
        half = max(width, height) * (0.5 + MARGIN)
        x, y = left + width / 2, top + height / 2
        folder = target / names[annotation['category_id']]
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(files[annotation['image_id']]) as picture:
            box = [round(side) for side in (x - half, y - half, x + half, y + half)]
            picture.convert('RGB').crop(box).save(
                folder / f'{annotation["id"]:06d}.png'
            )
        count += 1
    return count


def cut_out_fruit(out: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        root = generate(Path(folder) / 'fruit', num_train=300, num_val=60)
        counts = {}
        for split in SPLITS:
            file = root / 'annotations' / f'instances_{split}.json'
            content = json.loads(file.read_text())
            folders = {image['id']: out / split for image in content['images']}
            counts[split] = cut_out(root / split, content, folders)
    return counts


def cut_out_own(
    out: Path, images: Path, annotations: Path, val_share: float
) -> dict[str, int]:
    content = json.loads(annotations.read_text())
    ids = sorted(image['id'] for image in content['images'])
    num_val = max(1, round(val_share * len(ids)))
    splits = dict(train=ids[:-num_val], val=ids[-num_val:])
    return {
        split: cut_out(images, content, dict.fromkeys(part, out / split))
        for split, part in splits.items()
    }


def main() -> int:
    args = parse_args()
    if (args.images is None) != (args.annotations is None):
        print('error: give --images and --annotations, or neither', file=sys.stderr)
        return 1
    if args.out.exists() and any(args.out.iterdir()):
        print(f'error: {args.out} is not empty; choose another', file=sys.stderr)
        return 1
    if args.images is None:
        counts = cut_out_fruit(args.out)
    else:
        counts = cut_out_own(args.out, args.images, args.annotations, args.val_share)
    print(f'{args.out}: ' + ', '.join(f'{n} in {split}' for split, n in counts.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
