"""LipSDP from the command line, and of torch's and our own networks."""

import itertools
import json
import math
import pathlib
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from torch import nn

import certify
import certify.multipliers
import lipnet
import sdp
from certify.cli import main
from certify.errors import CertifyError, Unsupported
from certify.graph import Graph
from certify.lure import wire
from lipnet.testing import largest_slope


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network of plain and of our own layers."""
    torch.manual_seed(0)
    net = nn.Sequential(lipnet.SandwichLinear(64, 20), lipnet.BROLinear(20, 20), lipnet.MaxMin(), nn.Linear(20, 10))
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    lipnet.save(net.eval(), path, input_shape=(64,), input_range=(0.0, 1.0), classes=tuple("0123456789"))
    return str(path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


SHAPE = (1, 3, 3)


def said(capsys):
    return json.loads(capsys.readouterr().out)


def jacobians(net, shape, center=None, radius=3.0, count=40, p=2.0):
    generator = torch.Generator().manual_seed(0)
    double = lipnet.freeze(net).double()
    for _ in range(count):
        d = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = d * radius if center is None else torch.as_tensor(center) + radius * d / torch.linalg.vector_norm(d, p)
        yield torch.autograd.functional.jacobian(lambda z: double(z[None])[0], x).reshape(-1, math.prod(shape)).numpy()


def test_one_number_with_its_table_and_its_proof(model, tmp_path, capsys):
    assert main(["lipschitz", model, "--method", "lipsdp", "--layers", "--save-proof", str(tmp_path / "net.proof")]) == 0
    text = capsys.readouterr().out
    assert "LipSDP with 30 nonlinearities, optimal" in text
    assert "multipliers" in text
    assert main(["lipschitz", model, "--method", "lipsdp", "--json"]) == 0
    about = said(capsys)["bound"]
    assert main(["lipschitz", model, "--json"]) == 0
    layers = said(capsys)["bound"]
    assert about["value"] < layers["value"] == about["lipsdp"]["layerwise"]
    assert about["largest_pair"] < layers["largest_pair"]
    assert main(["check", str(tmp_path / "net.proof"), "--model", model]) == 0
    assert "is this network" in capsys.readouterr().out


def test_a_proof_of_another_network_or_a_changed_one_is_a_contradiction(model, tmp_path, capsys):
    proof = tmp_path / "net.proof"
    assert main(["lipschitz", model, "--method", "lipsdp", "--no-pairs", "--save-proof", str(proof)]) == 0
    torch.manual_seed(5)
    other = nn.Sequential(lipnet.SandwichLinear(64, 20), lipnet.BROLinear(20, 20), lipnet.MaxMin(), nn.Linear(20, 10)).eval()
    lipnet.save(other, tmp_path / "other.safetensors", input_shape=(64,))
    assert main(["check", str(proof), "--model", str(tmp_path / "other.safetensors")]) == 4
    whole = bytearray(proof.read_bytes())
    whole[-100] ^= 1
    proof.write_bytes(whole)
    capsys.readouterr()
    assert main(["check", str(proof)]) == 4
    assert "rejected" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--norm", "inf"), ("--norm", "1"), ()], ids=str)
def test_runs_certify_and_are_checked(model, tmp_path, capsys, more, monkeypatch):
    small = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    lipnet.save(small, tmp_path / "small.safetensors", input_shape=(64,))
    name = str(tmp_path / "small.safetensors") if more else model
    folder = str(tmp_path / "run")
    assert main(["run", name, "digits", "-o", folder, "--bound", "lipsdp", "--limit", "12", *more]) == 0
    capsys.readouterr()
    assert main(["check", folder]) == 0
    assert "0 contradictions" in capsys.readouterr().out
    manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    assert manifest["norm"] == (more[1] if more else "2")
    manifest["bound"]["value"] *= 0.999
    (pathlib.Path(folder) / "manifest.json").write_text(json.dumps(manifest))
    assert main(["check", folder]) == 4


@pytest.fixture
def solved(monkeypatch):
    """A list that gets longer with each program that is solved."""
    found, solve = [], sdp.lipsdp

    def counted(*arguments, **options):
        found.append(1)
        return solve(*arguments, **options)

    monkeypatch.setattr(sdp, "lipsdp", counted)
    return found


def small_run(tmp_path, *more):
    """The folder that a run goes to, and its command."""
    torch.manual_seed(0)
    lipnet.save(nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), tmp_path / "small.safetensors", input_shape=(64,))
    return tmp_path / "a", ["run", f"{tmp_path}/small.safetensors", "digits", "-o", f"{tmp_path}/a", "--bound", "lipsdp", "--limit", "6", "--quiet", *more]


@pytest.mark.parametrize("norm", ["2", "inf", "1"])
def test_a_repeated_run_and_check_prove_the_bound_from_the_multipliers_that_were_kept(tmp_path, capsys, solved, norm):
    out, command = small_run(tmp_path, "--norm", norm)
    assert main([*command, "--shard", "0/2"]) == 0
    solved.clear()
    assert main(command) == main(["check", str(out)]) == 0
    assert f"proved again from {out}" in capsys.readouterr().err
    net, late = lipnet.load(tmp_path / "small.safetensors"), certify.LipSDP(norm=float(norm), until=0.0)  # solving has an end, proving has not
    assert not certify.multipliers.ended_early(certify.multipliers.proved_again(net, late, (64,), out))
    (out / "multipliers.safetensors").unlink()
    assert main(command) == 0  # which has nothing to do
    assert not solved
    for other in (("--limit", "5"), ("--norm", "1" if norm == "2" else "2")):
        assert main([*command, *other]) == 2  # and is refused before anything is solved
        assert "the folder was started with" in capsys.readouterr().err
    assert not solved


@pytest.mark.parametrize("damage", ["none", "not that file", "cut", "of another network", "looser", "too few", "no numbers"])
def test_multipliers_that_do_not_prove_what_is_said_with_them_are_passed_over(tmp_path, solved, damage):
    out, command = small_run(tmp_path)
    assert main(command) == 0
    results, kept = (out / "results.jsonl").read_bytes(), (out / "multipliers.safetensors").read_bytes()
    for path in out.iterdir():
        path.unlink()
    proposals, about = load(kept), json.loads(kept[8 : 8 + int.from_bytes(kept[:8], "little")])["__metadata__"]
    changed = {
        "not that file": b"{}",
        "cut": kept[:-9],
        "of another network": save(proposals, {**about, "network": "0" * 64}),
        "looser": save({what: 3 * each for what, each in proposals.items()}, about),
        "too few": save({what: each[1:] for what, each in proposals.items()}, about),
        "no numbers": save({what: np.nan * each for what, each in proposals.items()}, about),
    }
    if damage in changed:
        (out / "multipliers.safetensors").write_bytes(changed[damage])
    solved.clear()
    assert main(command) == 0
    assert solved
    assert (out / "results.jsonl").read_bytes() == results
    assert all((each == load(kept)[what]).all() for what, each in load((out / "multipliers.safetensors").read_bytes()).items())
    assert main(["check", str(out)]) == 0


def test_multipliers_that_prove_less_than_rows_say_do_not_prove_them(tmp_path, capsys):
    """Nor do those that say of themselves that they prove less."""
    out, command = small_run(tmp_path)
    assert main(command) == 0
    kept = (out / "multipliers.safetensors").read_bytes()
    about = json.loads(kept[8 : 8 + int.from_bytes(kept[:8], "little")])["__metadata__"]
    loose = save({what: 3 * each for what, each in load(kept).items()}, {**about, "proves": "[1e9, 1e9]"})
    (out / "multipliers.safetensors").write_bytes(loose)
    assert main(["check", str(out)]) == 0  # solved again
    (part,) = out.glob("part-*")
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    for path in (part, out / "results.jsonl"):
        path.write_text("".join(json.dumps({**row, "radius": row["radius"] * 1.01}) + "\n" for row in lines))
    assert main(["check", str(out)]) == 4
    (out / "multipliers.safetensors").write_bytes(kept)
    capsys.readouterr()
    assert main(["check", str(out)]) == 4
    assert "the radius is stored as" in capsys.readouterr().out


def test_inspect_predicts_by_what_is_solved_and_by_the_number_of_programs(monkeypatch):
    """Of 200 inputs, ten rows read them: the program is one of ten. Predictions are compared with each other, as time on other people's machines is not."""
    from certify.cli.inspect import _lipsdp, lipsdp_seconds

    monkeypatch.setattr("certify.cli.inspect._flops", lambda: 1e10)
    found = {}
    for inputs, outputs in ((200, 2), (200, 10), (20, 10)):
        net = nn.Sequential(nn.Linear(inputs, 10), nn.ReLU(), nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, outputs)).eval()
        found[inputs, outputs] = _lipsdp(Graph.of(net, (inputs,)))
    assert {(about["signals"], about["solved"]) for about in found.values()} == {(241, 51), (61, 51)}
    assert [about["programs"] for about in found.values()] == [2, 46, 46]
    few, many, small = found.values()
    assert many["seconds"] == pytest.approx(23 * few["seconds"])
    assert small["seconds"] < many["seconds"] < 5 * small["seconds"]
    assert lipsdp_seconds(many, 2, pairs=False) == pytest.approx(many["seconds"] / 46)
    assert lipsdp_seconds(many, math.inf, pairs=False) == pytest.approx(lipsdp_seconds(many, math.inf) * 10 / 55)
    assert lipsdp_seconds(many, 1) == pytest.approx(lipsdp_seconds(many, 1, pairs=False) * 46)


