"""`make page`, projects/page, in a browser and where it cannot start."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import cv2
import pytest
import torch
from tool_process import environment_of, free_port

from mmrest.inference import attend, init_inferencer
from mmrest.inference.attention_pictures import draw_stage

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]


@pytest.fixture
def page(call, tmp_path):
    """Run the page where it cannot start."""

    def run(*args):
        output = call('../projects/page/page.py', *args, cwd=tmp_path, fails=True)
        assert 'Traceback' not in output
        return output

    return run


def test_what_is_said_where_it_cannot_start(page, tmp_path):
    assert 'no checkpoint in work_dirs/demo. Run make demo first' in page()
    (tmp_path / 'x.pth').touch()
    output = page('--checkpoint', 'x.pth')
    assert '0 configs (*.py) are next to x.pth' in output
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        assert f'port {port} cannot be used (Address already in use)' in page(
            '--port', port
        )


@pytest.mark.slow
@pytest.mark.parametrize(('width', 'height'), [(96, 64), (2000, 1000)])
def test_click_and_boxes_are_of_what_is_shown(
    repo, model_files, write_image, tmp_path, monkeypatch, width, height
):
    """Small pictures are shown larger, and large ones given to the model smaller."""
    pytest.importorskip('gradio')
    monkeypatch.syspath_prepend(str(repo / 'projects' / 'page'))
    import interface

    config, checkpoint = model_files('mmdet')
    model = init_inferencer(str(config), checkpoint, 'cpu')
    page = interface.Page({'x.pth': model}, 25, tmp_path)
    path = write_image(tmp_path / 'a.png', width, height)
    opened, picture, *_ = page.open(str(path), 0.0)
    assert picture.shape[:2] == ((320, 480) if width == 96 else (800, 1600))
    size = json.loads(next(tmp_path.glob('*/a_found.json')).read_text())['size']
    assert size == [96, 64] if width == 96 else [1600, 800]
    y, x = (side // 2 for side in picture.shape[:2])
    stages = page.attend(opened, SimpleNamespace(index=[x, y]))
    wanted = attend(model, opened.image, size[0] // 2, size[1] // 2)
    assert wanted.point == (48, 32 if width == 96 else 24)
    for index, stage in enumerate(stages):
        shown = cv2.imread(stage.value['path']) if stage.value else None
        drawn = draw_stage(wanted, index)
        assert shown.shape == drawn.shape and abs(shown.mean() - drawn.mean()) < 2


@pytest.fixture(scope='module')
def address(repo, model_files, tmp_path_factory):
    """The page of two checkpoints."""
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('page')
    config, checkpoint = model_files('mmdet')
    shutil.copy(config, folder / 'config.py')
    shutil.copy(checkpoint, folder / 'first.pth')
    saved = torch.load(checkpoint)
    saved['state_dict']['roi_head.bbox_head.fc_cls.bias'] += 1
    torch.save(saved, folder / 'second.pth')
    port = free_port()
    options = ['--checkpoint', 'first.pth', '--compare', 'second.pth', '--port', port]
    options += ['--max-megapixels', '1', '--device', 'cpu']
    process = subprocess.Popen(
        [sys.executable, str(repo / 'projects/page/page.py'), *options],
        cwd=folder,
        env=dict(environment_of(repo), PYTHONUNBUFFERED='1'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith('http://127.0.0.1'):
            break
    else:
        pytest.fail(''.join(lines[-30:]))
    yield f'http://127.0.0.1:{port}'
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None:
        pytest.skip('needs chromium (apt-get install chromium)')
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def user(browser, address):
    """A person's own window, on the page; every address that it asks for."""
    contexts = []

    def open_page():
        context = browser.new_context(viewport=dict(width=1200, height=1000))
        context.set_default_timeout(90_000)
        contexts.append(context)
        window = context.new_page()
        window.asked = []
        window.on('request', lambda request: window.asked.append(request.url))
        window.goto(address)
        window.wait_for_selector('#file input[type=file]', state='attached')
        return window

    yield open_page
    for context in contexts:
        context.close()


