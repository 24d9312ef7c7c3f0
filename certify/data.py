"""Data sets named by a short text: `digits`, `FILE.npz`, `mnist:DIR`, `cifar10:DIR`, `folder:DIR`. Inputs come out in [0, 1], before any normalisation.

Files are data that nobody vouches for: nothing in them is executed, sizes are checked before memory is set aside, and whatever is wrong with them is one
sentence, a `DataError`. Nothing is resized, cropped, rescaled or reordered silently; mean and std belong to the model (`lipnet.Normalize`).
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import os
import pathlib
import struct
import warnings
import zipfile
import zlib

import numpy as np

FORMS = (
    "digits", "digits:train", "FILE.npz", "mnist:DIR", "mnist:DIR:train", "fashion-mnist:DIR", "fashion-mnist:DIR:train",
    "cifar10:DIR", "cifar10:DIR:train", "folder:DIR",
)  # fmt: skip
MAX_BYTES = 16 * 2**30  # of the inputs, as float32: a small file can claim to unpack to anything
_UNPACKED, _RATIO = 2**30, 200  # bytes that a packed file may always unpack to, and beyond that, times its own size
_DIGITS = tuple("0123456789")
_IDX_CLASSES = {
    "mnist": _DIGITS,
    "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
}
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")  # pillow goes by the content; of its other formats some start programs (EPS)


class DataError(ValueError):
    """One sentence: what was asked, what was found, what to do next."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs in the units of the data, labels, and what identifies them."""

    spec: str  # as it was asked for
    inputs: np.ndarray  # (N, ...) float32, in [0, 1], N >= 1
    labels: np.ndarray  # (N,) int64, >= 0
    sha256: str  # of the inputs' and labels' dtype, shape and bytes
    classes: tuple[str, ...] | None  # classes[label] is its name, where known

    def __len__(self) -> int:
        return len(self.labels)


def load(spec: str | os.PathLike[str], shape: tuple[int, ...] | None = None) -> Dataset:
    """The data set that `spec` names (see `FORMS`); each input gets the model's `shape`, if the two differ by no more than ones or by being flat.

    Raises `DataError` for a form that is not known, a file that is missing, damaged or too large, pixels outside [0, 1], and inputs that do not fit `shape`.
    """
    spec = os.fspath(spec)
    kind, _, where = spec.partition(":")
    if spec in ("digits", "digits:train", "digits:test"):
        return _dataset(spec, *_digits(spec), _DIGITS, shape)
    if kind in _IDX_CLASSES and where:
        return _dataset(spec, *_mnist(spec, where), _IDX_CLASSES[kind], shape)
    if kind == "cifar10" and where:
        return _dataset(spec, *_cifar10(spec, where), _CIFAR10_CLASSES, shape)
    if kind == "folder" and where:
        return _dataset(spec, *_folder(spec, where, shape), shape)
    if spec.lower().endswith(".npz"):
        return _dataset(spec, *_npz(spec), None, shape)
    raise DataError(f"{spec}: this names no data set; {_meant(spec)}the known forms are {', '.join(FORMS)}")


def _meant(spec: str) -> str:
    """What to do with files that others write, or with a folder."""
    if pathlib.Path(os.path.expanduser(spec)).is_dir():
        return f"for a folder say what is in it, such as folder:{spec} where it has a sub-folder of images for each class; "
    if spec.lower().endswith((".npy", ".csv", ".pt", ".pth", ".pkl", ".mat", ".h5")):
        return "save inputs and labels together, numpy.savez('FILE.npz', x=inputs, y=labels); "
    return ""


def digits(split: str) -> Dataset:
    """The 8x8 digits of scikit-learn as (N, 64): "train" has 1,437 of them, "test" the 360 others, always the same ones."""
    if split not in ("train", "test"):
        raise DataError(f"digits:{split}: there is no such split; give train or test")
    return load(f"digits:{split}")