@pytest.mark.parametrize(("dims", "options", "taken"), [((64, 12, 3), (), ""), ((64, 12, 10), (), " --no-pairs"), ((64, 12, 10), ("--no-pairs",), "")])
def test_auto_leaves_out_the_differences_where_they_would_take_long(tmp_path, capsys, monkeypatch, dims, options, taken):
    monkeypatch.setattr("certify.cli.inspect._flops", lambda: 2e7)  # a machine on which one program takes a second or so
    torch.manual_seed(0)
    lipnet.save(nn.Sequential(nn.Linear(*dims[:2]), nn.ReLU(), nn.Linear(*dims[1:])).eval(), tmp_path / "net.safetensors", input_shape=dims[:1])
    command = ["lipschitz", str(tmp_path / "net.safetensors"), "--json"]
    assert main([*command, "--method", "auto", *options]) == 0
    shown = capsys.readouterr()
    assert ("without the differences of two outputs" in shown.err) == bool(taken)
    assert "about" in shown.err
    assert main([*command, "--method", "lipsdp", *options, *taken.split()]) == 0
    again = json.loads(capsys.readouterr().out)["bound"]
    assert (json.loads(shown.out)["bound"]["value"], json.loads(shown.out)["bound"]["largest_pair"]) == (again["value"], again["largest_pair"])