def upload(window, path):
    window.set_input_files('#file input[type=file]', str(path))


def download(window, what, tmp_path):
    with window.expect_download() as started:
        window.get_by_text(f'Download {what}').click()
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}_{what}'
    started.value.save_as(path)
    return path


def wait_for_picture(window, element, other_than=None):
    """The address of a picture, once it is there and another one."""
    window.wait_for_function(
        '([element, old]) => {'
        ' const image = document.querySelector(`#${element} img`);'
        ' return image && image.complete && image.naturalWidth && image.src !== old }',
        arg=[element, other_than],
    )
    return window.get_attribute(f'#{element} img', 'src')


@pytest.mark.slow
def test_a_person_looks_at_a_picture(user, write_image, tmp_path):
    window = user()
    upload(window, write_image(tmp_path / 'in' / 'noise.png', 192, 128))
    before = wait_for_picture(window, 'picture0')
    wait_for_picture(window, 'picture1')  # the second checkpoint
    window.wait_for_selector(
        'a:has-text("Download JSON"), button:has-text("Download JSON"):enabled'
    )

    found = json.loads(download(window, 'JSON', tmp_path).read_text())
    assert found['image'] == 'noise.png' and found['size'] == [192, 128]
    assert list(found['found']) == ['first.pth', 'second.pth']
    assert found['score_thr'] == 0.5
    assert download(window, 'picture', tmp_path).read_bytes()[:2] == b'\xff\xd8'

    number = window.locator('#slider input[type=number]')
    number.fill('0')
    number.press('Enter')
    number.blur()
    wait_for_picture(window, 'picture0', other_than=before)
    found = json.loads(download(window, 'JSON', tmp_path).read_text())
    assert found['score_thr'] == 0
    assert found['found']['first.pth']['bboxes']

    assert not window.is_visible('#attention0_0')
    window.locator('#picture0 img').click(position=dict(x=20, y=20))
    for n in range(2):
        for stage in range(4):
            wait_for_picture(window, f'attention{n}_{stage}')

    # nothing of another machine, no fonts, no counting
    assert window.asked
    hosts = {re.match(r'\w+:(//[^:/]+)?', url)[0] for url in window.asked}
    assert hosts <= {'http://127.0.0.1', 'data:', 'blob:http://127.0.0.1', 'blob:'}


@pytest.mark.slow
def test_files_that_are_refused(user, write_image, tmp_path):
    window = user()
    text = tmp_path / 'text.jpg'
    text.write_text('no image')
    upload(window, text)
    window.get_by_text('text.jpg (8 bytes) is not an image.').wait_for()
    # the page goes on
    window.reload()
    upload(window, write_image(tmp_path / 'large.png', 2000, 1000))
    message = 'large.png has 2.0 megapixels, and the limit is 1.'
    window.get_by_text(message).wait_for()
    window.reload()
    upload(window, write_image(tmp_path / 'small.png'))
    wait_for_picture(window, 'picture0')


@pytest.mark.slow
def test_two_persons_at_once(user, write_image, tmp_path):
    windows = [user(), user()]
    sizes = [(96, 64), (64, 96)]
    for n, (window, size) in enumerate(zip(windows, sizes)):
        upload(window, write_image(tmp_path / f'{n}.png', *size))
    for window in windows:
        wait_for_picture(window, 'picture1')
    for n, (window, size) in enumerate(zip(windows, sizes)):
        found = json.loads(download(window, 'JSON', tmp_path).read_text())
        assert found['image'] == f'{n}.png' and found['size'] == list(size)
    for window in windows:
        window.locator('#picture0 img').click(position=dict(x=10, y=10))
    for window in windows:
        wait_for_picture(window, 'attention0_3')
