"""Images from files, folders, URLs, videos and cameras, one after the other."""

import os
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

import cv2
import mmcv
import numpy as np

from ..datasets.preflight.images import ImageError, inspect_image
from .inferencer import InferenceError

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
STREAMS = ('rtsp://', 'rtmp://', 'udp://')
SECONDS = 30  # timeout of a server


class Item(NamedTuple):
    """An image, or the reason why it cannot be read."""

    name: str  # name of its file, or of the video with the number of the frame
    image: np.ndarray  # of shape (H, W, 3), BGR, uint8; empty if there is an error
    error: str = ''  # what is wrong with the file


class Inputs(NamedTuple):
    """The images of an input."""

    items: Iterator[Item]  # read one by one
    total: Optional[int]  # their number, if it is known
    fps: float = 0.0  # frames per second of a video or camera; 0 for images
    name: str = ''  # name of the video or camera; empty for images


def read_inputs(source: Union[str, Path]) -> Inputs:
    """Open an input, and read its images one after the other.

    Args:
        source (str | Path): An image, a folder of images (without subfolders), a video,
            the ``http(s)://`` URL of an image or video, the URL of a stream, or the
            number of a camera.

    Raises:
        InferenceError: If there is no such input, a folder is empty, or a video or
            camera cannot be opened. Single images that cannot be read are reported
            by their items instead.
    """
    text = os.fspath(source)
    suffix = Path(urlsplit(text).path if '://' in text else text).suffix.lower()
    is_camera = text.isdecimal() and not os.path.exists(text)
    if is_camera or text.startswith(STREAMS) or suffix in VIDEO_SUFFIXES:
        return _read_video(text, is_camera)
    if text.startswith(('http://', 'https://')):
        return Inputs(iter([_download(text)]), 1)
    if os.path.isdir(text):
        entries = sorted(Path(text).iterdir())
        paths = [p for p in entries if p.is_file() and not p.name.startswith('.')]
        if not paths:
            raise InferenceError(
                f'{text} has no files ({len(entries)} other entries); name a folder '
                'that holds images.'
            )
        return Inputs((_read_item(path) for path in paths), len(paths))
    if not os.path.exists(text):
        raise InferenceError(
            f'there is no {text} (looked for in {os.getcwd()}). Name an image, a '
            'folder, an http(s) address, a video or the number of a camera.'
        )
    return Inputs(iter([_read_item(Path(text))]), 1)


def read_image(path: Union[str, Path]) -> np.ndarray:
    """Read an image file.

    Args:
        path (str | Path): The file. Its EXIF orientation is applied, as by
            ``LoadImageFromFile``.

    Returns:
        ndarray: Of shape (H, W, 3), BGR, uint8.

    Raises:
        ImageError: If it is not an image or is damaged. The message continues the name
            of the file.
    """
    try:
        inspect_image(str(path))
        image = mmcv.imread(str(path))
    except (OSError, cv2.error) as error:
        raise ImageError(f'cannot be read ({error})') from error
    if image is None:
        raise ImageError('is an image of a kind that OpenCV cannot decode')
    return image


def _read_item(path: Path) -> Item:
    try:
        return Item(path.name, read_image(path))
    except ImageError as error:
        return Item(path.name, np.zeros((0, 0, 3), np.uint8), str(error))


def _download(url: str) -> Item:
    name = Path(unquote(urlsplit(url).path)).name or 'image'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'image'
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                path.write_bytes(answer.read())
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, 'reason', error)
            raise InferenceError(f'{url} cannot be fetched: {reason}') from error
        return _read_item(path)._replace(name=name)


def _read_video(source: str, is_camera: bool) -> Inputs:
    if not is_camera and '://' not in source and not os.path.isfile(source):
        raise InferenceError(f'there is no {source} (looked for in {os.getcwd()}).')
    name = f'camera{source}' if is_camera else Path(urlsplit(source).path).stem
    capture = cv2.VideoCapture(int(source) if is_camera else source)
    if not capture.isOpened():
        what = f'camera {source}' if is_camera else source
        raise InferenceError(
            f'{what} cannot be opened. Check that it is a video or camera and that no '
            'other program uses it.'
        )
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    fps = capture.get(cv2.CAP_PROP_FPS) or 25.0
    items = _frames(capture, name)
    return Inputs(items, count if count > 0 and not is_camera else None, fps, name)


def _frames(capture: cv2.VideoCapture, name: str) -> Iterator[Item]:
    try:
        number = 0
        while True:
            there, image = capture.read()
            if not there:
                return
            number += 1
            yield Item(f'{name}_{number:06d}', image)
    finally:
        capture.release()
