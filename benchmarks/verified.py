"""Verified accuracy of published networks: how many images of a test set are proved to keep their class within a radius, and how many attacks leave.

python -m benchmarks.verified [DATA] [--quick] [--json FILE] [--images N] [--seconds S] [--only NAME,...]

DATA, by default the folder that LIPNET_DATA names, holds `models/` with the networks and `sdp_images/{cifar,mnist}/{X,y}_sdp.npy`, the 200 images each that the
verifiers below report about; all of it is part of alpha-beta-CROWN's repository. Every image is certified as by `certify run --method local --radius R
--within 0,1 --norm N` and attacked as by `certify attack --clip`; one that is classified wrongly counts as neither. Seconds are of the processor, for each
image that is classified rightly, loading not included.

The SDP-FO networks take CIFAR images normalised as their authors did, (x - (125.3, 123, 113.9) / 255) / ((63, 62.1, 66.7) / 255), and MNIST images as they are.
Other numbers raise the accuracy on clean images by a few per cent, as they raise the contrast, and lower what is verified.

Peers are figures from the literature, of all 200 images (resnet2b: of all 10,000 test images), on their machines.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import tempfile
import time

import numpy as np
import torch

from benchmarks.rows import Row, parser, show
from certify import attack, data, models, singly
from certify.attack import PGD
from certify.graph import Graph
from certify.local.radius import LocalMargin

Numbers = tuple[float, ...]
CIFAR = (0.4914, 0.4822, 0.4465)
SDP_FO = (tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7)))
ERAN = (CIFAR, (0.2023, 0.1994, 0.2010))
RESNET = (CIFAR, (0.2471, 0.2435, 0.2616))
OVAL = ((0.485, 0.456, 0.406), (0.225,))
MNIST = ((0.1307,), (0.3081,))
CLIPPED = "Clip-and-Verify, arXiv 2512.11087, table 4"
TABLE = "resnet2b's own README"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a question, and what others report: verified accuracies by name, in per cent."""

    name: str
    file: str
    arch: str
    normalisation: tuple[Numbers, Numbers] | None
    images: str  # cifar or mnist
    norm: float
    radius: float
    reported: tuple[tuple[str, float], ...] = ()

    @property
    def question(self) -> str:
        """In words."""
        shown = f"{self.radius * 255:g}/255" if self.images == "cifar" and self.norm == math.inf else f"{self.radius:g}"
        return f"{self.name}, {'l-infinity' if self.norm == math.inf else 'l2'} {shown}"


def cases() -> list[Case]:
    """As in the literature where it has them."""
    small = 2 / 255
    adv = Case("cnn_a_adv", "cifar_cnn_a_adv.model", "cnn_a", SDP_FO, "cifar", math.inf, small, (("beta-CROWN", 45.5), ("BICCOS", 48.5)))
    mix = Case("cnn_a_mix", "cifar_cnn_a_mix.model", "cnn_a", SDP_FO, "cifar", math.inf, small, (("beta-CROWN", 42.0), ("BICCOS", 48.0)))
    mnist = Case("mnist_cnn_a_adv", "mnist_cnn_a_adv.model", "cnn_a", None, "mnist", math.inf, 0.1)
    return [
        adv,
        mix,
        mnist,
        dataclasses.replace(mnist, radius=0.3, reported=(("beta-CROWN", 71.0), ("BICCOS", 76.0))),
        Case("resnet2b", "resnet2b.pth", "resnet2b", RESNET, "cifar", math.inf, small, (("CROWN", 26.88),)),
        Case("conv_small_pgd", "cifar_conv_small_pgd.pth", "conv_small", ERAN, "cifar", math.inf, small),
        Case("oval base", "cifar_base.pth", "cnn_a", OVAL, "cifar", math.inf, small),
        Case("oval wide", "cifar_wide.pth", "cnn_a", OVAL, "cifar", math.inf, small),
        Case("mnist_conv_small_nat", "mnist_conv_small_nat.pth", "conv_small", MNIST, "mnist", math.inf, 0.1),
        dataclasses.replace(adv, norm=2.0, radius=0.1, reported=()),
        dataclasses.replace(adv, norm=2.0, radius=0.25, reported=()),
        dataclasses.replace(mnist, norm=2.0, radius=0.25),
    ]


@dataclasses.dataclass(frozen=True)
class Found:
    """Counts of one case, and seconds of the processor for each image that is classified rightly."""

    question: str
    images: int
    clean: int
    certified: int
    attacked: int
    certify_seconds: float
    attack_seconds: float

    @property
    def left(self) -> int:
        """What the attack leaves: no proof can reach more."""
        return self.clean - self.attacked


