"""tools/download_dataset.py against a server on this machine."""

import http.server
import io
import threading
import zipfile

import pytest
from dirty_files import Dataset, encode, rgb


def coco_archives(folder):
    """COCO's three archives with one image each."""
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO['classes']
    archives, lists, image = {}, {}, encode(rgb())
    for split in ('train2017', 'val2017'):
        part = Dataset(folder, range(1, 81), names)
        part.add_object(part.add_image('1.jpg', image))
        part.write(f'{split}.json')
        content = (folder / f'{split}.json').read_text()
        lists[f'annotations/instances_{split}.json'] = content
        archives[f'/zips/{split}.zip'] = pack({f'{split}/1.jpg': image})
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

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.cut, self.asked = files, None, []


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
def server(tmp_path_factory):
    server = Server(coco_archives(tmp_path_factory.mktemp('coco')))
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


def test_folder_that_cannot_be_written(fetch, tmp_path):
    (tmp_path / 'file').touch()
    output = fetch('--save-dir', tmp_path / 'file' / 'coco', fails=True)
    assert '--save-dir: nothing can be written in' in output
    assert 'Traceback' not in output
