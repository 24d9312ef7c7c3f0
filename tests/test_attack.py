"""Attacks: near the exact distance and never below it, between certificates and the truth, looked at again, and refused as proofs."""

import dataclasses
import importlib.util
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
from certify import data
from certify.attack import Attack, Foolbox, distance
from certify.cli import main
from certify.errors import CertifyError

NORMS = (2.0, math.inf)
LIMIT = "24"


def has_foolbox():
    try:
        return importlib.util.find_spec("foolbox") is not None and bool(__import__("foolbox"))
    except ImportError:
        return False


def has_autoattack():
    return importlib.util.find_spec("pyautoattack") is not None


needs_foolbox = pytest.mark.skipif(not has_foolbox(), reason="foolbox is not installed")


def linear():
    torch.manual_seed(0)
    return nn.Linear(12, 5).eval(), torch.rand(6, 12)


def exact_distances(net, x, norm):
    """min_j (z_i - z_j) / |w_i - w_j| in the dual norm."""
    w, z = net.weight.detach().double().numpy(), net.double()(x.double()).detach().numpy()
    found = []
    for row, i in zip(z, z.argmax(1), strict=True):
        sizes = np.linalg.norm(w[i] - w, ord=2 if norm == 2 else 1, axis=1)
        found.append(min((row[i] - row[j]) / sizes[j] for j in range(len(w)) if j != i))
    return found


def distances(net, x, *attacks):
    return [found.distance.value for found in certify.falsify(net, x, *attacks)]


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_is_met_from_above(norm):
    net, x = linear()
    found = distances(net, x, certify.PGD(norm=norm))
    exact = exact_distances(net, x, norm)
    assert all(truth < value < 1.01 * truth for value, truth in zip(found, exact, strict=True))
    with torch.no_grad():
        net.weight *= 2
        net.bias *= 2.5
    exact = exact_distances(net, x, norm)
    assert all(truth < value < 1.01 * truth for value, truth in zip(distances(net, x, certify.PGD(norm=norm)), exact, strict=True))


@needs_foolbox
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "norm"), [("ddn", 2), ("pgd", 2), ("pgd", math.inf), ("deepfool", 2), ("deepfool", math.inf), ("fmn", 2), ("fmn", math.inf)])
def test_foolbox_is_never_below_the_exact_distance(name, norm):
    net, x = linear()
    exact = exact_distances(net, x, norm)
    found = distances(net.float(), x, certify.Foolbox(name, norm=norm))
    assert all(truth < value for value, truth in zip(found, exact, strict=True))
    assert name == "fmn" or all(value < 2 * truth for value, truth in zip(found, exact, strict=True))  # fmn with its own step is far off here
    both = distances(net, x, certify.Foolbox(name, norm=norm), certify.PGD(norm=norm))
    assert all(truth < value < 1.01 * truth for value, truth in zip(both, exact, strict=True))


def test_distances_are_rounded_up():
    generator = np.random.default_rng(0)
    for scale in (1e-200, 1e-9, 1.0, 1e9):
        x, point = generator.normal(size=30), generator.normal(size=30)
        point = x + scale * point
        gaps = [Fraction(a) - Fraction(b) for a, b in zip(point.tolist(), x.tolist(), strict=True)]
        assert Fraction(distance(point, x, 2)) ** 2 >= sum(gap**2 for gap in gaps)
        assert Fraction(distance(point, x, math.inf)) >= max(map(abs, gaps))
        assert distance(point, x, 2) <= np.linalg.norm(point - x) * (1 + 1e-14) + 1e-161
    assert distance(x, x, 2) == distance(x, x, math.inf) == 0.0


@dataclasses.dataclass(frozen=True)
class Liar(Attack):
    """Proposes what it is given, and says that it is adversarial."""

    points: tuple = ()
    name = "liar"

    def propose(self, net, x, z, seed):
        return torch.stack([torch.as_tensor(point, dtype=torch.float64) for point in self.points])