def images(folder: pathlib.Path, kind: str, shape: tuple[int, ...], count: int) -> data.Dataset:
    """The first ones, as `certify run FILE.npz` has them."""
    x, y = (np.load(folder / "sdp_images" / kind / f"{name}_sdp.npy")[:count] for name in ("X", "y"))
    with tempfile.TemporaryDirectory() as place:
        file = pathlib.Path(place) / "images.npz"
        np.savez(file, x=np.ascontiguousarray(np.moveaxis(x.astype(np.float32), 3, 1)), y=y.astype(np.int64))
        return data.load(str(file), shape)


def measure(folder: pathlib.Path, case: Case, count: int, seconds: float, attack_steps: int) -> Found:
    """Certify and attack; an attack that is nearer than a certificate is the end of the run."""
    mean, std = case.normalisation or (None, None)
    model = models.load(str(folder / "models" / case.file), arch=case.arch, mean=mean, std=std)
    graph, dataset = Graph.of(model.net, model.shape), images(folder, case.images, model.shape, count)
    method = LocalMargin(case.radius, case.norm, within=(0.0, 1.0), seconds=seconds)
    seen, attacks = method.see(graph), [PGD(norm=case.norm, steps=attack_steps, clip=True)]
    clean = certified = attacked = 0
    spent = [0.0, 0.0]
    for index in range(len(dataset)):
        start = time.process_time()
        row = singly.row(method, graph, seen, dataset, index)
        if row["prediction"] != row["label"]:
            continue
        middle = time.process_time()
        near = attack.row(graph, dataset, attacks, index)["radius"]
        clean, certified = clean + 1, certified + (row["radius"] > case.radius)
        attacked += near is not None and near <= case.radius
        spent = [spent[0] + middle - start, spent[1] + time.process_time() - middle]
        if near is not None and near < row["radius"]:
            raise SystemExit(f"{case.question}: image {index} is certified to {row['radius']} and attacked at {near}; please report this")
    return Found(case.question, len(dataset), clean, certified, attacked, *(part / max(1, clean) for part in spent))


def rows_of(case: Case, found: Found) -> list[Row]:
    """Against what the attack leaves, and against the literature."""
    rows = [Row(f"{found.question}: certified / left by the attack, of {found.images}", found.certified, found.left, ">= 0.9")] if found.left else []
    share = 100 * found.certified / found.images
    return rows + [Row(f"{found.question}: certified % of {found.images} / {name} % of all", share, value, ">= 1") for name, value in case.reported]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__ or "")
    made.add_argument("data", nargs="?", default=os.environ.get("LIPNET_DATA"), metavar="DATA", help="the folder with models/ and sdp_images/")
    made.add_argument("--images", type=int, default=200, metavar="N", help="the first N of 200 (default all)")
    made.add_argument("--seconds", type=float, default=60.0, metavar="S", help="for each image (default 60)")
    made.add_argument("--only", metavar="NAME,...", help="networks by name")
    args = made.parse_args()
    if args.data is None or not (pathlib.Path(args.data) / "sdp_images").is_dir():
        raise SystemExit(f"{args.data}: there is no folder sdp_images in it; give the folder with models/ and sdp_images/, or name it by LIPNET_DATA")
    torch.set_num_threads(1)
    count, seconds, steps = (4, 5.0, 20) if args.quick else (args.images, args.seconds, 50)
    print("| network and question | images | clean | certified | attacked | left by the attack | s / image, certify | s / image, attack |")
    print("|---|---|---|---|---|---|---|---|")
    table, rows = [], []
    for case in cases():
        if args.only is None or case.name in args.only.split(","):
            found = measure(pathlib.Path(args.data), case, count, seconds, steps)
            counts = f"{found.images} | {found.clean} | {found.certified} | {found.attacked} | {found.left}"
            print(f"| {found.question} | {counts} | {found.certify_seconds:.1f} | {found.attack_seconds:.1f} |", flush=True)
            table.append(found)
            rows += rows_of(case, found)
    if rows:
        show(rows, f"counts and per cent; the literature's are from {CLIPPED}, and {TABLE}", None)
    if args.json:
        shown = [{**dataclasses.asdict(row), "ratio": row.ratio, "met": row.met} for row in rows]
        args.json.write_text(json.dumps({"cases": [dataclasses.asdict(one) for one in table], "rows": shown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