@pytest.mark.parametrize("norm", [2, 1, math.inf])
def test_where_the_time_is_over_what_was_reached_is_proved(network, norm):
    whole = certify.lipschitz(network, certify.LipSDP(norm=norm), input_shape=SHAPE)
    cut = certify.lipschitz(network, certify.LipSDP(norm=norm, until=time.monotonic()), input_shape=SHAPE)
    assert repr(certify.LipSDP(norm=norm, until=0.0)) == repr(certify.LipSDP(norm=norm)) == cut.method
    assert whole.value <= cut.value < math.inf
    assert (whole.pairs <= cut.pairs * (1 + 1e-9)).all()
    assert cut.evidence["status"] == "time limit"
    assert not [what for what in cut.evidence["proposals"] if what.startswith("outputs")]
    again = certify.lipschitz(network, certify.LipSDP(norm=norm, proposals=cut.evidence["proposals"]), input_shape=SHAPE)
    assert again.value == pytest.approx(cut.value)
    assert np.allclose(again.pairs, cut.pairs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "lipsdp", "--solver", "nonsense"], "no solver 'nonsense' is installed; there are newton"),
        (["--method", "lipsdp", "--tolerance", "2"], "a tolerance between 0 and 1"),
        (["--method", "lipsdp", "--around", "digits"], "--around needs the radius of the ball too"),
        (["--around", "digits", "--radius", "0.1"], "--around is for --method lipsdp or local"),
        (["--method", "lipsdp", "--radius", "0.1"], "name the data set with --around"),
        (["--method", "lipsdp", "--around", "digits", "--index", "500", "--radius", "0.1"], "has the inputs 0 to 359"),
        (["--save-proof", "x"], "is for --method lipsdp"),
        (["--method", "lipsdp", "--norm", "inf", "--no-pairs", "--save-proof", "x"], "the network has 10"),
        (["--method", "lipsdp", "--around", "digits", "--radius", "0.1", "--no-pairs", "--save-proof", "x"], "holds everywhere"),
        (["--method", "frequency"], "takes a chain of Conv2d"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_one_sentence(model, arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lipschitz", model, *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("certify: error: ")
    assert says in message


def test_around_an_input_it_is_smaller_and_holds_there(model, capsys):
    assert main(["lipschitz", model, "--method", "lipsdp", "--json", "--no-pairs"]) == 0
    everywhere = said(capsys)["bound"]["value"]
    values = []
    for r in ("0.5", "0.05"):
        assert main(["lipschitz", model, "--method", "lipsdp", "--around", "digits", "--index", "3", "--radius", r, "--json", "--no-pairs"]) == 0
        about = said(capsys)["bound"]
        assert about["domain"] == f"within {float(r):g} of input 3 of digits in l2"
        values.append(about["value"])
        net = lipnet.load(model)
        net = (net[0] if isinstance(net, tuple) else net).eval()
        image = certify.data.load("digits", (64,)).inputs[3].astype(np.float64)
        slopes = [np.linalg.norm(jacobian, 2) for jacobian in jacobians(net, (64,), image, 0.99 * float(r), 20)]
        assert max(slopes) <= about["value"]
    assert values[1] < values[0] < everywhere


# From Python


def test_every_norm_bounds_what_it_says(network):
    columns = list(jacobians(network, SHAPE))
    for norm, gain in ((2, lambda j: np.linalg.norm(j, 2)), (1, lambda j: np.linalg.norm(j, axis=0).max()), (math.inf, lambda j: np.abs(j).sum(1).max())):
        bound = certify.lipschitz(network, certify.LipSDP(norm=norm), input_shape=SHAPE)
        assert bound.norm == (norm, math.inf if norm == math.inf else 2)
        assert max(map(gain, columns)) <= bound.value
        for i, j in itertools.combinations(range(3), 2):
            dual = {2: 2, 1: math.inf, math.inf: 1}[norm]
            assert max(np.linalg.norm(jacobian[i] - jacobian[j], dual) for jacobian in columns) <= bound.pairs[i, j]
        loose = certify.lipschitz(network, certify.LipSDP(norm=norm, pairs=False), input_shape=SHAPE)
        assert (bound.pairs <= loose.pairs * (1 + 1e-9)).all()
        assert bound.pairs.max() < loose.pairs.max()


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_no_attack_is_inside_a_certified_radius(network, norm):
    bound = certify.lipschitz(network, certify.LipSDP(norm=norm), input_shape=SHAPE)
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(2))
    certificate = certify.robustness(network, x, certify.Margin(bound))
    assert certificate.norm == norm
    double, generator = network.double(), torch.Generator().manual_seed(3)
    for image, radius, label in zip(x.double(), certificate.radius, certificate.prediction, strict=True):
        d = torch.randn(300, *SHAPE, generator=generator, dtype=torch.float64)
        gradient = torch.autograd.functional.jacobian(lambda z: double(z[None])[0], image).reshape(3, *SHAPE)
        d[:3] = gradient - gradient[label]
        d[3:6] = d[:3].sign()
        d = d / torch.linalg.vector_norm(d.flatten(1), norm, dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
        assert (double(image + 0.999 * float(radius) * d).argmax(1) == label).all()
    network.float()


NETWORKS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1),
        nn.Hardtanh(), nn.Flatten(), nn.Linear(4, 3),
    ),
    "circular": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), lipnet.MaxMin(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    "smooth": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)),
    "ours": lambda: nn.Sequential(
        lipnet.Normalize([0.5, 0.1], [0.3, 0.7]), lipnet.SandwichConv2d(2, 4, stride=2), lipnet.GroupSort(4), lipnet.LDLTConv2d(4, 4, hidden=(3,)),
        lipnet.ScaledAvgPool2d(2), nn.Flatten(), lipnet.SLLLinear(4), lipnet.Householder(4), lipnet.UnitRowLinear(4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_bounded_between_their_slopes_and_the_product(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    net = net.eval()
    bound = certify.lipschitz(net, certify.LipSDP(pairs=False), input_shape=(2, 4, 4))
    assert largest_slope(net, (2, 4, 4)) <= bound.value <= certify.lipschitz(net, input_shape=(2, 4, 4)).value
    assert bound.evidence["status"] == "optimal"


def test_residual_forwards_with_constants():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.randn(6))

        def forward(self, x):
            h = x + self.b(torch.relu(self.a(x))) - self.shift
            return 1.5 - 0.5 * (h + torch.tanh(self.b(self.a(-h)).abs()))

    torch.manual_seed(0)
    net = Residual().eval()
    bound = certify.lipschitz(net, certify.LipSDP(pairs=False), input_shape=(6,))
    assert largest_slope(net, (6,)) <= bound.value < certify.lipschitz(net, input_shape=(6,)).value
    center = np.linspace(-1, 1, 6)
    near = certify.lipschitz(net, certify.LipSDP(pairs=False), input_shape=(6,), domain=certify.Ball(center, 0.2))
    assert max(np.linalg.norm(j, 2) for j in jacobians(net, (6,), center, 0.19)) <= near.value < bound.value


def test_layers_prove_themselves_without_a_solver():
    """A whole network of sandwich layers by the multipliers that they hand over."""
    torch.manual_seed(0)
    for dtype, room in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        net = nn.Sequential(*(lipnet.SandwichLinear(16, 16) for _ in range(6))).to(dtype).eval()
        wired = wire(Graph.of(net, (16,)), certify.Everywhere())
        bound = sdp.lipsdp(wired.system, "closed-form", start=wired.given).bound
        assert largest_slope(net, (16,)) <= bound <= 1 + room


def test_a_broken_layer_raises_the_bound():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = certify.lipschitz(net, certify.LipSDP(), input_shape=(5,)).value
    with torch.no_grad():
        net[0].weight *= 1.5
    assert certify.lipschitz(net, certify.LipSDP(), input_shape=(5,)).value == pytest.approx(1.5 * before, rel=1e-6)


def test_what_it_cannot_see_is_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), lipnet.L2Pool2d(2), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(Unsupported, match="L2Pool2d at 1: an l2 norm of a block"):
        certify.lipschitz(net, certify.LipSDP(), input_shape=(1, 4, 4))
    fourier = nn.Sequential(lipnet.FourierBROConv2d(2, 2, 4)).eval()
    with pytest.raises(Unsupported, match="FourierBROConv2d"):
        certify.lipschitz(fourier, certify.LipSDP(), input_shape=(2, 4, 4))


def test_what_does_not_fit_is_refused_with_the_estimate(monkeypatch):
    monkeypatch.setattr("certify.lure.lowering._SHARE", 1e-6)
    net = nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 3)).eval()
    with pytest.raises(CertifyError, match=r"LipSDP needs at least .* GiB for the .* signals"):
        certify.lipschitz(net, certify.LipSDP(), input_shape=(5,))