def _dataset(spec: str, inputs: np.ndarray, labels: np.ndarray, classes: tuple[str, ...] | None, shape: tuple[int, ...] | None) -> Dataset:
    inputs = np.ascontiguousarray(_fit(spec, inputs, shape), dtype=np.float32)
    labels = labels.astype(np.int64)
    return Dataset(spec, inputs, labels, _digest(inputs, labels), classes)


def _digest(*arrays: np.ndarray) -> str:
    """sha256 of every array's dtype, shape and bytes."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(f"{array.dtype.str} {array.shape}".encode())
        hasher.update(array.data.cast("B"))
    return hasher.hexdigest()


def _fit(spec: str, inputs: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """The inputs as (N, *shape): equal shapes, shapes that differ by ones, or one of the two flat. All else would be a guess."""
    found = inputs.shape[1:]
    if shape is None or found == tuple(shape):
        return inputs
    long_found, long_shape = (tuple(size for size in sizes if size != 1) for sizes in (found, shape))
    one_is_flat = min(len(long_found), len(long_shape)) <= 1
    if long_found == long_shape or (one_is_flat and math.prod(found) == math.prod(shape)):
        return inputs.reshape(len(inputs), *shape)
    for axes, order, wanted in (((2, 0, 1), "last", "first"), ((1, 2, 0), "first", "last")):
        if len(found) == 3 and tuple(found[axis] for axis in axes) == tuple(shape):
            transposed = ", ".join(str(axis) for axis in (0, *(axis + 1 for axis in axes)))
            raise DataError(
                f"{spec}: inputs are {found}, channels {order}, and the model takes {tuple(shape)}, channels {wanted}; "
                f"save them in a .npz file as x.transpose({transposed})"
            )
    raise DataError(f"{spec}: inputs are {found} and the model takes {tuple(shape)}; give data of the model's shape, nothing is resized here")


def _unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32, k / 255 correctly rounded."""
    return np.divide(pixels, np.float32(255), dtype=np.float32)


def _check_size(spec: str, sizes: tuple[int, ...], itemsize: int = 4) -> None:
    """Arrays of these sizes may be held in memory, as they are stored and as float32."""
    size = math.prod(sizes) * max(itemsize, 4)
    if size > MAX_BYTES:
        raise DataError(
            f"{spec}: an array of {sizes} would take {size / 2**30:.3g} GiB, more than the {MAX_BYTES / 2**30:.3g} allowed; split it into smaller data sets"
        )


def _check_packed(spec: str, name: str, size: int, packed: int) -> None:
    """A file may unpack to what its size makes credible: pictures of gigabytes take more than a few megabytes."""
    if size > _UNPACKED and size > _RATIO * packed:
        raise DataError(
            f"{spec}: {name} would unpack to {size / 2**30:.3g} GiB from {packed / 2**20:.3g} MiB; no pictures do, so it is not opened: save it uncompressed"
        )


def _existing_folder(spec: str, where: str) -> pathlib.Path:
    path = pathlib.Path(os.path.expanduser(where))
    if not path.is_dir():
        raise DataError(f"{spec}: there is no folder {path}; give the path of an existing one")
    return path


