"""Data sets: the values that were written come back, and everything else is refused in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pathlib
import re
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from certify import data
from certify.data import DataError, Dataset, load

PIXELS = np.random.default_rng(1).integers(0, 256, size=(6, 1, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)


def npz(folder: pathlib.Path, **arrays) -> str:
    np.savez_compressed(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


def raw_npz(folder: pathlib.Path, *, descr: str = "|u1", shape: str = "(2, 4)", body: bytes = bytes(8), version: tuple[int, int] = (1, 0)) -> str:
    """A .npz file whose `x` says of itself what is asked for."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    y = io.BytesIO()
    np.save(y, np.array([0, 1]))
    with zipfile.ZipFile(folder / "raw.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY" + bytes(version) + length + header + body)
        archive.writestr("y.npy", y.getvalue())
    return str(folder / "raw.npz")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def mnist(folder: pathlib.Path, images=None, labels=None, *, prefix: str = "t10k", sign: str = "-", suffix: str = "", kind: str = "mnist") -> str:
    """The two IDX files of one split; each of them may be given as bytes."""
    for stem, d, content in (("images", 3, PIXELS[:, 0] if images is None else images), ("labels", 1, LABELS if labels is None else labels)):
        content = content if isinstance(content, bytes) else idx_bytes(content)
        path = folder / f"{prefix}-{stem}{sign}idx{d}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)
    return f"{kind}:{folder}"


TINY = np.random.default_rng(2).integers(0, 256, size=(6, 3, 32, 32), dtype=np.uint8)


