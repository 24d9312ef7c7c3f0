"""The training scripts run as commands on small data: they train, resume, certify and report, and refuse in one sentence."""

import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def script(name, *args, expect=0):
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *map(str, args), "--threads", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    return done


def images(count, size, seed):
    """(count, size, size, 3): class k is bright in its third of the rows."""
    labels = np.arange(count) % 3
    pixels = np.random.default_rng(seed).integers(0, 100, size=(count, size, size, 3))
    for i, label in enumerate(labels):
        pixels[i, label * size // 3 : (label + 1) * size // 3] += 150
    return pixels.astype(np.uint8), labels


def folders(root, size=8):
    """`train` and `test`, each with a folder of images for each of three classes."""
    for split, count in (("train", 48), ("test", 12)):
        for i, (picture, label) in enumerate(zip(*images(count, size, seed=count), strict=True)):
            path = root / split / "abc"[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return root


def binary(root):
    """The six files of the binary version of CIFAR-10, with few images."""
    root.mkdir(exist_ok=True)
    for name, count in ((*(f"data_batch_{i}" for i in range(1, 6)),), 9), (("test_batch",), 6):
        for seed, stem in enumerate(name):
            pixels, labels = images(count, 32, seed)
            (root / f"{stem}.bin").write_bytes(b"".join(bytes([label]) + x.transpose(2, 0, 1).tobytes() for x, label in zip(pixels, labels, strict=True)))
    return root


def mnist(root):
    """The four files of MNIST, with few images."""
    root.mkdir(exist_ok=True)
    for prefix, count in (("train", 48), ("t10k", 12)):
        pixels, labels = images(count, 28, seed=count)
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels[..., 0].tobytes())
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.astype(np.uint8).tobytes())
    return root


def certified(out):
    """The rows of the results, after a look at what was saved beside them."""
    assert (out / "report.html").stat().st_size > 10_000
    return [json.loads(line) for line in (out / "results/results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["liresnet", "lbdn"])
def test_train_cifar10_on_folders(tmp_path, family):
    out = tmp_path / "out"
    loss = "emma" if family == "liresnet" else "offset"
    command = ("train_cifar10.py", folders(tmp_path / "data"), "-o", out, "--family", family, "--loss", loss, "--batch", 16, "--crop", 1, "--rate", 0.01)
    assert "epoch 6/6" in script(*command, "--epochs", 6).stderr
    rows = certified(out)
    assert len(rows) == 12
    assert np.mean([row["prediction"] == row["label"] for row in rows]) > 0.6
    assert "epoch" not in script(*command, "--epochs", 6).stderr  # nothing is left to train
    assert "another recipe" in script(*command, "--epochs", 7, expect=2).stderr


def test_train_cifar10_on_the_binary_files(tmp_path):
    out = tmp_path / "out"
    script("train_cifar10.py", binary(tmp_path / "data"), "-o", out, "--epochs", 1, "--batch", 16, "--limit", 2)
    assert [row["index"] for row in certified(out)] == [0, 3]


def test_train_cifar10_refuses_in_one_sentence(tmp_path):
    data = folders(tmp_path / "data")
    assert "--loss emma" in script("train_cifar10.py", data, "--family", "liresnet", "--loss", "offset", expect=2).stderr
    assert "put the binary version of CIFAR-10" in script("train_cifar10.py", tmp_path, "-o", tmp_path / "out", expect=2).stderr
    (data / "test" / "c").rename(data / "test" / "d")
    assert "they must be the same" in script("train_cifar10.py", data, "-o", tmp_path / "out", expect=2).stderr


def test_train_mnist(tmp_path):
    out = tmp_path / "out"
    script("train_mnist.py", mnist(tmp_path / "data"), "-o", out, "--width", 16, "--epochs", 6, "--batch", 16)
    assert np.mean([row["prediction"] == row["label"] for row in certified(out)]) > 0.6


def test_monotone_features():
    done = script("monotone_features.py", "--epochs", 20, "--patients", 1, "--pieces", 2, "--within", 0.05)
    assert "worst perimeter" in done.stdout
    assert float(done.stdout.split("relu network, ")[1].split(" %")[0]) > 85
    for question in ("within 0.05", "over its range"):
        assert float(done.stdout.split(f"{question}: ")[1].split(" %")[0]) > 40