def _reason(error: BaseException) -> str:
    """What went wrong, in one line without a full stop."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def _digits(spec: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"{spec}: these images come with scikit-learn, which is not installed; install it with: pip install 'lipnet[demo]'") from error
    images, labels = load_digits(return_X_y=True)  # (1797, 64), whole numbers 0..16
    order = np.random.default_rng(0).permutation(1797)
    chosen = order[:1437] if spec == "digits:train" else order[1437:]
    return (images[chosen] / 16).astype(np.float32), labels[chosen]


def _npz(spec: str) -> tuple[np.ndarray, np.ndarray]:
    """Arrays `x` and `y`, or `images` and `labels`: (N, ...) uint8 or floats in [0, 1], and (N,) whole numbers of an integer type."""
    path = pathlib.Path(os.path.expanduser(spec))
    if not path.is_file():
        raise DataError(f"{spec}: there is no such file; give the path of a .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            pair = next((pair for pair in (("x", "y"), ("images", "labels")) if found.issuperset(pair)), None)
            if pair is None:
                raise DataError(f"{spec}: the arrays in it are {', '.join(sorted(found)) or 'none'}; save the inputs as x and the labels as y (numpy.savez)")
            inputs, labels = (_npy(spec, archive, name) for name in pair)
            stated = _npy(spec, archive, "range") if "range" in found else None
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have no common word for a damaged file: ValueError, struct.error, NotImplementedError, ...
        raise DataError(f"{spec}: the file is damaged or is not a .npz file ({_reason(error)}); save it again with numpy.savez") from error
    _check_labels(spec, inputs, labels)
    return _pixels(spec, inputs) if stated is None else _measured(spec, inputs, stated), labels


def _measured(spec: str, inputs: np.ndarray, stated: np.ndarray) -> np.ndarray:
    """Numbers that are no pictures, in a range that their file states: as they are, and radii are in their units."""
    if stated.shape != (2,) or stated.dtype.kind not in "iuf" or not (np.isfinite(stated).all() and stated[0] < stated[1]):
        raise DataError(f"{spec}: its array 'range' is not a smallest and a larger largest number; save it as numpy.array([low, high])")
    if inputs.dtype.kind != "f" or not (np.isfinite(inputs).all() and stated[0] <= inputs.min() and inputs.max() <= stated[1]):
        raise DataError(f"{spec}: inputs of type {inputs.dtype} are not all within the range {stated.tolist()} that the file states; save floats within it")
    return inputs.astype(np.float32)


def _npy(spec: str, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, after its header has been compared with the room it takes in the archive and with `MAX_BYTES`. Objects (pickles) are refused."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy remarks on headers written by Python 2 and on old names of dtypes
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        sizes, _, dtype = read_header(member)
        header_bytes = member.tell()
    if dtype.kind not in "biuf":
        raise DataError(f"{spec}: {name} holds values of type {dtype}; save x as uint8 or as floats in [0, 1], and y as integers")
    _check_size(spec, sizes, dtype.itemsize)
    if header_bytes + math.prod(sizes) * dtype.itemsize != info.file_size:
        raise DataError(f"{spec}: {name} claims to be {sizes} of {dtype}, and the file holds {info.file_size} bytes for it; save it again with numpy.savez")
    _check_packed(spec, name, info.file_size, info.compress_size)
    with archive.open(info) as member, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.lib.format.read_array(member, allow_pickle=False)


def _check_labels(spec: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    """One class number per input."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{spec}: labels are {labels.shape} of type {labels.dtype}; save one integer per input, of shape (N,)")
    if inputs.ndim < 2 or not inputs.size:
        raise DataError(f"{spec}: inputs are {inputs.shape}; save at least one, as an array of shape (N, ...)")
    if len(inputs) != len(labels):
        raise DataError(f"{spec}: there are {len(inputs)} inputs and {len(labels)} labels; save one label per input")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest > np.iinfo(np.int64).max:
        raise DataError(f"{spec}: labels are in [{lowest}, {highest}]; number the classes from 0")


def _pixels(spec: str, inputs: np.ndarray) -> np.ndarray:
    """(N, ...) float32 in [0, 1], from uint8 or from floats that are there already."""
    if inputs.dtype == np.uint8:
        return _unit(inputs)
    if inputs.dtype.kind != "f":
        raise DataError(f"{spec}: inputs are of type {inputs.dtype}; save them as uint8, or as floats in [0, 1]")
    with np.errstate(invalid="ignore"):
        lowest, highest = inputs.min(), inputs.max()  # both are NaN if one input is
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        first = int(np.argmin(np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)))
        raise DataError(f"{spec}: pixels are not all finite, the first NaN or infinity is in input {first}; remove such inputs")
    if lowest < 0:
        raise DataError(
            f"{spec}: pixels are in [{lowest!s}, {highest!s}]; data must be in [0, 1] before normalisation; "
            "put the mean and std into the model (lipnet.Normalize) instead, or save an array 'range' beside measurements that are no pictures"
        )
    if highest > 1:
        raise DataError(f"{spec}: pixels are in [{lowest!s}, {highest!s}]; data must be in [0, 1]; save them as uint8, or divide by the largest possible value")
    return inputs.astype(np.float32)