def cifar10(folder: pathlib.Path, *names: str, images: np.ndarray = TINY, labels: np.ndarray = LABELS) -> str:
    """Batches in the binary format, each with the same records: the label, then all red, all green and all blue pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    records = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    for name in names or ("test_batch.bin",):
        (folder / name).write_bytes(records)
    return f"cifar10:{folder}"


def picture(path: pathlib.Path, pixels: np.ndarray) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pictures(folder: pathlib.Path, **images: np.ndarray) -> str:
    """`class__name=pixels` is written to folder/class/name.png."""
    for name, pixels in images.items():
        picture(folder.joinpath(*name.split("__")).with_suffix(".png"), pixels)
    return f"folder:{folder}"


def colour(seed: int, height: int = 5, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def gray(seed: int, height: int = 5, width: int = 4) -> np.ndarray:
    return colour(seed, height, width)[:, :, 0]


def written(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def one_image(folder: pathlib.Path, content: bytes) -> str:
    """A folder whose only image has that content."""
    return f"folder:{written(folder / 'a' / 'b.png', content).parent.parent}"


def empty_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be an image of that size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def check(dataset: Dataset) -> None:
    """What holds of every data set that is returned."""
    assert dataset.inputs.dtype == np.float32
    assert dataset.labels.dtype == np.int64
    assert len(dataset) == len(dataset.inputs) == len(dataset.labels) > 0
    assert dataset.labels.ndim == 1
    assert dataset.inputs.flags.c_contiguous
    assert 0 <= dataset.inputs.min() <= dataset.inputs.max() <= 1
    assert dataset.labels.min() >= 0
    assert dataset.classes is None or dataset.labels.max() < len(dataset.classes)
    assert re.fullmatch("[0-9a-f]{64}", dataset.sha256)


# --- what is read is what was written


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
def test_npz_of_bytes(tmp_path, names):
    dataset = load(npz(tmp_path, **dict(zip(names, (PIXELS, LABELS), strict=True))))
    check(dataset)
    assert np.array_equal(dataset.inputs, (PIXELS / 255.0).astype(np.float32))
    assert np.array_equal(dataset.labels, LABELS)
    assert dataset.classes is None


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("label_dtype", ["<i8", ">i4", "u1", "<u8"])
def test_npz_of_floats(tmp_path, dtype, label_dtype):
    x = np.asfortranarray(np.random.default_rng(0).random((6, 2, 3)).astype(dtype))
    dataset = load(npz(tmp_path, x=x, y=LABELS.astype(label_dtype)))
    check(dataset)
    assert np.array_equal(dataset.inputs, x.astype(np.float32))
    assert np.array_equal(dataset.labels, LABELS)


def test_npz_without_compression_and_with_other_arrays(tmp_path):
    np.savez(tmp_path / "set.npz", x=PIXELS, y=LABELS, why=np.array([{"an": "object"}], dtype=object))
    (tmp_path / "set.npz").rename(tmp_path / "SET.NPZ")
    assert np.array_equal(load(str(tmp_path / "SET.NPZ")).labels, LABELS)


def test_npz_written_by_python_2(tmp_path):
    assert load(raw_npz(tmp_path, shape="(2L, 4L)")).inputs.shape == (2, 4)


def test_npz_with_the_second_header_version(tmp_path):
    assert load(raw_npz(tmp_path, version=(2, 0))).inputs.shape == (2, 4)


@pytest.mark.parametrize("kind", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("sign", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, kind, sign, suffix):
    options = {"sign": sign, "suffix": suffix, "kind": kind}
    spec = mnist(tmp_path, **options)
    mnist(tmp_path, PIXELS[::-1, 0][:4], LABELS[::-1][:4], prefix="train", **options)
    for name in (spec, f"{spec}:test"):
        dataset = load(name)
        check(dataset)
        assert np.array_equal(dataset.inputs, (PIXELS / 255.0).astype(np.float32))
        assert np.array_equal(dataset.labels, LABELS)
        assert len(dataset.classes) == 10
    train = load(f"{spec}:train")
    check(train)
    assert np.array_equal(train.inputs, (PIXELS[::-1][:4] / 255.0).astype(np.float32))
    assert np.array_equal(train.labels, LABELS[::-1][:4])


def test_mnist_in_a_folder_with_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert len(load(mnist(tmp_path / "a:b"))) == 6


@pytest.mark.parametrize("sub", [".", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, sub):
    cifar10(tmp_path / sub)
    for i in range(1, 6):
        cifar10(tmp_path / sub, f"data_batch_{i}.bin", images=TINY[i : i + 1], labels=LABELS[i : i + 1])
    for name in (f"cifar10:{tmp_path}", f"cifar10:{tmp_path}:test"):
        dataset = load(name, (3, 32, 32))
        check(dataset)
        assert np.array_equal(dataset.inputs, (TINY / 255.0).astype(np.float32))
        assert dataset.labels.tolist() == LABELS.tolist()
        assert dataset.classes[:4] == ("airplane", "automobile", "bird", "cat")
        assert len(dataset.classes) == 10
    train = load(f"cifar10:{tmp_path}:train")
    check(train)
    assert np.array_equal(train.inputs, (TINY[1:] / 255.0).astype(np.float32))
    assert train.labels.tolist() == LABELS[1:].tolist()


@pytest.mark.parametrize(("split", "count", "first"), [("", 10_000, [7, 2, 1, 0, 4]), (":train", 60_000, [5, 0, 4, 1, 9])])
def test_the_real_mnist(split, count, first):
    folder = pathlib.Path(os.environ.get("LIPNET_DATA", "")) / "mnist"
    if "LIPNET_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("LIPNET_DATA names no folder with mnist in it")
    dataset = load(f"mnist:{folder}{split}", (1, 28, 28))
    check(dataset)
    assert dataset.inputs.shape == (count, 1, 28, 28)
    assert dataset.labels[:5].tolist() == first
    assert dataset.classes == tuple("0123456789")
    assert dataset.inputs.mean() == pytest.approx(0.1307 if split else 0.1325, abs=1e-4)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".PNG"])
def test_folder_in_colour(tmp_path, suffix):
    for name, seed in (("dog/b", 1), ("dog/a", 2), ("Cat/z", 3)):
        picture(tmp_path / f"{name}{suffix}", colour(seed))
    written(tmp_path / "dog" / "notes.txt", b"not an image")
    written(tmp_path / "dog" / "._a.png", b"not an image either")
    written(tmp_path / ".cache" / "c.png", b"no class")
    dataset = load(f"folder:{tmp_path}")
    check(dataset)
    assert dataset.classes == ("Cat", "dog")
    assert dataset.labels.tolist() == [0, 1, 1]
    expected = np.stack([colour(seed).transpose(2, 0, 1) for seed in (3, 2, 1)])
    assert np.array_equal(dataset.inputs, (expected / 255.0).astype(np.float32))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".gif"])
def test_folder_of_flat_colours_in_lossy_formats(tmp_path, suffix):
    picture(tmp_path / "0" / f"a{suffix}", np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8))
    dataset = load(f"folder:{tmp_path}", (3, 16, 16))
    check(dataset)
    assert np.abs(dataset.inputs[0] * 255 - np.array([200, 40, 90])[:, None, None]).max() <= 3


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(written(tmp_path / "0" / "a.gif", b""), save_all=True, append_images=frames[1:])
    assert load(f"folder:{tmp_path}", (1, 4, 4)).inputs == pytest.approx(10 / 255)


def test_folder_in_gray(tmp_path):
    dataset = load(pictures(tmp_path, a__0=gray(0), b__0=gray(1)))
    check(dataset)
    assert np.array_equal(dataset.inputs, (np.stack([gray(0), gray(1)])[:, None] / 255.0).astype(np.float32))


def test_one_image_in_colour_makes_all_rgb(tmp_path):
    dataset = load(pictures(tmp_path, a__0=gray(0), b__0=colour(1)))
    check(dataset)
    expected = np.stack([np.stack([gray(0)] * 3), colour(1).transpose(2, 0, 1)])
    assert np.array_equal(dataset.inputs, (expected / 255.0).astype(np.float32))


def test_the_channels_of_the_model_decide(tmp_path):
    spec = pictures(tmp_path, a__0=gray(0), b__0=colour(1))
    assert load(spec, (3, 5, 4)).inputs.shape == (2, 3, 5, 4)
    one = load(spec, (1, 5, 4)).inputs
    assert one.shape == (2, 1, 5, 4)
    assert np.array_equal(one[0, 0], (gray(0) / 255.0).astype(np.float32))
    luma = colour(1) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(one[1, 0] * 255 - luma).max() <= 1


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path):
    picture(tmp_path / "0" / "a.png", np.concatenate([colour(1), gray(2)[:, :, None]], axis=2))
    Image.fromarray(np.full((5, 4, 3), (0, 128, 255), dtype=np.uint8)).quantize(4).save(tmp_path / "0" / "b.png", transparency=b"\x00\x80")
    inputs = load(f"folder:{tmp_path}").inputs
    assert np.array_equal(inputs[0], (colour(1).transpose(2, 0, 1) / 255.0).astype(np.float32))
    assert inputs[1, :, 0, 0] * 255 == pytest.approx([0, 128, 255])


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    npz(tmp_path, x=PIXELS, y=LABELS)
    mnist(tmp_path)
    pictures(tmp_path / "pictures", a__0=gray(0))
    for spec in ("~/set.npz", "mnist:~", "folder:~/pictures"):
        assert load(spec).spec == spec


# --- the digits of scikit-learn


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = data.digits("train"), data.digits("test")
    check(train)
    check(test)
    assert (train.inputs.shape, test.inputs.shape) == ((1437, 64), (360, 64))
    images, labels = datasets.load_digits(return_X_y=True)
    together = np.column_stack([np.concatenate([train.inputs, test.inputs]) * 16, np.concatenate([train.labels, test.labels])])
    everything = np.column_stack([images, labels])
    assert sorted(map(tuple, together)) == sorted(map(tuple, everything))  # each image is in one of the two, once
    assert np.array_equal(np.concatenate([train.labels, test.labels]), labels[np.random.default_rng(0).permutation(1797)])
    assert test.classes == tuple("0123456789")


def test_digits_are_the_same_every_time():
    pytest.importorskip("sklearn")
    first, again, default = data.digits("test"), data.digits("test"), load("digits", (1, 8, 8))
    assert np.array_equal(first.inputs, again.inputs)
    assert first.sha256 == again.sha256 == load("digits").sha256 == load("digits:test").sha256
    assert np.array_equal(first.inputs, default.inputs.reshape(360, 64))
    assert first.sha256 != data.digits("train").sha256
    assert first.spec == "digits:test"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"^digits: .*scikit-learn.*pip install 'lipnet\[demo\]'$"):
        load("digits")


def test_digits_of_another_split():
    with pytest.raises(DataError, match=r"^digits:val: there is no such split; give train or test$"):
        data.digits("val")


# --- the model's shape


@pytest.mark.parametrize(
    ("found", "shape"),
    [
        ((64,), (64,)),
        ((64,), (8, 8)),
        ((64,), (1, 8, 8)),
        ((8, 8), (64,)),
        ((1, 8, 8), (64,)),
        ((3, 4, 4), (48,)),
        ((48,), (3, 4, 4)),
        ((8, 8), (1, 8, 8)),
        ((1, 8, 8), (8, 8)),
        ((8, 8, 1), (1, 8, 8)),
        ((3, 4, 5), (3, 4, 5)),
        ((4, 4, 4), (4, 4, 4)),
    ],
)
def test_shapes_that_fit(tmp_path, found, shape):
    x = np.random.default_rng(0).random((3, *found)).astype(np.float32)
    dataset = load(npz(tmp_path, x=x, y=np.arange(3)), shape)
    check(dataset)
    assert np.array_equal(dataset.inputs, x.reshape(3, *shape))


@pytest.mark.parametrize(
    ("found", "shape", "message"),
    [
        ((4, 5, 3), (3, 4, 5), r"\(4, 5, 3\), channels last, and the model takes \(3, 4, 5\), channels first; .* x\.transpose\(0, 3, 1, 2\)$"),
        ((3, 4, 5), (4, 5, 3), r"\(3, 4, 5\), channels first, and the model takes \(4, 5, 3\), channels last; .* x\.transpose\(0, 2, 3, 1\)$"),
        ((5, 4), (4, 5), r"inputs are \(5, 4\) and the model takes \(4, 5\); "),
        ((64,), (65,), r"inputs are \(64,\) and the model takes \(65,\); "),
        ((3, 32, 32), (1, 32, 32), r"inputs are \(3, 32, 32\) and the model takes \(1, 32, 32\); "),
        ((2, 6), (3, 4), r"inputs are \(2, 6\) and the model takes \(3, 4\); "),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, found, shape, message):
    x = np.random.default_rng(0).random((3, *found)).astype(np.float32)
    spec = npz(tmp_path, x=x, y=np.arange(3))
    with pytest.raises(DataError, match=message):
        load(spec, shape)
    axes = re.search(r"x\.transpose\(([\d, ]*)\)", message.replace("\\", ""))
    if axes:  # the advice works
        assert load(npz(tmp_path, x=x.transpose([int(axis) for axis in axes[1].split(",")]), y=np.arange(3)), shape).inputs.shape[1:] == shape


# --- what identifies a data set


def test_the_digest_is_of_dtype_shape_and_bytes(tmp_path):
    dataset = load(npz(tmp_path, x=PIXELS, y=LABELS))
    hasher = hashlib.sha256(b"<f4 (6, 1, 28, 28)" + dataset.inputs.tobytes() + b"<i8 (6,)" + dataset.labels.tobytes())
    assert dataset.sha256 == hasher.hexdigest()


def test_the_digest_sees_one_pixel_one_label_and_the_order(tmp_path):
    pixel, label = PIXELS.copy(), LABELS.copy()
    pixel[5, 0, 27, 27] ^= 1
    label[0] += 1
    variants = [(PIXELS, LABELS), (pixel, LABELS), (PIXELS, label), (PIXELS[::-1], LABELS[::-1]), (PIXELS[:, 0], LABELS)]
    assert len({load(npz(tmp_path, x=x, y=y)).sha256 for x, y in variants}) == len(variants)


def test_the_digest_does_not_see_how_the_data_is_stored(tmp_path):
    (tmp_path / "0").mkdir()
    as_idx = load(mnist(tmp_path))
    as_npz = load(npz(tmp_path, x=PIXELS[:, 0].astype(np.float32) / np.float32(255), y=LABELS.astype(np.int32)), (1, 28, 28))
    assert as_idx.sha256 == as_npz.sha256


# --- refusals: (what it is, how to make it, the sentence)

X = PIXELS[:2, 0]
Y = np.array([0, 1])
IMAGES = idx_bytes(PIXELS[:, 0])
REFUSALS = [
    ("unknown", lambda p: "cifar10", r"names no data set; the known forms are digits, digits:train, FILE\.npz, mnist:DIR, .*cifar10:DIR, .*folder:DIR$"),
    ("empty", lambda p: "", "names no data set"),
    ("unknown split of the digits", lambda p: "digits:val", "names no data set"),
    ("folder of nothing", lambda p: "folder:", "names no data set"),
    ("mnist of nothing", lambda p: "mnist:", "names no data set"),
    ("npz absent", lambda p: str(p / "no.npz"), r"there is no such file; give"),
    ("npz is a folder", lambda p: str(written(p / "a.npz" / "b", b"").parent), r"there is no such file"),
    ("npz is text", lambda p: str(written(p / "a.npz", b"hello")), r"is damaged or is not a \.npz file \(File is not a zip file\); save it again"),
    ("npz is empty", lambda p: str(written(p / "a.npz", b"")), r"is damaged or is not a \.npz file"),
    ("npz without x", lambda p: npz(p, a=X, y=Y), r"the arrays in it are a, y; save the inputs as x and the labels as y"),
    ("npz with a pair from two", lambda p: npz(p, x=X, labels=Y), r"the arrays in it are labels, x; save"),
    ("npz without arrays", lambda p: npz(p), r"the arrays in it are none; save"),
    ("npz of objects", lambda p: npz(p, x=np.array([None, {}]), y=Y), r"x holds values of type object; save x as uint8"),
    ("npz of texts", lambda p: npz(p, x=X, y=np.array(["cat", "dog"])), r"y holds values of type <U3; save"),
    ("npz of complex numbers", lambda p: npz(p, x=X * 1j, y=Y), r"x holds values of type complex128; save"),
    ("npz of records", lambda p: npz(p, x=X, y=np.zeros(2, dtype=[("a", "i4")])), r"y holds values of type \[\('a', '<i4'\)\]; save"),
    ("inputs are integers", lambda p: npz(p, x=X.astype(np.int64), y=Y), r"inputs are of type int64; save them as uint8"),
    ("inputs are booleans", lambda p: npz(p, x=X > 9, y=Y), r"inputs are of type bool; save"),
    ("inputs are scalars", lambda p: npz(p, x=np.zeros(2), y=Y), r"inputs are \(2,\); save at least one, as an array of shape \(N, \.\.\.\)"),
    ("inputs are one number", lambda p: npz(p, x=np.zeros(()), y=Y), r"inputs are \(\); save"),
    ("no inputs", lambda p: npz(p, x=X[:0], y=Y[:0]), r"inputs are \(0, 28, 28\); save at least one"),
    ("no pixels", lambda p: npz(p, x=X[:, :0], y=Y), r"inputs are \(2, 0, 28\); save"),
    ("normalised", lambda p: npz(p, x=np.float32([[-2.1, 0], [1, 2.6]]), y=Y), r"in \[-2\.1, 2\.6\]; data must be in \[0, 1\] before .*lipnet\.Normalize"),
    ("pixels to 255", lambda p: npz(p, x=np.float64([[0, 9], [1, 255]]), y=Y), r"are in \[0\.0, 255\.0\]; .*; save them as uint8, or divide"),
    ("just above 1", lambda p: npz(p, x=np.nextafter(np.float32([[1], [1]]), np.float32(2)), y=Y), r"pixels are in \[1\.0000001, 1\.0000001\]"),
    ("just below 0", lambda p: npz(p, x=np.float32([[-1e-9], [1]]), y=Y), r"pixels are in \[-1e-09, 1\.0\]"),
    ("nan", lambda p: npz(p, x=np.float32([[0], [np.nan]]), y=Y), r"pixels are not all finite, .* in input 1; remove"),
    ("inf", lambda p: npz(p, x=np.float32([[np.inf], [0]]), y=Y), r"pixels are not all finite, .* in input 0; remove"),
    ("-inf", lambda p: npz(p, x=np.float16([[0], [-np.inf]]), y=Y), r"pixels are not all finite, .* in input 1; remove"),
    ("labels are floats", lambda p: npz(p, x=X, y=Y * 1.0), r"labels are \(2,\) of type float64; save one integer per input"),
    ("labels are booleans", lambda p: npz(p, x=X, y=Y > 0), r"labels are \(2,\) of type bool; save"),
    ("labels are one-hot", lambda p: npz(p, x=X, y=np.eye(2, dtype=int)), r"labels are \(2, 2\) of type int64; save"),
    ("labels are negative", lambda p: npz(p, x=X, y=Y - 1), r"labels are in \[-1, 0\]; number the classes from 0"),
    ("labels are enormous", lambda p: npz(p, x=X, y=np.array([0, 2**63], dtype=np.uint64)), r"labels are in \[0, 9223372036854775808\]; number"),
    ("labels are too few", lambda p: npz(p, x=X, y=Y[:1]), r"there are 2 inputs and 1 labels; save one label per input"),
    ("npz bomb", lambda p: raw_npz(p, shape="(1000000, 3, 224, 224)"), r"would take 561 GiB, more than the 16 allowed; split"),
    ("npz bomb in few sizes", lambda p: raw_npz(p, shape=f"({2**62}, {2**62})"), r"GiB, more than the 16 allowed"),
    ("npz shorter than it says", lambda p: raw_npz(p, shape="(2, 5)"), r"x claims to be \(2, 5\) of uint8, and the file holds \d+ bytes for it; save"),
    ("npz longer than it says", lambda p: raw_npz(p, shape="(2, 3)"), r"x claims to be \(2, 3\) of uint8, and the file holds"),
    ("npz with two negative sizes", lambda p: raw_npz(p, shape="(-2, -4)"), r"is damaged"),
    ("npz with a negative size", lambda p: raw_npz(p, shape="(-1, 8)"), r"x claims to be \(-1, 8\)"),
    ("npz with a shape that is no shape", lambda p: raw_npz(p, shape="'abc'"), r"is damaged .*shape is not valid"),
    ("npz with no dtype", lambda p: raw_npz(p, descr="zzz"), r"is damaged"),
    ("npz with another header version", lambda p: raw_npz(p, version=(9, 9)), r"is damaged"),
    ("mnist absent", lambda p: f"mnist:{p / 'no'}", r"there is no folder .*no; give"),
    ("mnist of another split", lambda p: mnist(p) + ":val", r"there is no folder .*:val; give"),
    ("mnist in an empty folder", lambda p: f"mnist:{p}", r"there is no t10k-images-idx3-ubyte \(or \.gz\) in .*; put"),
    ("mnist without the training set", lambda p: mnist(p) + ":train", r"there is no train-images-idx3-ubyte"),
    ("idx with the magic of labels", lambda p: mnist(p, b"\0\0\x08\x01" + IMAGES[4:]), r"images-idx3-ubyte starts with 0x00000801, .* with 0x00000803; copy"),
    ("idx of floats", lambda p: mnist(p, b"\0\0\x0d\x03" + IMAGES[4:]), r"starts with 0x00000d03"),
    ("idx of other images", lambda p: mnist(p, PIXELS[:, 0, :, :27]), r"6 entries of shape \(28, 27\), expected at least one of \(28, 28\); copy"),
    ("idx of no images", lambda p: mnist(p, PIXELS[:0, 0], LABELS[:0]), r"0 entries of shape \(28, 28\), expected at least one"),
    ("idx without a header", lambda p: mnist(p, IMAGES[:10]), r"images-idx3-ubyte cannot be read, is damaged or cut off"),
    ("idx cut off", lambda p: mnist(p, IMAGES[:-1]), r"images-idx3-ubyte claims to hold \(6, 28, 28\) and is cut off; copy"),
    ("idx that is too long", lambda p: mnist(p, IMAGES + b"\0"), r"claims to hold \(6, 28, 28\) and is longer; copy"),
    ("idx bomb", lambda p: mnist(p, struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)), r"would take 1\.25e\+04 GiB, more than the 16 allowed"),
    ("idx with other counts", lambda p: mnist(p, labels=LABELS[:5]), r"there are 6 images and 5 labels; take"),
    ("idx labels cut off", lambda p: mnist(p, labels=idx_bytes(LABELS)[:-2]), r"labels-idx1-ubyte claims to hold \(6,\) and is cut off"),
    ("idx label 10", lambda p: mnist(p, labels=LABELS + 1), r"there is a label 10, and the classes are 0 to 9; copy"),
    ("idx.gz is not gzip", lambda p: f"mnist:{written(p / 't10k-images-idx3-ubyte.gz', IMAGES).parent}", r"ubyte\.gz cannot be read, is damaged"),
    ("cifar10 of nothing", lambda p: "cifar10:", "names no data set"),
    ("cifar10 absent", lambda p: f"cifar10:{p / 'no'}", r"there is no folder .*no; give"),
    ("cifar10 in an empty folder", lambda p: f"cifar10:{p}", r"there is no test_batch\.bin in .*; put the binary version of CIFAR-10 there$"),
    ("cifar10 without a batch", lambda p: cifar10(p, *(f"data_batch_{i}.bin" for i in (1, 2, 4, 5))) + ":train", r"there is no data_batch_3\.bin in .*; put"),
    ("cifar10, pickled", lambda p: cifar10(p, "test_batch"), r"there is no test_batch\.bin .* is the python version, and its pickles can run code; put"),
    ("cifar10, pickled archive", lambda p: cifar10(p / "cifar-10-batches-py", "test_batch").removesuffix("/cifar-10-batches-py"), r"its pickles can run code"),
    ("cifar10 of no images", lambda p: cifar10(p, images=TINY[:0], labels=LABELS[:0]), r"test_batch\.bin has 0 bytes, which is no whole number of records"),
    ("cifar10 label 10", lambda p: cifar10(p, labels=LABELS + 1), r"there is a label 10, and the classes are 0 to 9; copy"),
    ("cifar10 cut off", lambda p: f"cifar10:{written(p / 'test_batch.bin', bytes(6145)).parent}", r"has 6145 bytes, which is no whole number of records"),
    ("folder absent", lambda p: f"folder:{p / 'no'}", r"there is no folder .*no; give"),
    ("folder is a file", lambda p: f"folder:{written(p / 'f', b'')}", r"there is no folder .*f; give"),
    ("folder without sub-folders", lambda p: f"folder:{picture(p / 'a.png', gray(0)).parent}", r"there are no sub-folders in .*; put the images of each class"),
    ("folder with an empty class", lambda p: f"folder:{written(p / 'b' / 'c.txt', b'').parent.parent}", r"there are no images .* in .*b; every sub-folder"),
    ("two sizes", lambda p: pictures(p, a__0=gray(0), b__0=colour(2, 5, 7), b__1=gray(1, 3, 3)), r"b.0\.png is 7x5 .* before it are 4x5; bring"),
    ("text as image", lambda p: one_image(p, b"hello"), r"b\.png cannot be decoded \(cannot identify image file"),
    ("empty image", lambda p: one_image(p, b""), r"b\.png cannot be decoded"),
    ("program as image", lambda p: one_image(p, b"%!PS-Adobe-3.0 EPSF-3.0"), r"b\.png cannot be decoded \(cannot identify"),
    ("png bomb", lambda p: one_image(p, empty_png(60000, 60000)), r"b\.png cannot be decoded .*decompression bomb"),
    ("png that may be a bomb", lambda p: one_image(p, empty_png(10000, 10000)), r"b\.png cannot be decoded .*decompression bomb"),
    ("png without pixels", lambda p: one_image(p, empty_png(10, 10)), r"b\.png cannot be decoded"),
    ("16 bits", lambda p: pictures(p, a__0=gray(0).astype(np.uint16) * 257), r"0\.png has more than 8 bits per pixel \(pillow's mode I(;16)?\); save"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refusals_are_one_sentence(tmp_path, make, message):
    spec = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load(spec)
    sentence = str(caught.value)
    assert sentence.startswith(f"{spec}: ")
    assert "; " in sentence  # what was found; what to do
    assert "\n" not in sentence
    assert not sentence.endswith(".")


def test_a_channel_count_that_no_image_has(tmp_path):
    with pytest.raises(DataError, match=r"inputs are \(3, 5, 4\) and the model takes \(4, 5, 4\)"):
        load(pictures(tmp_path, a__0=colour(0)), (4, 5, 4))


def test_the_limit_holds_for_a_folder_and_is_not_far_off(tmp_path, monkeypatch):
    spec = pictures(tmp_path, a__0=colour(0), a__1=colour(1))
    monkeypatch.setattr(data, "MAX_BYTES", 2 * 5 * 4 * 3 * 4)
    assert len(load(spec)) == 2
    monkeypatch.setattr(data, "MAX_BYTES", 2 * 5 * 4 * 3 * 4 - 1)
    with pytest.raises(DataError, match=r"\(2, 5, 4, 3\) would take .* GiB, more than"):
        load(spec)


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    spec = npz(tmp_path, x=np.array([Bomb(tmp_path / "made")]), y=Y[:1])
    with pytest.raises(DataError, match="object"):
        load(spec)
    assert not (tmp_path / "made").exists()
    with np.load(spec, allow_pickle=True) as archive:
        archive["x"]
    assert (tmp_path / "made").exists()  # the file was dangerous


# --- damage at random places: a refusal or a data set, and nothing else


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, or the end cut off, or a piece cut out or doubled."""
    start, stop = sorted(int(place) for place in rng.integers(0, len(content), size=2))
    match rng.integers(0, 6):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[stop:]
        case 2:
            return content[:stop] + content[start:]
        case _:
            changed = bytearray(content)
            for place in rng.integers(0, len(content), size=rng.integers(1, 4)):
                changed[place] ^= int(rng.integers(1, 256))
            return bytes(changed)