def test_methods_that_make_no_sense_are_refused():
    for options, says in (
        ({"norm": 3}, "from l1, l2 or l-infinity"),
        ({"multipliers": "network"}, "not sound"),
        ({"solver": "x"}, "no solver"),
        ({"seconds": 0}, "positive"),
    ):
        with pytest.raises(CertifyError, match=says):
            certify.LipSDP(**options)
    assert certify.LipSDP.from_settings(certify.LipSDP(norm=math.inf, seconds=3.0).settings) == certify.LipSDP(norm=math.inf, seconds=3.0)
    for wrong in (None, {}, {**certify.LipSDP().settings, "norm": "x"}, {**certify.LipSDP().settings, "more": 1}):
        with pytest.raises(CertifyError, match="settings of LipSDP"):
            certify.LipSDP.from_settings(wrong)


def test_the_first_order_method_by_torch_is_that_of_numpy(network):
    from certify.lipsdp import _by_torch
    from sdp.chain import Chain, first_order
    from sdp.start import closed_form

    system = wire(Graph.of(network, SHAPE), certify.Everywhere()).system
    chain = Chain.of(system)
    start = [closed_form(system)[place] for place in chain.places]
    ours, value = first_order(chain, start)
    theirs, other = _by_torch("cpu", chain, start, stop=lambda _: False)
    assert other == pytest.approx(value, rel=1e-4)
    bounds = [sdp.prove(system, chain.spread(parts)) for parts in (ours, theirs)]
    assert bounds == pytest.approx([value, other], rel=1e-6)
    assert certify.lipschitz(network, certify.LipSDP(solver="first-order", pairs=False), input_shape=SHAPE).value <= value * (1 + 1e-6)