def test_points_count_only_if_the_network_gives_them_another_class():
    net = nn.Linear(2, 2).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        net.bias.zero_()
    x = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    (found,) = certify.falsify(net, x, Liar(points=([0.25, 0.5], [0.0, 0.5], [-1e-12, 0.5], [math.nan, 0.0], [math.inf, 0.0], [1e-3, 0.5])))
    assert (found.prediction, found.other, found.point, found.distance.value) == (0, -1, None, math.inf)  # the tie and what rounding could do are none
    (found,) = certify.falsify(net, x, Liar(points=([-0.75, 0.5], [-0.25, 0.5], [-1e-12, 0.5])))
    assert (found.other, found.point.tolist(), found.distance.norm, found.distance.method) == (1, [-0.25, 0.5], (2, 2), "liar")
    assert 0.5 <= found.distance.value < 0.5 + 1e-12
    (found,) = certify.falsify(net, x, Liar(points=([-0.25, 0.5],), clip=True))
    assert found.point is None
    (found,) = certify.falsify(net, x, certify.PGD(clip=True))
    assert found.point is None  # the boundary is the face x_0 = 0, and nothing in [0, 1] is beyond it
    assert isinstance(found.distance, certify.Estimate)


def test_a_network_that_never_changes_and_one_without_numbers():
    net = nn.Linear(3, 2).eval()
    with torch.no_grad():
        net.weight.zero_()
    assert distances(net, torch.rand(2, 3), certify.PGD(), certify.PGD(seed=1)) == [math.inf, math.inf]
    net = nn.Linear(3, 2).double().eval()
    with torch.no_grad():
        net.weight.fill_(1e308)
    (found,) = certify.falsify(net, torch.full((1, 3), 10.0, dtype=torch.float64), certify.PGD())
    assert (found.prediction, found.distance.value) == (-1, math.inf)


def test_refusals_in_one_sentence(tmp_path, capsys, monkeypatch):
    net, x = linear()
    for make, says in (
        (lambda: certify.PGD(norm=1), "in l2 or in the maximum norm, got norm 1"),
        (lambda: certify.PGD(steps=0), "at least one step"),
        (lambda: certify.PGD(seed=-1), "seed of at least 0"),
        (lambda: certify.Foolbox("x"), "no attack is known by the name 'x'; known are ddn"),
        (lambda: certify.Foolbox("ddn", norm=math.inf), "ddn is an attack in l2"),
        (lambda: certify.falsify(net, x), "at least one"),
        (lambda: certify.falsify(net, x, certify.PGD(), certify.PGD(norm=math.inf)), "one norm"),
        (lambda: certify.falsify(net, x - 1, certify.PGD(clip=True)), r"not in \[0, 1\]"),
    ):
        with pytest.raises(CertifyError, match=says):
            make()
    with pytest.raises(ValueError, match="NaN or infinite"):
        certify.falsify(net, x / 0, certify.PGD())
    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    with pytest.raises(CertifyError, match=r"need the extra lipnet\[attacks\].* take pgd"):
        Foolbox("pgd")
    for options in (["--norm", "1"], ["--attack", "pgd,xyz"]):
        with pytest.raises(SystemExit) as stopped:
            main(["attack", "net.safetensors", "digits", "-o", str(tmp_path / "a"), *options])
        assert stopped.value.code == 2
    assert "no attack is known by the name 'xyz'" in capsys.readouterr().err
    assert main(["attack", "net.safetensors", "digits", "-o", str(tmp_path / "a"), "--attack", "foolbox-ddn"]) == 2
    assert "lipnet[attacks]" in capsys.readouterr().err


