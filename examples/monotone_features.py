"""In which measurements is a prediction proved to rise or to fall? A small network on scikit-learn's breast cancer data, and no patient that it was trained on.

    python examples/monotone_features.py

Two questions, each answered by bounds of all Jacobians on a box. Near a patient: with every measurement within a fraction of its standard deviation, does the
logit of "malignant" not fall (or not rise) in this one? Over its range: with all others as they are, does it not fall (or not rise) in this one anywhere
between the smallest and the largest value of the training set? What is printed is proved for the network; it says nothing of the disease.
"""

import argparse
import dataclasses
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import certify

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


@dataclasses.dataclass(frozen=True)
class Patients:
    """Measurements in units of their standard deviation over the training set, about their means there; labels are 1 for malignant."""

    names: tuple[str, ...]
    train: np.ndarray  # (patients, 30)
    test: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def patients(seed: int) -> Patients:
    """Four fifths of the 569 to train on."""
    data = load_breast_cancer()
    order = np.random.default_rng(seed).permutation(len(data.data))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    mean, deviation = data.data[train].mean(axis=0), data.data[train].std(axis=0)
    scaled = (data.data - mean) / deviation
    return Patients(tuple(map(str, data.feature_names)), scaled[train], scaled[test], 1 - data.target[train], 1 - data.target[test])


def trained(data: Patients, activation: str, epochs: int, seed: int) -> nn.Module:
    """A network of one logit, by full batches of Adam with weight decay."""
    torch.manual_seed(seed)
    bend = ACTIVATIONS[activation]
    net = nn.Sequential(nn.Linear(30, 32), bend(), nn.Linear(32, 32), bend(), nn.Linear(32, 1))
    x, y = tensor(data.train), tensor(data.train_labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.1)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y).backward()
        optimizer.step()
    return net.eval()


def tensor(array: np.ndarray) -> Tensor:
    """In the precision of the network."""
    return torch.from_numpy(array.astype(np.float32))


def near(graph: certify.Graph, x: np.ndarray, within: float) -> np.ndarray:  # (30,)
    """The sign of each slope that is proved for all inputs about a patient."""
    return certify.monotone(graph, certify.Box(x - within, x + within)).signs[0]


def over_range(graph: certify.Graph, x: np.ndarray, low: np.ndarray, high: np.ndarray, pieces: int) -> np.ndarray:  # (30,)
    """The sign of each slope that is proved while this measurement alone goes through its range."""
    signs = np.zeros(len(x), dtype=np.int8)
    for j in range(len(x)):
        first, last = x.copy(), x.copy()
        first[j], last[j] = min(low[j], x[j]), max(high[j], x[j])
        signs[j] = certify.monotone(graph, certify.Box(first, last), pieces=pieces, along=j).signs[0, j]
    return signs


def table(names: tuple[str, ...], found: dict[str, np.ndarray]) -> Table:
    """By measurement, for how many patients a sign is proved. `found` has (patients, 30) signs for each question."""
    patients = len(next(iter(found.values())))
    made = Table(title=f'for how many of {patients} patients the logit of "malignant" is proved not to fall (+), not to rise (-)', title_justify="left")
    made.add_column("measurement", no_wrap=True)
    for question in found:
        made.add_column(f"{question} +", justify="right")
        made.add_column("-", justify="right")
    for j, name in enumerate(names):
        made.add_row(name, *(str(int((signs[:, j] == sign).sum())) for signs in found.values() for sign in (1, -1)))
    return made


def main() -> int:
    """Train, ask, and print one table."""
    parser = argparse.ArgumentParser(description="Prove in which measurements a prediction rises or falls, on scikit-learn's breast cancer data.")
    parser.add_argument("--activation", choices=list(ACTIVATIONS), default="relu")
    parser.add_argument("--within", type=float, default=0.2, help="near a patient: so many standard deviations, in every measurement")
    parser.add_argument("--pieces", type=int, default=8, help="cut each range into so many parts, and prove each")
    parser.add_argument("--patients", type=int, default=5, help="so many of the 114 that are held out")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the matrices are small: a second thread only waits")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    data = patients(args.seed)
    net = trained(data, args.activation, args.epochs, args.seed)
    right = (net(tensor(data.test))[:, 0] > 0).numpy() == data.test_labels
    graph = certify.Graph.of(net, (30,))
    asked = data.test[: args.patients]
    low, high = data.train.min(axis=0), data.train.max(axis=0)
    found = {
        f"within {args.within:g}": np.stack([near(graph, x, args.within) for x in asked]),
        "over its range": np.stack([over_range(graph, x, low, high, args.pieces) for x in asked]),
    }
    console = Console()
    console.print(f"{args.activation} network, {100 * right.mean():.1f} % of {len(right)} held-out patients right", highlight=False)
    console.print(table(data.names, found))
    for question, signs in found.items():
        console.print(f"{question}: {100 * np.mean(signs != 0):.1f} % of the slopes have a sign that is proved", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
