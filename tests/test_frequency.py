"""LipSDP by frequency: against LipSDP of the whole network as one dense program, against slopes of its own nonlinearities, and against torn-up inputs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import certify
import lipnet
import sdp
from certify import frequency
from certify.convolution import Reach
from certify.frequency import ConvNet, LipSDPFrequency
from certify.slopes import slopes
from lipnet.testing import largest_slope
from sdp.frequency import FrequencyChain, chain_system, prove_frequencies, solve_frequencies

TIGHT = LipSDPFrequency(tolerance=1e-8)


def pieces(net, shape):
    """The matrices between the activations, from answers to single pixels, and the slopes of the activations."""
    matrices, ranges, pending = [], [], []

    def close(shape):
        size = math.prod(shape)
        if not pending:
            return np.eye(size), shape
        part = nn.Sequential(*pending)
        with torch.no_grad():
            zero = part(torch.zeros(1, *shape, dtype=torch.float64))
            columns = part(torch.eye(size, dtype=torch.float64).reshape(-1, *shape)) - zero
        pending.clear()
        return columns.flatten(1).T.numpy(), tuple(columns.shape[1:])

    for module in net:
        found = slopes(module)
        if found is None:
            pending.append(module)
            continue
        matrix, shape = close(shape)
        matrices.append(matrix)
        ranges.append(found)
    matrices.append(close(shape)[0])
    return matrices, ranges


def dense(matrices, ranges):
    """LipSDP of the same pieces as one program. Rows of zeros are left out: their multipliers have no upper end."""
    matrices = list(matrices)
    for k in range(len(ranges)):
        alive = matrices[k].any(axis=1)
        matrices[k], matrices[k + 1] = matrices[k][alive], matrices[k + 1][:, alive]
    lower, upper = ([np.full(len(m), r[i]) for m, r in zip(matrices, ranges, strict=False)] for i in (0, 1))
    return sdp.lipsdp(chain_system(matrices, [np.zeros_like(m) for m in matrices], lower, upper), tolerance=1e-9)


def steepest(matrices, ranges, seed):
    """A large norm among those with slopes at the ends of their ranges, found by climbing: what no bound may be below."""
    rng, best = np.random.default_rng(seed), 0.0
    for _ in range(6):
        chosen = [np.where(rng.random(len(m)) < rng.random(), *r) for m, r in zip(matrices, ranges, strict=False)]
        for _ in range(3):
            whole = matrices[0]
            for slope, matrix in zip(chosen, matrices[1:], strict=True):
                whole = matrix @ (slope[:, None] * whole)
            left, values, right = np.linalg.svd(whole)
            best = max(best, values[0])
            forward, seen = right[0], []
            for slope, matrix in zip(chosen, matrices[:-1], strict=True):
                seen.append(matrix @ forward)
                forward = slope * seen[-1]
            back = matrices[-1].T @ left[:, 0]
            for k in reversed(range(len(chosen))):
                chosen[k] = np.where(back * seen[k] > 0, ranges[k][1], ranges[k][0])
                back = matrices[k].T @ (chosen[k] * back)
    return best


def frequency_value(net, shape):
    """What the frequencies alone prove, without the product of the layers."""
    network = ConvNet.of(certify.Graph.of(net, shape))
    return TIGHT._proved(network, network.torus())[0]


def reference_nets(mode):
    """The networks of the stored values: one generator, kernels in order, 3 x 3, entries divided by `sqrt(9 inputs)`."""
    rng = np.random.default_rng(0)
    for channels in ((2, 3, 2), (2, 3, 3, 2)):
        modules = []
        for into, out in itertools.pairwise(channels):
            layer = nn.Conv2d(into, out, 3, padding=1, padding_mode=mode).double()
            layer.weight.data.copy_(torch.from_numpy(rng.standard_normal((out, into, 3, 3)) / math.sqrt(9 * into)))
            modules += [layer, nn.ReLU()]
        yield nn.Sequential(*modules[:-1]).eval()


def test_circular_networks_have_exactly_the_value_of_the_whole_program():
    for net, stored in zip(reference_nets("circular"), (2.12937236, 2.4472125), strict=True):
        value = frequency_value(net, (2, 4, 4))
        assert value == pytest.approx(dense(*pieces(net, (2, 4, 4))).bound, rel=1e-6)
        assert value == pytest.approx(stored, rel=1e-7)


def test_zero_padding_is_bounded_by_the_torus_of_one_pixel_more():
    for net, stored, whole in zip(reference_nets("zeros"), (1.999905, 2.533339), (1.497638, 1.884185), strict=True):
        assert ConvNet.of(certify.Graph.of(net, (2, 4, 4))).torus() == (5, 5)
        value = frequency_value(net, (2, 4, 4))
        assert value == pytest.approx(stored, rel=1e-6)
        assert dense(*pieces(net, (2, 4, 4))).bound == pytest.approx(whole, rel=1e-6)
        assert whole < value


def random_net(seed):
    """Strides, dilation, groups, sizes that do not fit, pools, batch normalisation, activations of all signs, one to three layers, with and without a head."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    circular, head = seed % 2 == 1, seed % 4 >= 2
    size = tuple(int(v) for v in (rng.choice([4, 6], 2) if circular else rng.integers(4, 8, 2)))
    channels = int(rng.integers(1, 4))
    shape, modules = (channels, *size), []
    for _ in range(int(rng.integers(1, 4))):
        kind, out = rng.integers(9), int(rng.integers(1, 4))
        taps, stride, step, padding = (tuple(int(v) for v in rng.integers(low, high, 2)) for low, high in ((1, 5), (1, 4), (1, 3), (0, 4)))
        if circular:
            taps, stride = tuple(int(v) for v in rng.choice([1, 3], 2)), tuple(int(rng.choice([1, 2])) if n % 2 == 0 and n > 2 else 1 for n in size)
            module = nn.Conv2d(channels, out, taps, stride=stride, padding=tuple(k // 2 for k in taps), padding_mode="circular")
        elif kind == 0:
            module = nn.AvgPool2d(2, stride=int(rng.integers(1, 3)), padding=int(rng.integers(2)))
        elif kind == 1:
            module = nn.PixelUnshuffle(2)
        elif kind == 2:
            module = nn.BatchNorm2d(channels)
            module.weight.data.normal_()
            module.running_var.uniform_(0.5, 2)
        else:
            groups = channels if kind == 3 else 1
            module = nn.Conv2d(channels, out * groups, taps, stride=stride, dilation=step, padding=padding, groups=groups)
        module = module.double().eval()
        try:
            made = module(torch.zeros(1, channels, *size, dtype=torch.float64))
        except RuntimeError:  # does not fit
            continue
        modules.append(module)
        channels, size = made.shape[1], tuple(made.shape[2:])
        if rng.random() < 0.75:
            modules.append([nn.ReLU(), nn.LeakyReLU(0.4), nn.Tanh(), lipnet.Abs(), nn.SELU(), nn.ELU(alpha=2.0)][int(rng.integers(6))])
    if head:
        modules += [nn.Flatten(), nn.Linear(channels * math.prod(size), 3).double()]
        modules += [nn.LeakyReLU(0.1), nn.Linear(3, 2).double()] if rng.random() < 0.5 else []
    return nn.Sequential(*modules).requires_grad_(False).eval(), shape, circular, head


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_against_the_dense_program(seed):
    net, shape, circular, head = random_net(seed)
    if not any(isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.PixelUnshuffle | nn.BatchNorm2d) for module in net):
        pytest.skip("nothing fitted")
    matrices, ranges = pieces(net, shape)
    bound, product = certify.lipschitz(net, TIGHT, input_shape=shape), certify.lipschitz(net, input_shape=shape)
    assert bound.value <= product.value
    assert steepest(matrices, ranges, seed) <= bound.value * (1 + 1e-12)
    value, whole = frequency_value(net, shape), dense(matrices, ranges)
    if whole.status == "optimal":
        assert value >= whole.claimed * (1 - 1e-6)
        if circular and not head:
            assert value == pytest.approx(whole.claimed, rel=1e-5)


def test_a_tail_is_joined_in_a_metric_of_the_channels():
    """A head that reads one channel a thousand times as much as the other: a product of two norms would take the larger for both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).double().eval()
    with torch.no_grad():
        net[0].weight[0] *= 1e-3
        net[3].weight[:, :16] *= 1e3
    bound = certify.lipschitz(net, TIGHT, input_shape=(1, 4, 4))
    assert bound.value < 0.01 * certify.lipschitz(net, input_shape=(1, 4, 4)).value
    assert steepest(*pieces(net, (1, 4, 4)), 0) <= bound.value
    rows = net[3].weight.detach().numpy()
    assert 0 < bound.pairs[0, 1] <= math.sqrt(2) * bound.value * (1 + 1e-12)
    alone = nn.Sequential(*net[:3], nn.Linear(32, 1)).double().eval()
    alone[3].weight.data.copy_(torch.from_numpy(rows[:1] - rows[1:]))
    assert steepest(*pieces(alone, (1, 4, 4)), 0) <= bound.pairs[0, 1]


def test_whole_networks_of_ours_and_of_torch():
    torch.manual_seed(0)
    net = nn.Sequential(
        lipnet.Normalize((0.5,), (0.25,)), lipnet.ContractionConv2d(1, 4, 3, stride=2), nn.ReLU(), lipnet.BatchCentering(4), lipnet.ScaledAvgPool2d(2),
        nn.Flatten(), lipnet.UnitRowLinear(16, 3),
    ).eval()  # fmt: skip
    bound = certify.lipschitz(net, LipSDPFrequency(), input_shape=(1, 8, 8))
    assert largest_slope(net, (1, 8, 8), points=8) <= bound.value <= certify.lipschitz(net, input_shape=(1, 8, 8)).value
    assert bound.method == "LipSDPFrequency(tolerance=1e-06, seconds=inf)"
    assert {certify.Assumption.FLOAT64_LINALG, certify.Assumption.REAL_ARITHMETIC} <= bound.assumptions

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 4, stride=2), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.flatten(nn.functional.relu(self.second(self.first(x).relu())), 1))

    functional = Functional().eval()
    same = nn.Sequential(functional.first, nn.ReLU(), functional.second, nn.ReLU(), nn.Flatten(), functional.head).eval()
    values = [certify.lipschitz(one, LipSDPFrequency(), input_shape=(1, 6, 6)).value for one in (functional, same)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# The torus


def test_the_convolution_of_the_torus_is_that_of_the_network():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, taps, stride, before, after, step = (int(rng.integers(low, high)) for low, high in ((1, 9), (1, 5), (1, 4), (0, 5), (0, 5), (1, 4)))
        outputs = (size + before + after - step * (taps - 1) - 1) // stride + 1
        if outputs < 1:
            continue
        reach = Reach(size, outputs, taps, stride, before, step, False)
        least = next(n for n in range(stride, 200, stride) if reach.agrees(n))
        assert least <= -(-reach.enough() // stride) * stride
        kernel, image = rng.standard_normal(taps), rng.standard_normal(size)
        padded = np.concatenate([np.zeros(before), image, np.zeros(after + stride)])
        wanted = [sum(kernel[t] * padded[stride * i + step * t] for t in range(taps)) for i in range(outputs)]
        for torus in (least, -(-reach.enough() // stride) * stride):
            around = np.concatenate([image, np.zeros(torus - size)])
            made = np.array([sum(kernel[t] * around[(stride * i + step * t - before) % torus] for t in range(taps)) for i in range(torus // stride)])
            assert np.allclose(made[:outputs], wanted)
            assert reach.spills(torus) or not made[outputs:].any()
        outside = np.concatenate([image, rng.standard_normal(least - size)])  # what is there matters only to a layer that looks outside
        seen = [sum(kernel[t] * outside[(stride * i + step * t - before) % least] for t in range(taps)) for i in range(outputs)]
        assert reach.looks_outside or np.allclose(seen, wanted)


def chain_of(net, shape):
    network = ConvNet.of(certify.Graph.of(net.double().eval(), shape))
    return network.chain(network.torus())[0]


def test_slopes_are_masked_where_the_torus_has_to_be_zero_and_only_there():
    first, leaky = nn.Conv2d(1, 1, 3, padding=1), nn.LeakyReLU(0.5)
    assert chain_of(nn.Sequential(first, leaky, nn.Conv2d(1, 1, 3, padding=1)), (1, 5, 5)).lower[0] == 0.0
    assert chain_of(nn.Sequential(first, leaky, nn.Conv2d(1, 1, 3)), (1, 5, 5)).lower[0] == 0.5  # looks at pixels only
    assert chain_of(nn.Sequential(nn.Conv2d(1, 1, 1), leaky, nn.Conv2d(1, 1, 3, padding=1)), (1, 5, 5)).lower[0] == 0.5  # zero there already
    circular = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular") for _ in range(2)))
    assert chain_of(nn.Sequential(circular[0], leaky, circular[1]), (1, 5, 5)).lower[0] == 0.5
    linear = chain_of(nn.Sequential(first, nn.Conv2d(1, 1, 3, padding=1)), (1, 5, 5))  # a linear signal is masked by a nonlinearity of its own
    assert (linear.lower[0], linear.upper[0]) == (0.0, 1.0)
    assert len(chain_of(nn.Sequential(first, nn.AvgPool2d(2), nn.ReLU()), (1, 5, 5)).lower) == 1


def test_responses_are_within_their_errors_of_the_exact_ones():
    rng = np.random.default_rng(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.AvgPool2d(2, 1))
    for layer in (net[0], net[2]):
        layer.weight.data = torch.from_numpy(rng.standard_normal(layer.weight.shape) * 10.0 ** rng.integers(-6, 6, layer.weight.shape))
    chain = chain_of(net, (2, 6, 6))
    n, maps = 4, frequency._Maps(ConvNet.of(certify.Graph.of(net, (2, 6, 6))).convolutions, (4, 4))
    assert len(maps.frequencies) == chain.frequencies == 10
    kernel = [layer.weight.detach().numpy().astype(np.longdouble) for layer in (net[0], net[2])]

    def turn(count, steps):
        return np.exp(2j * np.arccos(np.longdouble(-1)) * np.clongdouble(1) * (np.longdouble(count * steps) / n))

    unit = [2.0 ** -made.normalized()[1] for made in (maps.response(0), maps.response(2).after(maps.response(1)))]
    for k, (f, g) in enumerate(maps.frequencies):
        exact = np.zeros((3, 2, 2, 2), dtype=np.clongdouble)  # out, phase down, phase across, in
        second = np.zeros((2, 3), dtype=np.clongdouble)
        for t in range(3):
            for u in range(3):
                (r, a), (q, b) = divmod(t - 1, 2), divmod(u - 1, 2)
                exact[:, a, b] += kernel[0][:, :, t, u] * turn(f, r) * turn(g, q)
                second += kernel[1][:, :, t, u] * turn(f, t - 1) * turn(g, u - 1)
        pool = (1 + turn(f, 1)) * (1 + turn(g, 1)) / 4
        for value, error, truth in (
            (chain.weights[0][k], chain.errors[0], unit[0] * exact.reshape(3, 8)),
            (chain.weights[1][k], chain.errors[1], unit[1] * pool * second),
        ):
            assert (np.abs(value.real - truth.real) <= error).all()
            assert (np.abs(value.imag - truth.imag) <= error).all()
            assert error.max() <= 1e-12


# The proof


def random_chain(seed, error=0.0):
    rng = np.random.default_rng(seed)
    shapes = ((4, 3, 2), (4, 3, 3), (4, 2, 3))
    weights = tuple(rng.standard_normal(shape) + 1j * rng.standard_normal(shape) for shape in shapes)
    errors = tuple(np.full(shape[1:], error) for shape in shapes)
    return FrequencyChain(weights, errors, (np.zeros(3), np.full(3, -0.5)), (np.ones(3), np.ones(3)))


def test_multipliers_are_proved_not_believed():
    chain = random_chain(0)
    proposals = solve_frequencies(chain)
    found = proposals[0]
    best = prove_frequencies(chain, found.multipliers)
    assert best == pytest.approx(found.claimed, rel=1e-6)
    for factor in (0.5, 0.9, 1.1, 2.0, 100.0):
        for j in range(chain.count):
            other = found.multipliers.copy()
            other[j] *= factor
            assert prove_frequencies(chain, other) >= found.claimed * (1 - 1e-9)
    assert prove_frequencies(chain, np.zeros(chain.count)) == math.inf
    assert prove_frequencies(chain, 1e-9 * found.multipliers) == math.inf
    for bad in (-found.multipliers, found.multipliers * np.nan, found.multipliers[:-1]):
        with pytest.raises(ValueError, match="multipliers must"):
            prove_frequencies(chain, bad)
    single = [prove_frequencies(chain.at(np.array([k])), found.multipliers) for k in range(4)]
    assert max(single) == pytest.approx(best, rel=1e-9)
    assert min(single) < best * (1 - 1e-3)


def test_the_proof_covers_every_chain_within_the_errors():
    rng, chain, wide = np.random.default_rng(3), random_chain(1), random_chain(1, 0.01)
    t = solve_frequencies(wide)[-1].multipliers  # well inside the cone
    value = prove_frequencies(wide, t)
    assert prove_frequencies(chain, t) < value < math.inf
    for _ in range(20):
        moved = tuple(w + 0.01 * (rng.choice([-1, 1], w.shape) + 1j * rng.choice([-1, 1], w.shape)) for w in chain.weights)
        assert prove_frequencies(dataclasses.replace(chain, weights=moved), t) <= value


def test_scaling_and_dead_channels_change_nothing():
    chain, scale = random_chain(2), np.array([0.3, 7.0])
    product = prove_frequencies(chain.scaled(scale).scaled(1 / scale), solve_frequencies(chain)[0].multipliers)
    assert product == pytest.approx(prove_frequencies(chain, solve_frequencies(chain)[0].multipliers), rel=1e-7)
    assert (chain.scaled(np.full(2, 0.5)).errors[-1] == 0).all()
    assert (chain.scaled(scale).errors[-1] > 0).all()
    weights = [w.copy() for w in chain.weights]
    weights[0][:, 1] = 0.0
    dead = dataclasses.replace(chain, weights=tuple(weights))
    assert dead.alive().count == chain.count - 1
    assert solve_frequencies(dead.alive())[0].status == "optimal"
    with pytest.raises(ValueError, match="finite numbers"):
        dataclasses.replace(chain, weights=(chain.weights[0] * np.nan, *chain.weights[1:]))
    with pytest.raises(ValueError, match="fit each other"):
        dataclasses.replace(chain, weights=chain.weights[:-1])
    with pytest.raises(ValueError, match="one pair for each row"):
        dataclasses.replace(chain, lower=chain.lower[:1])
    with pytest.raises(ValueError, match="lower <= upper"):
        dataclasses.replace(chain, lower=chain.upper, upper=chain.lower)


def test_frequencies_that_are_left_out_at_first_are_added(monkeypatch):
    net = next(reference_nets("circular"))
    chain = chain_of(net, (2, 8, 8))
    whole = solve_frequencies(chain)[0].claimed
    monkeypatch.setattr("sdp.frequency._NUMBERS", 25 * 8)
    assert solve_frequencies(chain)[0].claimed == pytest.approx(whole, rel=1e-6)


def test_a_solver_that_lies_gives_the_product(monkeypatch):
    net = next(reference_nets("circular"))

    def lies(chain, *_):
        return [sdp.newton.Proposal(np.full(chain.count, 1e-3), 0.1, "optimal", 1, 0.0, 0.0)]

    monkeypatch.setattr(frequency, "solve_frequencies", lies)
    assert certify.lipschitz(net, TIGHT, input_shape=(2, 4, 4)).value == certify.lipschitz(net, input_shape=(2, 4, 4)).value


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e150])
def test_the_size_of_the_weights_does_not_matter(factor):
    net = next(reference_nets("circular"))
    before = certify.lipschitz(net, TIGHT, input_shape=(2, 4, 4)).value
    with torch.no_grad():
        net[0].weight.mul_(factor)
    assert certify.lipschitz(net, TIGHT, input_shape=(2, 4, 4)).value == pytest.approx(factor * before, rel=1e-6)


def test_channels_and_neurons_that_are_dead_or_nearly_so_cost_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3), nn.ReLU())
    net = nn.Sequential(*net, nn.Linear(3, 2)).double().eval()
    values = []
    for size in (1e-38, 0.0):
        with torch.no_grad():
            for part in (net[0].weight[0], net[2].weight[1], net[5].weight[2]):
                part.mul_(size)
        values.append(certify.lipschitz(net, TIGHT, input_shape=(1, 4, 4)).value)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[1] < 0.9 * certify.lipschitz(net, input_shape=(1, 4, 4)).value
    for layer in (net[0], net[2], net[7]):
        kept = layer.weight.detach().clone()
        layer.weight.data.zero_()
        assert certify.lipschitz(net, TIGHT, input_shape=(1, 4, 4)).value == 0.0
        layer.weight.data.copy_(kept)


def test_a_larger_kernel_has_a_larger_bound():
    for mode in ("circular", "zeros"):
        net = next(reference_nets(mode))
        before = certify.lipschitz(net, TIGHT, input_shape=(2, 4, 4)).value
        with torch.no_grad():
            net[2].weight.mul_(1.5)
        assert certify.lipschitz(net, TIGHT, input_shape=(2, 4, 4)).value == pytest.approx(1.5 * before, rel=1e-6)


# What is refused


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


@pytest.mark.parametrize(
    ("net", "shape", "match"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3), lipnet.MaxMin()), (2, 6, 6), "MaxMin at 1: is no step"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2)), (2, 6, 6), "MaxPool2d at 1"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), lipnet.SLLConv2d(2, 2, 3)), (2, 6, 6), "SLLConv2d at 1"),
        (Skip(), (2, 6, 6), "joins or splits signals"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.ZeroPad2d(1), nn.MaxPool2d(2)), (2, 6, 6), "2 places.*ZeroPad2d at 1.*MaxPool2d at 2"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3, padding=1)), (2, 6, 6), "circular padding at 0"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), (2, 6, 6), "circular padding at 1"),
        (nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"), (2, 5, 5), "strides that divide the image"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 6, 6), "reflect"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.AvgPool2d(2, padding=1, count_include_pad=False)), (2, 6, 6), "fewer pixels at the border"),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(3)), (2, 6, 6), "windows of different sizes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2), "has no convolution"),
        (nn.Linear(4, 2), (4,), r"has the shape \(4,\)"),
        (nn.Sequential(nn.Conv2d(2, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 2, 8, stride=8)), (2, 64, 64), "signals at each of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_such_form_is_refused(net, shape, match, monkeypatch):
    monkeypatch.setattr(frequency, "solve_frequencies", None)  # before anything is computed
    with pytest.raises(certify.Unsupported, match=match):
        certify.lipschitz(net.eval(), LipSDPFrequency(), input_shape=shape)


def test_options_are_checked():
    for options in ({"tolerance": 0.0}, {"tolerance": math.nan}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match="needs a tolerance"):
            LipSDPFrequency(**options)
