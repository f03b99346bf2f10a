"""Write a data set as large as COCO's train2017 and time the check of it.

``python tests/test_datasets/large_files.py FOLDER [SHARE]`` prints seconds and
gigabytes; SHARE is a part of that size.
"""

import json
import random
import re
import sys
import time
from pathlib import Path

from mmengine.config import Config
from PIL import Image

SHARE = float(sys.argv[2]) if len(sys.argv) > 2 else 1
IMAGES, OBJECTS, CLASSES = int(118_000 * SHARE), int(860_000 * SHARE), 80
NAMES = tuple(f'class {n}' for n in range(CLASSES))


def polygons(count=997):
    """As texts, of 20 to 100 numbers as COCO's."""
    draw = random.Random(0)
    for _ in range(count):
        numbers = [
            round(draw.uniform(0, 480), 2) for _ in range(draw.randint(10, 50) * 2)
        ]
        yield json.dumps([numbers])


def write_annotations(path: Path) -> None:
    """118,000 images, 860,000 objects, every 86th of them a crowd."""
    texts = list(polygons())
    crowd = json.dumps(dict(size=[480, 640], counts=[0, 640 * 480]))
    with open(path, 'w') as file:
        images = (
            f'{{"id": {n}, "file_name": "{n:012}.jpg", "width": 640, "height": 480}}'
            for n in range(IMAGES)
        )
        file.write(f'{{"images": [{",".join(images)}], "annotations": [')
        for n in range(OBJECTS):
            mask = texts[n % len(texts)] if n % 86 else crowd
            file.write(
                f'{"," * bool(n)}{{"id": {n + 1}, "image_id": {n % IMAGES}, '
                f'"category_id": {n % CLASSES}, "iscrowd": {int(n % 86 == 0)}, '
                f'"bbox": [{n % 300}.5, {n % 200}.25, {20 + n % 99}.75, 30.5], '
                f'"area": {500 + n % 999}.5, "segmentation": {mask}}}'
            )
        categories = [dict(id=n, name=name) for n, name in enumerate(NAMES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def write_images(folder: Path) -> None:
    folder.mkdir()
    first = folder / f'{0:012}.jpg'
    Image.new('RGB', (640, 480)).save(first)
    for n in range(1, IMAGES):
        (folder / f'{n:012}.jpg').symlink_to(first.name)  # links have a limit


def write_dataset(root: Path) -> Config:
    """A folder, and the config of a data set of instances in it."""
    root.mkdir(parents=True, exist_ok=True)
    write_annotations(root / 'train.json')
    write_images(root / 'images')
    steps = [dict(type='mmdet.LoadAnnotations', with_mask=True)]
    dataset = dict(
        type='mmdet.CocoDataset',
        data_root=str(root),
        ann_file='train.json',
        data_prefix=dict(img='images'),
        metainfo=dict(classes=NAMES),
        pipeline=[dict(type='LoadImageFromFile'), *steps],
    )
    return Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))


def peak_memory() -> float:
    """In GB. getrusage would count what the starting process held before."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 1e6


def main() -> None:
    from mmrest.datasets.preflight import check_config

    cfg = write_dataset(Path(sys.argv[1]))
    start, cpu = time.perf_counter(), time.process_time()
    print(check_config(cfg)[-1][1])
    print(
        f'{time.perf_counter() - start:.1f} s by the clock, '
        f'{time.process_time() - cpu:.1f} s of CPU time, '
        f'{peak_memory():.2f} GB'
    )


if __name__ == '__main__':
    main()
