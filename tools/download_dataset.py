"""Download COCO 2017 into data/coco, or check what is there (``--check``).

A download that was interrupted goes on where it stopped, files that are there
already are kept, and the result is checked at the end. 20 GB to download and as
much again to unpack, less with --delete.
"""

import argparse
import http.client
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from mmengine.config import Config

from mmrest.config import find_config
from mmrest.datasets.preflight import PreflightError, check_data, log_report
from mmrest.utils.disk import explain_unwritable

SERVER = 'http://images.cocodataset.org'
ARCHIVES = dict(
    annotations='annotations/annotations_trainval2017.zip',
    val='zips/val2017.zip',
    train='zips/train2017.zip',
)
CONFIG = 'mask_rcnn/rest_small_fpn_1x.py'
CHUNK = 1 << 20


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--save-dir', type=Path, default=Path('data/coco'), help='[data/coco]'
    )
    parser.add_argument(
        '--parts', nargs='+', choices=ARCHIVES, default=list(ARCHIVES), help='[all]'
    )
    parser.add_argument(
        '--delete', action='store_true', help='delete each archive once unpacked'
    )
    parser.add_argument(
        '--check', action='store_true', help='download nothing, say what is missing'
    )
    parser.add_argument('--server', default=SERVER, help=f'a mirror of [{SERVER}]')
    return parser.parse_args()


def download(url: str, path: Path) -> None:
    """Fetch a file; what an earlier attempt left in ``*.part`` is kept."""
    part = path.with_name(path.name + '.part')
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'})
    try:
        with urllib.request.urlopen(request) as answer:
            if answer.status != 206:  # the server sends the file from its start
                done = 0
            length = answer.headers['Content-Length']
            if length is None:
                sys.exit(f'{url}: the server does not state the size. Try --server.')
            total = done + int(length)
            need_room(path.parent, total - done)
            with open(part, 'ab' if done else 'wb') as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    show(f'{path.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB')
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing left to fetch
            sys.exit(f'{url}: the server answers {error}. Try --server with a mirror.')
        total = done
    except (OSError, http.client.HTTPException) as error:
        sys.exit(
            f'{url}: the download broke off ({error}). Check the connection and run '
            'the same command again; it goes on from where it stopped.'
        )
    if done != total:
        sys.exit(
            f'{url}: {done} of {total} bytes came. Run the same command again; it '
            'goes on from where it stopped.'
        )
    part.rename(path)
    print()


def unpack(path: Path, folder: Path) -> None:
    """Unpack what is not there yet; each file appears whole or not at all."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if not item.is_dir()]
            missing = [item for item in members if not is_unpacked(item, folder)]
            need_room(folder, sum(item.file_size for item in missing))
            for count, item in enumerate(missing, 1):
                unpack_one(archive, item, folder)
                if count % 100 == 0 or count == len(missing):
                    show(f'{path.name}: unpacked {count} of {len(missing)}')
    except (zipfile.BadZipFile, EOFError) as error:
        sys.exit(f'{path} is damaged ({error}). Delete it and download it again.')
    print()


def is_unpacked(item: zipfile.ZipInfo, folder: Path) -> bool:
    target = folder / item.filename
    if not target.exists():
        return False
    if target.stat().st_size != item.file_size:
        sys.exit(
            f'{target} has {target.stat().st_size} bytes, in the archive it has '
            f'{item.file_size}. It is not overwritten; move it away if it is damaged.'
        )
    return True


def unpack_one(archive: zipfile.ZipFile, item: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / item.filename
    if folder.resolve() not in target.resolve().parents:
        sys.exit(f'{archive.filename} names a file outside {folder}: {item.filename}.')
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + '.part')
    with archive.open(item) as source, open(part, 'wb') as copy:
        shutil.copyfileobj(source, copy)
    part.rename(target)


def need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        sys.exit(
            f'{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed. '
            'Make room, or choose another disk with --save-dir.'
        )


def show(text: str) -> None:
    print(f'\r{text}', end='', flush=True)


def what_is_missing(folder: Path) -> str:
    """Compare a folder with the configs' data; an empty text means complete."""
    cfg = Config.fromfile(find_config(CONFIG))
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(folder)
    cfg.val_evaluator.ann_file = str(folder / 'annotations/instances_val2017.json')
    try:
        log_report(check_data(cfg))
    except PreflightError as error:
        return str(error)
    return ''


def main():
    args = parse_args()
    missing = what_is_missing(args.save_dir)
    if missing and not args.check:
        problem = explain_unwritable(str(args.save_dir))
        if problem:
            sys.exit(f'--save-dir: {problem} Choose another folder.')
        args.save_dir.mkdir(parents=True, exist_ok=True)
        for part in args.parts:
            archive = args.save_dir / Path(ARCHIVES[part]).name
            if not archive.exists():
                download(f'{args.server}/{ARCHIVES[part]}', archive)
            unpack(archive, args.save_dir)
            if args.delete:
                archive.unlink()
        missing = what_is_missing(args.save_dir)
    if missing:
        sys.exit(f'{args.save_dir} is not complete. {missing}')
    print(f'{args.save_dir} is complete.')


if __name__ == '__main__':
    main()
