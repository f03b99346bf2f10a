"""tools/download_dataset.py against a server on this machine."""

import http.server
import io
import json
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image


def coco_archives():
    """COCO's three archives with one image each."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO['classes']
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    polygon = [1, 1, 9, 1, 9, 9, 1, 9]
    objects = [
        dict(
            id=1,
            image_id=1,
            category_id=1,
            bbox=[1, 1, 8, 8],
            area=64,
            segmentation=[polygon],
            iscrowd=0,
        )
    ]
    image = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image, 'JPEG')
    archives, lists = {}, {}
    for split in ('train2017', 'val2017'):
        lists[f'annotations/instances_{split}.json'] = json.dumps(
            dict(
                images=[dict(id=1, file_name='1.jpg', width=16, height=16)],
                annotations=objects,
                categories=categories,
            )
        )
        archives[f'/zips/{split}.zip'] = pack({f'{split}/1.jpg': image.getvalue()})
    archives['/annotations/annotations_trainval2017.zip'] = pack(lists)
    return archives


def pack(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; ``cut`` ends the next answer after that many bytes."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.cut, self.asked = coco_archives(), None, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        self.server.asked.append((self.path, start))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        end, self.server.cut = self.server.cut, None
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(call, server, tmp_path):
    def fetch_with(*options, **kwargs):
        address = f'http://127.0.0.1:{server.server_port}'
        options = ('--server', address, *options)
        return call('download_dataset.py', *options, cwd=tmp_path, **kwargs)

    return fetch_with


def test_fetches_goes_on_after_a_break_and_keeps_what_is_there(fetch, server, tmp_path):
    archive = '/annotations/annotations_trainval2017.zip'
    server.cut = 500
    output = fetch(fails=True)
    assert f'500 of {len(server.files[archive])} bytes came' in output

    output = fetch('--delete')
    assert server.asked[:2] == [(archive, 0), (archive, 500)]
    assert 'data/coco is complete.' in output
    files = {p.relative_to(tmp_path / 'data/coco') for p in tmp_path.rglob('*.*')}
    assert {str(path) for path in files} == {
        'annotations/instances_train2017.json',
        'annotations/instances_val2017.json',
        'train2017/1.jpg',
        'val2017/1.jpg',
    }

    asked = len(server.asked)
    fetch()  # nothing is left to do, though the archives are gone
    assert len(server.asked) == asked


def test_check_says_what_is_missing(fetch, server):
    output = fetch('--check', fails=True)
    assert not server.asked
    assert 'data/coco is not complete. 2 problems' in output
    assert 'instances_train2017.json does not exist' in output


def test_damaged_archive_and_users_file(fetch, server, tmp_path):
    good = server.files['/zips/val2017.zip']
    server.files['/zips/val2017.zip'] = good[:-30]
    output = fetch('--parts', 'val', fails=True)
    assert 'val2017.zip is damaged' in output and 'Traceback' not in output

    (tmp_path / 'data/coco/val2017.zip').unlink()
    server.files['/zips/val2017.zip'] = good
    mine = tmp_path / 'data/coco/val2017/1.jpg'
    mine.parent.mkdir()
    mine.write_text('mine')
    output = fetch('--parts', 'val', fails=True)
    assert 'It is not overwritten' in output
    assert mine.read_text() == 'mine'


def test_server_without_the_files(fetch, server):
    server.files.clear()
    output = fetch(fails=True)
    assert '404' in output and '--server' in output and 'Traceback' not in output
