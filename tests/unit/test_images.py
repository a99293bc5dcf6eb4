"""Image folders, and transforms that decode images or work row by row."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_stream import StreamLoader
from ddp_stream.sources import DataError, ImageFolder, InMemory, open_source
from ddp_stream.transforms import DecodeImages, per_row

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def encoded(pixels, format_="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, format_)
    return file.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


@pytest.fixture
def folder():
    for name in ("dog/b.png", "cat/a.PNG", "cat/deep/c.png", "dog/a.png"):
        write(f"data/{name}", encoded(noise(len(name), 4, 6, 3)))
    write("data/cat/notes.txt", b"x")
    write("data/cat/.hidden.png", b"x")
    write("data/_trash/x.png", b"x")
    Path("data/empty").mkdir()


@pytest.mark.usefixtures("folder")
def test_a_directory_is_a_class():
    source = open_source("data")
    assert isinstance(source, ImageFolder)
    assert source.classes == ["cat", "dog"]
    taken = source.take(np.arange(4))
    assert taken["path"] == ["cat/a.PNG", "cat/deep/c.png", "dog/a.png", "dog/b.png"]
    assert taken["label"].tolist() == [0, 0, 1, 1]
    assert taken["image"] == [Path("data", path).read_bytes() for path in taken["path"]]
    assert source.select(["label"]).take(np.array([3, 0]))["label"].tolist() == [1, 0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() == open_source("data").fingerprint()
    write("data/dog/c.png", b"x")
    assert open_source("data").fingerprint() != source.fingerprint()


def test_what_is_no_image_folder():
    write("data/cat/notes.txt", b"x")
    with pytest.raises(DataError, match="data has no directory with images"):
        ImageFolder("data")
    with pytest.raises(DataError, match="data is a directory without a file of a known format"):
        open_source("data")


@pytest.mark.usefixtures("folder")
def test_images_are_decoded_in_the_workers():
    loader = StreamLoader(open_source("data"), 2, num_workers=2, transform=DecodeImages())
    seen = {int(row): pixels for batch in loader for row, pixels in zip(batch.rows, batch["image"], strict=True)}
    expected = ["cat/a.PNG", "cat/deep/c.png", "dog/a.png", "dog/b.png"]
    for row, path in enumerate(expected):
        assert np.array_equal(seen[row].numpy(), noise(len(path), 4, 6, 3))


def test_modes_and_sizes():
    rgb, grey = noise(0, 8, 4, 3), noise(1, 8, 4)
    columns = {"image": [encoded(rgb), encoded(grey)], "label": [1, 2]}
    taken = DecodeImages()(columns)
    assert taken["label"] == [1, 2]
    assert (taken["image"].dtype, taken["image"].shape) == (torch.uint8, (2, 8, 4, 3))
    assert np.array_equal(taken["image"][1].numpy(), np.repeat(grey[..., None], 3, axis=2))
    grey_only = DecodeImages(mode="L")({"image": [encoded(grey)]})["image"]
    assert np.array_equal(grey_only.numpy(), grey[None, ..., None])
    mixed = {"image": [encoded(rgb), encoded(noise(2, 30, 30, 3), "JPEG")]}
    assert DecodeImages(size=(5, 7))(mixed)["image"].shape == (2, 5, 7, 3)
    assert DecodeImages(size=(5, 7))({"image": []})["image"].shape == (0, 5, 7, 3)
    with pytest.raises(DataError, match=r"images of 8x4 and of 30x30 pixels.*--data.transform.size"):
        DecodeImages()(mixed)


def smooth(height, width, channels=3):
    """What a photograph is like: neighbours are alike."""
    coarse = noise(height, max(1, height // 4), max(1, width // 4), channels)
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    small = Image.frombytes(mode, coarse.shape[1::-1], coarse.tobytes())
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (33, 17), (1, 1), (200, 7)])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {}),
        (3, {"subsampling": 0, "quality": 97}),
        (3, {"subsampling": 1, "quality": 40, "optimize": True}),
        (3, {"progressive": True}),
        (3, {"restart_marker_blocks": 1}),
        (3, {"exif": b"Exif\x00\x00" + Image.Exif().tobytes()[6:]}),
        (1, {}),
        (4, {}),
    ],
    ids=["plain", "4:4:4", "4:2:2", "progressive", "restarts", "exif", "grey", "CMYK"],
)
def test_jpegs_as_pillow_reads_them(size, channels, options):
    file = io.BytesIO()
    smooth(*size, channels).save(file, "JPEG", **options)
    content = file.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(DecodeImages("jpg")({"jpg": [content]})["jpg"][0].numpy(), expected)
    trailing = DecodeImages("jpg")({"jpg": [content + b"rest"]})["jpg"][0].numpy()
    assert np.array_equal(trailing, expected)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda content: np.frombuffer(content, np.uint8)])
def test_bytes_in_whatever_they_come(kind):
    content = encoded(smooth(20, 20), "JPEG")
    expected = DecodeImages("jpg")({"jpg": [content]})["jpg"]
    assert torch.equal(DecodeImages("jpg")({"jpg": [kind(content)]})["jpg"], expected)


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    content = encoded(smooth(20, 20), "JPEG")
    expected = DecodeImages("jpg")({"jpg": [content]})["jpg"]
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert torch.equal(DecodeImages("jpg")({"jpg": [content]})["jpg"], expected)


def test_a_jpeg_that_is_cut_off():
    content = encoded(smooth(64, 64), "JPEG")
    with pytest.raises(DataError, match="image file is truncated"):
        DecodeImages("jpg")({"jpg": [content[:-200]]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "cannot be decoded.*8 bytes, beginning with b'no image'"),
        (encoded(noise(0, 64, 64, 3))[:200], "cannot be decoded"),
        (b"", "it is 0 bytes"),
        (None, "it is None"),
    ],
)
def test_what_is_no_image(content, message):
    with pytest.raises(DataError, match=message):
        DecodeImages()({"image": [content]})
    with pytest.raises(DataError, match="no column 'jpg' to decode; there are: image"):
        DecodeImages("jpg")({"image": [content]})


def test_a_function_of_one_row():
    @per_row
    def transform(row):
        """Documented."""
        length = len(row["text"])
        return {
            "length": length,
            "half": row["x"] / 2,
            "flag": length > 1,
            "ones": torch.ones(3) * length,
            "ragged": np.ones(length),
            "text": row["text"].upper(),
        }

    assert transform.__doc__ == "Documented."
    source = InMemory({"x": torch.arange(4.0), "text": ["a", "bb", "ccc", "d"]})
    batch = next(iter(StreamLoader(source, 4, shuffle=False, transform=transform)))
    assert batch["length"].tolist() == [1, 2, 3, 1]
    assert batch["half"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert batch["flag"].tolist() == [False, True, True, False]
    assert batch["ones"].tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [1.0] * 3]
    assert [len(values) for values in batch["ragged"]] == [1, 2, 3, 1]
    assert batch["text"] == ["A", "BB", "CCC", "D"]
    with pytest.raises(DataError, match=r"returned \['b'\] for one row and \['a'\] for another"):
        per_row(lambda row: {"b" if row["x"] else "a": 1})({"x": [0, 1]})