def fuzz_npz(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    return npz(folder, x=PIXELS[:2, 0, :5, :5], y=LABELS[:2]), folder / "set.npz"


def fuzz_stored_npz(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    np.savez(folder / "set.npz", x=PIXELS[:2, 0, :5, :5] / 255.0, y=LABELS[:2])
    return str(folder / "set.npz"), folder / "set.npz"


def fuzz_idx(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    return mnist(folder, PIXELS[:1, 0] // 128, LABELS[:1]), folder / "t10k-images-idx3-ubyte"


def fuzz_idx_labels(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    return mnist(folder), folder / "t10k-labels-idx1-ubyte"


def fuzz_idx_gz(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    return mnist(folder, PIXELS[:1, 0] // 128, LABELS[:1], suffix=".gz"), folder / "t10k-images-idx3-ubyte.gz"


def fuzz_cifar10(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    return cifar10(folder), folder / "test_batch.bin"


def fuzz_image(suffix: str):
    def make(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
        return f"folder:{folder}", picture(folder / "0" / f"a{suffix}", colour(0, 8, 8))

    return make


CHECKSUMMED = {"npz": fuzz_npz, "npz, stored": fuzz_stored_npz, "idx.gz": fuzz_idx_gz}
UNPROTECTED = {
    "idx": fuzz_idx,
    "idx labels": fuzz_idx_labels,
    "cifar10": fuzz_cifar10,
    **{f"image{suffix}": fuzz_image(suffix) for suffix in (".png", ".jpg", ".gif", ".bmp")},
}


@pytest.mark.parametrize("name", [*CHECKSUMMED, *UNPROTECTED])
def test_damaged_files_are_refused_or_read(tmp_path, name):
    spec, path = {**CHECKSUMMED, **UNPROTECTED}[name](tmp_path)
    content, whole = path.read_bytes(), load(spec)
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(200):
        path.write_bytes(damaged(content, rng))
        try:
            dataset = load(spec)
        except DataError as error:
            refused.append(str(error))
        else:
            check(dataset)
            assert name in UNPROTECTED or dataset.sha256 == whole.sha256  # with a checksum, what is not refused is unchanged
    assert len(refused) >= 20
    assert all(sentence.startswith(f"{spec}: ") and "\n" not in sentence for sentence in refused)


def test_measurements_state_their_range(tmp_path):
    x, y = np.linspace(-3, 4, 15).reshape(3, 5), np.arange(3)
    np.savez(tmp_path / "a.npz", x=x, y=y, range=np.array([-3.0, 4.0]))
    assert (data.load(str(tmp_path / "a.npz"), (5,)).inputs == x.astype(np.float32)).all()
    for wrong in (np.array([-1.0, 4.0]), np.array([4.0, -3.0]), np.array([0.0]), np.array([-3.0, np.nan])):
        np.savez(tmp_path / "a.npz", x=x, y=y, range=wrong)
        with pytest.raises(DataError, match="range"):
            data.load(str(tmp_path / "a.npz"), (5,))