OWN = {
    "sandwich": lambda: lipnet.SandwichLinear(7, 9), "bro": lambda: lipnet.BROLinear(8, 8), "ldlt": lambda: lipnet.LDLTBlock(6, 5, (8, 7)),
    "gershgorin": lambda: lipnet.GershgorinBlock(4, 4, (8,)), "sll": lambda: lipnet.SLLLinear(6, 9), "cpl": lambda: lipnet.CPLLinear(6, 9),
    "maxmin": lambda: nn.Sequential(lipnet.BROLinear(8, 8), lipnet.MaxMin(), lipnet.BROLinear(8, 8)), "householder": lambda: lipnet.Householder(8),
    "groupsort": lambda: lipnet.GroupSort(4), "sll conv": lambda: lipnet.SLLConv2d(2, 3), "bro conv": lambda: lipnet.BROConv2d(2, 2),
}  # fmt: skip


SIZES = {"sandwich": 7, "ldlt": 6, "gershgorin": 4, "sll": 6, "cpl": 6}


@pytest.mark.parametrize("name", OWN)
def test_layers_that_are_1_lipschitz_by_construction_are_found_to_be(name):
    torch.manual_seed(0)
    layer = OWN[name]().double().eval()
    shape = (2, 4, 4) if "conv" in name else (SIZES.get(name, 8),)
    assert certify.lipschitz(layer, certify.LipSDP(pairs=False), input_shape=shape).value <= 1 + 1e-6
    assert sdp.lipsdp(wire(Graph.of(layer, shape), certify.Everywhere()).system).bound <= 1 + 1e-6


def test_what_cannot_fit_is_refused_before_any_norm_is_computed(monkeypatch):
    monkeypatch.setattr("certify.graph.Graph.bounds", None)
    net = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    with pytest.raises(CertifyError, match="LipSDP needs at least"):
        certify.lipschitz(net, certify.LipSDP(), input_shape=(3, 400, 400))