def _mnist(spec: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, 28, 28) and (N,), from the four files of MNIST and of the data sets that took over their names."""
    where, split = _split(where)
    folder = _existing_folder(spec, where)
    prefix = "train" if split == "train" else "t10k"
    images = _idx(spec, folder, f"{prefix}-images", (28, 28))
    labels = _idx(spec, folder, f"{prefix}-labels", ())
    if len(images) != len(labels):
        raise DataError(f"{spec}: there are {len(images)} images and {len(labels)} labels; take the two files from the same source")
    if labels.max() > 9:
        raise DataError(f"{spec}: there is a label {labels.max()}, and the classes are 0 to 9; copy the file of labels again from its source")
    return _unit(images[:, np.newaxis]), labels


def _split(where: str) -> tuple[str, str]:
    """`DIR:train` and `DIR:test` as the folder and the split, which is test without either: a colon may also be part of a path."""
    head, _, tail = where.rpartition(":")
    return (head, tail) if head and tail in ("train", "test") else (where, "test")


def _cifar10(spec: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 32, 32) and (N,), from the binary version of CIFAR-10, in the folder or in the one that its archive unpacks to."""
    where, split = _split(where)
    folder = _existing_folder(spec, where)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if not (folder / names[0]).is_file() and (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = (folder / "cifar-10-batches-py").is_dir() or (folder / missing[0].removesuffix(".bin")).is_file()
        found = "what is there is the python version, and its pickles can run code; put the binary version" if pickled else "put the binary version of CIFAR-10"
        raise DataError(f"{spec}: there is no {missing[0]} in {folder}; {found} there")
    records = np.concatenate([_cifar10_file(spec, folder / name) for name in names])
    _check_size(spec, (len(records), 3, 32, 32))
    if records[:, 0].max() > 9:
        raise DataError(f"{spec}: there is a label {records[:, 0].max()}, and the classes are 0 to 9; copy the files again from their source")
    return _unit(records[:, 1:].reshape(-1, 3, 32, 32)), records[:, 0]


def _cifar10_file(spec: str, path: pathlib.Path) -> np.ndarray:
    """(N, 3073) uint8, N >= 1: records of a label and 3 x 32 x 32 pixels, one after the other, and nothing more."""
    again = "copy the file again from its source"
    try:
        size = path.stat().st_size
        if size == 0 or size % 3073:
            raise DataError(f"{spec}: {path.name} has {size} bytes, which is no whole number of records of 3073; {again}")
        _check_size(spec, (size // 3073, 3, 32, 32))
        return np.frombuffer(path.read_bytes(), dtype=np.uint8).reshape(-1, 3073)
    except (OSError, MemoryError) as error:
        raise DataError(f"{spec}: {path.name} cannot be read ({_reason(error)}); {again}") from error


def _idx(spec: str, folder: pathlib.Path, stem: str, one: tuple[int, ...]) -> np.ndarray:
    """(N, *one) uint8, N >= 1. An IDX file: the bytes 0 0 8 d (8 is uint8), d sizes as big-endian uint32, the values in C order, and nothing more."""
    d = 1 + len(one)
    names = [f"{stem}{sign}idx{d}-ubyte{suffix}" for suffix in ("", ".gz") for sign in "-."]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{spec}: there is no {names[0]} (or .gz) in {folder}; put the files of the data set there")
    again = "copy the file again from its source"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic, *sizes = struct.unpack(f">{1 + d}I", file.read(4 + 4 * d))
            if magic != 0x800 + d:
                raise DataError(f"{spec}: {path.name} starts with {magic:#010x}, an IDX file of this kind with {0x800 + d:#010x}; {again}")
            if tuple(sizes[1:]) != one or sizes[0] == 0:
                raise DataError(f"{spec}: {path.name} claims to hold {sizes[0]} entries of shape {tuple(sizes[1:])}, expected at least one of {one}; {again}")
            _check_size(spec, tuple(sizes))
            _check_packed(spec, path.name, math.prod(sizes), path.stat().st_size if path.suffix == ".gz" else math.prod(sizes))
            values = file.read(math.prod(sizes) + 1)  # one more than there should be; a .gz file compares its checksum at its end
    except (OSError, EOFError, MemoryError, struct.error, zlib.error) as error:
        raise DataError(f"{spec}: {path.name} cannot be read, is damaged or cut off ({_reason(error)}); {again}") from error
    if len(values) != math.prod(sizes):
        raise DataError(f"{spec}: {path.name} claims to hold {tuple(sizes)} and is {'longer' if len(values) > math.prod(sizes) else 'cut off'}; {again}")
    return np.frombuffer(values, dtype=np.uint8).reshape(sizes)


def _folder(spec: str, where: str, shape: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(N, channels, height, width), (N,) and the sub-folders' names, sorted; in each the images sorted by name. All images must have one size.

    With 1 or 3 channels in the model's `shape` the images are converted to gray (pillow's luma) or RGB; else they are RGB, unless all of them are gray.
    Transparency is dropped, EXIF orientation is not applied.
    """
    root = _existing_folder(spec, where)
    try:
        classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
        files = [(label, path) for label, name in enumerate(classes) for path in _images_in(spec, root / name)]
    except OSError as error:
        raise DataError(f"{spec}: {error.filename} cannot be read ({_reason(error)}); allow reading it") from error
    if not files:
        raise DataError(f"{spec}: there are no sub-folders in {root}; put the images of each class into a sub-folder with its name")
    mode = {1: "L", 3: "RGB"}.get(shape[0]) if shape is not None and len(shape) == 3 else None
    images: list[np.ndarray] = []  # (height, width) or (height, width, 3), uint8
    for _, path in files:
        images.append(_decode(spec, path, mode))
        height, width = images[0].shape[:2]
        if len(images) == 1:
            _check_size(spec, (len(files), height, width, 3))
        if images[-1].shape[:2] != (height, width):
            raise DataError(
                f"{spec}: {path} is {images[-1].shape[1]}x{images[-1].shape[0]} (width x height) and the images before it are {width}x{height}; "
                "bring them to one size, nothing is resized here"
            )
    if any(image.ndim == 3 for image in images):
        pixels = np.stack([image if image.ndim == 3 else np.stack([image] * 3, axis=2) for image in images]).transpose(0, 3, 1, 2)
    else:
        pixels = np.stack(images)[:, np.newaxis]
    return _unit(pixels), np.array([label for label, _ in files]), classes


def _images_in(spec: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files of one class. None at all is refused: whether the folder is a class decides the labels of all that follow."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file())
    if not files:
        raise DataError(f"{spec}: there are no images ({' '.join(_IMAGE_SUFFIXES)}) in {folder}; every sub-folder is a class, so fill it or move it away")
    return files


def _decode(spec: str, path: pathlib.Path, mode: str | None) -> np.ndarray:
    """The first frame as uint8, (height, width) if `mode` is L and (height, width, 3) if it is RGB; without a mode, whichever the file is."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_IMAGE_FORMATS) as image:
                if image.mode in ("I", "F") or image.mode.startswith("I;"):  # converting these clips at 255
                    raise DataError(f"{spec}: {path} has more than 8 bits per pixel (pillow's mode {image.mode}); save it with 8")
                pixels: np.ndarray = np.asarray(image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB")))
    except DataError:
        raise
    except Exception as error:  # pillow's decoders have no common word for a damaged file: OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"{spec}: {path} cannot be decoded ({_reason(error)}); replace it or move it away") from error
    return pixels