# On the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network trained for a second on the digits."""
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.SandwichLinear(64, 20), lipnet.BROLinear(20, 20), lipnet.MaxMin(), nn.Linear(20, 10))
    train = data.digits("train")
    x, y = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=0.02), nn.CrossEntropyLoss()
    for _ in range(60):
        optimizer.zero_grad()
        loss(8 * net(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    lipnet.save(net.eval(), path, input_shape=(64,), input_range=(0.0, 1.0), classes=tuple("0123456789"))
    return str(path)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Certified and attacked, in both norms."""
    root = tmp_path_factory.mktemp("runs")
    for norm, bound in (("2", "layerwise"), ("inf", "lipsdp")):
        options = ["--limit", LIMIT, "--quiet"]
        assert main(["run", model, "digits", "-o", str(root / f"certified-{norm}"), "--bound", bound, "--norm", norm, *options]) == 0
        assert main(["attack", model, "digits", "-o", str(root / f"attacked-{norm}"), "--norm", norm, "--steps", "60", *options]) == 0
    return root


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def changed(folder, to, change):
    """A copy of a results folder with other rows."""
    to.mkdir()
    (to / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    found = rows(folder)
    change(found)
    (to / "part-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(to)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_no_attack_is_closer_than_a_certificate(folders, norm, capsys, tmp_path):
    certified, attacked = folders / f"certified-{norm}", folders / f"attacked-{norm}"
    theirs = rows(attacked)
    assert all(row["guarantee"] == "attack" and row["norm"] == norm for row in theirs)
    hit = [(ours["radius"], row["radius"]) for ours, row in zip(rows(certified), theirs, strict=True) if row["status"] == "attacked"]
    assert len(hit) > 15
    assert all(0 < radius < found for radius, found in hit)
    assert max(radius / found for radius, found in hit) > (0.3 if norm == "2" else 0.1)  # near enough to be a test
    assert main(["check", str(certified), "--against", str(attacked), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contradictions"] == []
    assert main(["check", str(attacked)]) == 0
    assert f"{LIMIT} attacks looked at again by their points, 0 contradictions" in capsys.readouterr().out
    page = tmp_path / "r.html"
    assert main(["report", str(certified), str(attacked), "--eps", "0,0.01,0.1,0.2,0.4,0.6,0.8", "--json", "--html", str(page)]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["runs"]
    assert (theirs["guarantee"], theirs["clean"]) == ("attack", ours["clean"])
    assert "certified" not in theirs
    assert all(low <= high for low, high in zip(ours["certified"], theirs["not_attacked"], strict=True))
    assert ours["certified"] != theirs["not_attacked"]
    text = page.read_text()
    assert "an attack found a perturbation" in text
    assert "Contradiction" not in text


def test_an_attack_is_never_shown_as_a_proof(folders, capsys, tmp_path):
    attacked, certified = str(folders / "attacked-2"), str(folders / "certified-2")
    assert main(["report", attacked]) == 0
    text = capsys.readouterr().out
    assert "attack" in text
    assert "nothing is certified" in text
    assert main(["report", attacked, "--tsv", str(tmp_path / "a.tsv")]) == 2
    assert main(["report", attacked, "--fail-under", "0@0.01"]) == 1
    assert "attacks certify nothing" in capsys.readouterr().err
    assert main(["report", certified, attacked, "--fail-under", "0.01@0.01"]) == 0
    assert main(["report", certified, attacked, "--fail-under", "0.999@0.5"]) == 1


def test_shares_and_medians_of_attacks_are_rounded_up():
    from certify.report import Run, percent, radius_text, summarize

    manifest = {"guarantee": "attack", "norm": "2", "selection": [0, 1, 2]}
    attack = {"label": 1, "prediction": 1, "guarantee": "attack"}
    found = [{**attack, "index": 0, "status": "attacked", "radius": 0.123456}, {**attack, "index": 1, "status": "survived", "radius": None}]
    found.append({**attack, "index": 2, "status": "misclassified", "prediction": 0, "radius": 0.0})
    summary = summarize(Run("a", manifest, found), [0.1, 0.2])
    assert summary.certified == (2 / 3, 1 / 3)
    assert (percent(1 / 3, up=True), percent(1 / 3)) == ("33.4 %", "33.3 %")
    assert (radius_text(summary.median_radius, up=True), radius_text(0.0012341, up=True)) == ("0.1235", "0.00124")
    assert summarize(Run("a", manifest, found[:2]), []).median_radius == math.inf
    liar = summarize(Run("a", {**manifest, "guarantee": "proof"}, found), [0.1])  # a manifest that says more than its rows
    assert (liar.guarantee, liar.proved) == ("attack", False)
    nameless = [{key: value for key, value in row.items() if key != "guarantee"} for row in found]
    assert summarize(Run("a", {**manifest, "guarantee": "proof"}, nameless), [0.1]).certified == (0.0,)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_a_certificate_that_is_too_large_is_a_contradiction(folders, norm, capsys, tmp_path):
    def triple(found):
        for row in found:
            row["radius"] *= 3 if norm == "2" else 12

    attacked = str(folders / f"attacked-{norm}")
    tampered = changed(folders / f"certified-{norm}", tmp_path / "tampered", triple)
    assert main(["check", tampered, "--against", attacked]) == 4
    (first, *_) = capsys.readouterr().out.splitlines()
    assert first.startswith("contradiction: input ")
    assert "changes it at" in first
    assert '"guarantee": "proof"' in first
    assert '"guarantee": "attack"' in first
    assert main(["report", tampered, attacked, "--html", str(tmp_path / "r.html")]) == 4
    assert "contradiction: input" in capsys.readouterr().err
    assert re.search(r'class="alarm".*<li>input \d+: .* changes it at', (tmp_path / "r.html").read_text(), flags=re.DOTALL)


def test_which_rows_contradict_each_other():
    from certify.report import Run
    from certify.report.sandwich import all_contradictions

    same = {"norm": "2", "model": {"sha256": "m", "spec": "here"}, "data": {"sha256": "d"}}
    ours = {"index": 3, "label": 1, "prediction": 1, "guarantee": "proof", "status": "certified", "radius": 0.5}
    theirs = {**ours, "guarantee": "attack", "status": "attacked"}
    for change, attack, count in (
        ({}, {"radius": 0.5}, 0),
        ({}, {"radius": 0.5 * (1 - 1e-7)}, 0),
        ({}, {"radius": 0.499}, 1),
        ({}, {"radius": 0.1, "index": 4}, 0),
        ({"radius": math.inf}, {"radius": 1e9}, 1),
        ({"radius": 0.0}, {"radius": 0.1, "prediction": 2}, 0),  # nothing is certified
        ({"status": "misclassified", "prediction": 2}, {"status": "misclassified", "prediction": 2, "radius": 0.0}, 0),  # the same wrong class, not attacked
        ({"status": "misclassified", "prediction": 2}, {"radius": 0.6}, 1),  # two predictions of one network
        ({}, {"status": "survived", "radius": None}, 0),
        ({"radius": math.nan}, {"radius": 0.1}, 0),  # which certify check finds
    ):
        runs = [Run("a", {**same, "guarantee": "attack", "model": {"sha256": "m", "spec": "there"}}, [{**theirs, **attack}])]
        runs.append(Run("b", {**same, "guarantee": "proof"}, [{**ours, **change}]))
        assert len(all_contradictions(runs)) == count, (change, attack)
        for other in ({"norm": "inf"}, {"model": {"sha256": "m", "mean": [0.5]}}, {"data": {"sha256": "e"}}, {"guarantee": "probabilistic"}, {"model": {}}):
            assert all_contradictions([runs[0], Run("b", {**same, "guarantee": "proof", **other}, runs[1].rows)]) == []


@pytest.mark.parametrize("norm", NORMS)
def test_images_and_two_classes_within_the_range(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.rand(4, 2, 4, 4)
    free, kept = (certify.falsify(net, x, certify.PGD(norm=norm, clip=clip)) for clip in (False, True))
    assert any(found.point is not None for found in kept)
    for one, other, image in zip(free, kept, x.double().numpy(), strict=True):
        assert one.distance.value <= other.distance.value * 1.01
        for found in (one, other):
            if found.point is not None:
                assert found.distance.value == distance(found.point, image, norm)
                z = lipnet.freeze(net).double()(torch.from_numpy(found.point)[None])
                assert int(z.argmax()) == found.other != found.prediction
        assert other.point is None or (other.point.min() >= 0 and other.point.max() <= 1)


def test_a_certifier_that_is_wrong_is_found_by_attacks(model, folders, tmp_path, monkeypatch, capsys):
    """The proof is broken, so proving again agrees with it: only the attack can tell."""
    true = certify.Margin._constants
    monkeypatch.setattr(certify.Margin, "_constants", lambda self, classes: true(self, classes) / 3)
    assert main(["run", model, "digits", "-o", str(tmp_path / "wrong"), "--limit", LIMIT, "--quiet"]) == 0
    assert main(["check", str(tmp_path / "wrong")]) == 0
    assert main(["check", str(tmp_path / "wrong"), "--against", str(folders / "attacked-2")]) == 4
    assert "changes it at" in capsys.readouterr().out


def test_what_an_attack_claims_is_looked_at_again(folders, tmp_path, capsys):
    def nearer(found):
        found[1]["radius"] /= 2

    def elsewhere(found):
        found[1]["point"] = found[2]["point"]

    def nowhere(found):
        found[1]["point"] = "x"

    def survived(found):
        found[1].update(point=None, status="survived")

    def wrong(found):
        found[1].update(status="misclassified", prediction=(found[1]["label"] + 1) % 10)

    for change in (nearer, elsewhere, nowhere, survived, wrong):
        folder = changed(folders / "attacked-2", tmp_path / change.__name__, change)
        assert main(["check", folder]) == 4, change
        assert "input 1: " in capsys.readouterr().out
        assert main(["check", str(folders / "certified-2"), "--against", folder]) == 4


def test_what_cannot_be_compared_is_refused(model, folders, tmp_path, capsys):
    certified, attacked = str(folders / "certified-2"), str(folders / "attacked-2")
    smoothed = str(tmp_path / "smoothed")
    assert main(["run", model, "digits", "-o", smoothed, "--limit", "2", "--method", "smoothing", "--sigma", "0.1", "--n", "200", "--n0", "10", "--quiet"]) == 0
    other, elsewhere = str(tmp_path / "other"), str(tmp_path / "elsewhere")
    assert main(["attack", model, "digits:train", "-o", other, "--limit", "2", "--steps", "3", "--quiet"]) == 0
    assert main(["attack", model, "digits", "-o", elsewhere, "--indices", "100:102", "--steps", "3", "--quiet"]) == 0
    for first, second, says in (
        (smoothed, attacked, "of a smoothed classifier, another one than the network"),
        (certified, certified, "not attacks"),
        (attacked, attacked, "and not proved"),
        (certified, str(folders / "attacked-inf"), "has radii in l2"),
        (certified, other, "not of the same data"),
        (certified, elsewhere, "no input in common"),
    ):
        capsys.readouterr()
        assert main(["check", first, "--against", second]) == 2
        assert says in capsys.readouterr().err
    assert main(["report", smoothed, attacked]) == 0  # side by side, and not compared
    log = tmp_path / "log.tsv"
    assert main(["report", smoothed, "--tsv", str(log)]) == 0
    assert main(["convert", str(log), "--from", "cohen", "--sigma", "0.1", "--n", "200", "--alpha", "0.001", "-o", str(tmp_path / "log")]) == 0
    for first in (log, tmp_path / "log"):
        assert main(["check", str(first), "--against", attacked]) == 2


def test_shards_and_a_resumed_attack_give_the_same_results(model, tmp_path):
    options = ["--limit", "6", "--steps", "8", "--norm", "inf", "--quiet", "--clip"]
    assert main(["attack", model, "digits", "-o", str(tmp_path / "whole"), *options]) == 0
    for shard in ("1/2", "0/2"):
        assert main(["attack", model, "digits", "-o", str(tmp_path / "sharded"), "--shard", shard, *options]) == 0
    assert (tmp_path / "whole/results.jsonl").read_bytes() == (tmp_path / "sharded/results.jsonl").read_bytes()
    assert main(["attack", model, "digits", "-o", str(tmp_path / "whole"), *options, "--seed", "1"]) == 2
    assert main(["check", str(tmp_path / "whole")]) == 0


@needs_foolbox
@pytest.mark.filterwarnings("default")
def test_foolbox_on_the_command_line(model, folders, tmp_path):
    options = ["--limit", "6", "--steps", "40", "--quiet"]
    for norm, names in (("2", "foolbox-ddn,foolbox-pgd,pgd"), ("inf", "foolbox-pgd,foolbox-deepfool")):
        attacked = tmp_path / f"attacked-{norm}"
        assert main(["attack", model, "digits", "-o", str(attacked), "--norm", norm, "--attack", names, *options]) == 0
        assert main(["check", str(folders / f"certified-{norm}"), "--against", str(attacked)]) == 0


@pytest.mark.skipif(not has_autoattack(), reason="pyautoattack is not installed")
@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_is_never_below_the_exact_distance_and_keeps_to_the_range(norm):
    net, x = linear()
    x, steps = x[:2], 20
    exact = exact_distances(net, x, norm)
    found = certify.falsify(net.float(), x, certify.AutoAttack(norm=norm, steps=steps))
    assert all(truth < each.distance.value < 1.2 * truth for each, truth in zip(found, exact, strict=True))
    assert all(each.point.min() >= 0 and each.point.max() <= 1 and each.distance.method == "autoattack" for each in found)
    assert distances(net, x, certify.AutoAttack(norm=norm, steps=steps)) == [each.distance.value for each in found]  # the seed says it all
    torch.manual_seed(1)
    pictures = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()  # three classes, and Square beside the others
    (near,) = distances(pictures, torch.rand(1, 1, 6, 6), certify.AutoAttack(norm=norm, steps=5))
    assert 0 < near < math.inf
    for height, width in ((4, 4), (5, 5), (12, 12), (28, 5), (1, 28)):  # of which the package can tile one in l2
        (near,) = distances(
            nn.Sequential(nn.Flatten(), nn.Linear(height * width, 3)).eval(), torch.full((1, 1, height, width), 0.4), certify.AutoAttack(norm=norm, steps=2)
        )
        assert near > 0
    with pytest.raises(CertifyError, match="AutoAttack is for inputs in"):
        certify.falsify(net, 3 * x, certify.AutoAttack(norm=norm, steps=steps))


class Spectrum(nn.Module):
    """The sizes of the frequencies of a picture: no rule knows them. The first outputs are a norm of the input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.fft.fft2(x).abs().flatten(1))


class Moody(Spectrum):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Crowd(Spectrum):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Rounded(Spectrum):
    def forward(self, x):
        return super().forward(x.round().long().to(x.dtype))


class Overwritten(Spectrum):
    def forward(self, x):
        return super().forward(x.mul_(x))


class Detached(Spectrum):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Rounded, Overwritten, Detached])
def test_networks_without_gradients_are_refused_in_one_sentence(kind):
    methods = [
        certify.PGD(),
        *([certify.Foolbox("ddn"), certify.Foolbox("pgd")] if has_foolbox() else []),
        *([certify.AutoAttack()] if has_autoattack() else []),
    ]
    for method in methods:
        with pytest.raises(CertifyError, match="attacks follow gradients, and torch finds none"):
            certify.falsify(kind().eval(), torch.rand(1, 1, 4, 4), method)


def test_what_can_only_be_run_is_attacked_too():
    torch.manual_seed(0)
    net, x = Spectrum().eval(), torch.rand(3, 1, 4, 4)
    with pytest.raises(certify.Unsupported):
        certify.Graph.of(net, (1, 4, 4))
    for found, image in zip(certify.falsify(net, x, certify.PGD()), x.double(), strict=True):
        z = net.double()(torch.from_numpy(found.point)[None])
        assert int(z.argmax()) == found.other != found.prediction == int(net.double()(image[None]).argmax())
        net.float()
    for bad, why in ((Moody(), "gives other outputs when it is called again"), (Crowd(), "depends on the other inputs of its batch")):
        with pytest.raises(CertifyError, match=why):
            certify.falsify(bad.eval(), x, certify.PGD())
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
