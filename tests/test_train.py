"""Training: optimisers and schedules against their formulas, augmentation by its definition, and a run that is stopped, split or fed nonsense."""

import copy
import hashlib
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import tables
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import certify
import certify.data
import lipnet
from lipnet.augment import Crop, Flip
from lipnet.optim import Lookahead, warmup_cosine
from lipnet.train import STATE, EpochReport, EpsilonSchedule, Recipe, declared_constants, fit, print_progress

RADII = (0.0, 0.1, 0.25)


def digits(split="train", limit=None):
    data = certify.data.digits(split)
    return torch.from_numpy(data.inputs)[:limit], torch.from_numpy(data.labels)[:limit]


def small_net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(lipnet.SandwichLinear(64, 24), *([nn.Dropout(dropout)] if dropout else []), lipnet.UnitRowLinear(24, 10))


def declared_anyway(net):
    """The constants of a network with dropout, which declares none."""
    return lipnet.pair_constants(net[-1].weight())


def same(one, other):
    """Equal in every bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def timeless(report):
    return {**vars(report), "seconds": None}


def stored(folder):
    """The state in a folder, without the seconds."""
    state = torch.load(io.BytesIO((folder / STATE).read_bytes()[24 + 32 :]), weights_only=True)
    state["reports"] = [timeless(EpochReport(*values)) for values in state["reports"]]
    return state


# ---------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("loss", "epsilon"),
    [
        (lipnet.OffsetCrossEntropy(offset=0.85, temperature=0.1), None),
        (lipnet.EMMA(0.25), EpsilonSchedule(0.1)),
        (lipnet.LogitAnnealing(offset=1.0, temperature=0.2, emma=lipnet.EMMA()), EpsilonSchedule(0.1, 0.1, 2.0)),
        (lipnet.LogitAnnealing(offset=0.85, temperature=0.1), None),
        (nn.CrossEntropyLoss(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_learns_and_reports_what_certify_proves(loss, epsilon):
    net, test = small_net(), digits("test")
    recipe = Recipe(epochs=15, batch=64, learning_rate=0.02, loss=loss, epsilon=epsilon, warmup_epochs=1, clip=3.0)
    history = fit(net, *digits(), recipe, validation=test, radii=RADII)
    last = history.last
    assert (len(history.reports), last.epoch, last.epochs, last.radii) == (15, 15, 15, RADII)
    assert last.clean > 0.9
    assert last.clean >= last.certified[0] >= last.certified[1] >= last.certified[2]
    assert last.certified[1] > 0.6
    assert history.last.loss < history.reports[0].loss or epsilon is not None  # EMMA asks for more and more
    assert not net.training
    certificate = certify.robustness(net, test[0], certify.Margin(certify.lipschitz(net, input_shape=(64,))))
    for radius, accuracy in zip(RADII, last.certified, strict=True):
        assert accuracy == pytest.approx(certificate.accuracy(test[1].numpy(), radius), abs=0.006)  # two images may lie on the edge


def test_bytes_are_taken_as_fractions_of_255():
    images, labels = digits(limit=200)
    pixels = (images * 255).round().to(torch.uint8)
    recipe = Recipe(epochs=2, batch=50)
    one, other, double = small_net(), small_net(), small_net().double()
    history = fit(one, pixels, labels, recipe, validation=(pixels, labels))
    assert fit(other, pixels.float() / 255, labels.to(torch.int32), recipe).last.loss == history.last.loss
    assert same(one.state_dict(), other.state_dict())
    fit(double, pixels, labels, recipe)
    assert double[0].free.dtype == torch.float64
    assert torch.allclose(double[0].free.float(), one[0].free, atol=1e-4)


def test_half_precision_is_of_the_forward_pass_only():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, x.dtype))
            return x

    net = nn.Sequential(*small_net(), Spy())
    test = digits("test")
    recipe = Recipe(epochs=10, batch=64, learning_rate=0.02, loss=lipnet.EMMA(0.2), precision="bfloat16")
    last = fit(net, *digits(), recipe, validation=test, constants=lambda net: lipnet.pair_constants(net[1].weight())).last
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert last.clean > 0.9
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert certify.lipschitz(net[0], input_shape=(64,)).value < 1 + 1e-5


def test_the_scheduled_epsilon_reaches_the_loss_and_leaves_the_recipe_alone():
    seen = []

    class Recorded(lipnet.EMMA):
        def forward(self, logits, labels, constants):
            seen.append(self.epsilon)
            return super().forward(logits, labels, constants)

    recipe = Recipe(epochs=4, batch=100, loss=Recorded(9.0), epsilon=EpsilonSchedule(0.5, low=0.2, high=2.0))
    history = fit(small_net(), *digits(limit=200), recipe)
    wanted = [0.5 * (0.2 + 1.8 * t) for t in (0, 0.5, 1, 1)]
    assert seen == pytest.approx([epsilon for epsilon in wanted for _ in range(2)])
    assert [report.epsilon for report in history.reports] == pytest.approx(wanted)
    assert recipe.loss.epsilon == 9.0
    nested = Recipe(epochs=1, loss=lipnet.LogitAnnealing(emma=lipnet.EMMA(9.0)), epsilon=EpsilonSchedule(0.5, low=0.2))
    assert fit(small_net(), *digits(limit=50), nested).last.epsilon == pytest.approx(0.1)
    assert fit(small_net(), *digits(limit=50), Recipe(epochs=1, loss=lipnet.EMMA(0.7))).last.epsilon == 0.7


def test_the_learning_rate_follows_the_schedule():
    rates = [report.learning_rate for report in fit(small_net(), *digits(limit=100), Recipe(epochs=6, batch=50, learning_rate=0.1, warmup_epochs=2)).reports]
    wanted = [1 / 4, 3 / 4, *((1 + math.cos(math.pi * t / 8)) / 2 for t in (0, 2, 4, 6))]
    assert rates == pytest.approx([0.1 * factor for factor in wanted])


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_norm_of_the_gradient_is_clipped(clip):
    norms = []

    def record(optimizer, args, kwargs):
        if not isinstance(optimizer, Lookahead):
            norms.append(float(torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm()))

    handle = register_optimizer_step_pre_hook(record)
    try:
        fit(small_net(), *digits(limit=100), Recipe(epochs=2, batch=50, clip=clip))
    finally:
        handle.remove()
    assert len(norms) == 4
    assert all(norm == pytest.approx(1e-3, rel=1e-3) if clip else norm > 0.01 for norm in norms)


def test_it_is_silent_and_deterministic_and_leaves_the_global_generator_alone(capfd):
    runs = []
    for seed in (3, 3, 4):
        net = small_net(dropout=0.3)
        torch.rand(1 + len(runs))  # what others draw changes nothing
        before = torch.get_rng_state()
        fit(net, *digits(limit=200), Recipe(epochs=2, batch=64), validation=digits("test", 50), constants=declared_anyway, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(net.state_dict())
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert capfd.readouterr() == ("", "")


def test_dropout_is_new_in_every_epoch():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            if self.training:
                seen.append((x == 0).detach().clone())
            return x

    net = nn.Sequential(nn.Dropout(0.5), Spy(), *small_net())
    fit(net, torch.ones(40, 64), torch.arange(40) % 10, Recipe(epochs=3, batch=40))
    assert len(seen) == 3
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_progress_is_one_line_for_each_epoch_on_stderr(capfd):
    fit(small_net(), *digits(limit=100), Recipe(epochs=2), validation=digits("test", 50), radii=(0.5,), progress=print_progress)
    out, err = capfd.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("epoch 1/2  loss ")
    assert second.startswith("epoch 2/2  loss ")
    assert "  clean 0." in second
    assert "  at 0.5 0." in second
    fit(small_net(), *digits(limit=100), Recipe(epochs=1), progress=print_progress)
    assert "clean" not in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------- declared constants


@pytest.mark.parametrize("row", tables.LAYERS, ids=str)
def test_no_layer_declares_less_than_is_proved(row):
    torch.manual_seed(0)
    layer = row.make()
    width = math.prod(layer(torch.zeros(2, *row.shape)).shape[1:])
    net = nn.Sequential(layer, nn.Flatten(), lipnet.UnitRowLinear(width, 3)).eval()
    if type(layer) in (nn.Linear, lipnet.UnitRowLinear) or not isinstance(layer, lipnet.layers.base.Layer):
        with pytest.raises(ValueError, match="declares no Lipschitz constant"):
            declared_constants(net)
        return
    constants = declared_constants(net)
    proved = certify.lipschitz(layer.eval(), input_shape=row.shape).value
    assert constants[0, 1] >= (1 - 1e-5) * proved * (net[2].weight()[0] - net[2].weight()[1]).norm()


def test_constants_of_a_chain_multiply_and_carry_gradients():
    net = nn.Sequential(nn.Sequential(lipnet.Normalize([0.1], [0.25]), lipnet.Scale(3.0)), nn.Flatten(), lipnet.BROLinear(4, 4), nn.Linear(4, 3))
    constants = declared_constants(net)
    weight = net[3].weight
    assert torch.allclose(constants, 12 * torch.cdist(weight, weight), atol=1e-5)
    constants.sum().backward()
    assert weight.grad.abs().max() > 0
    for unknown, what in (
        (nn.Linear(4, 3), "not in Linear"),
        (nn.Sequential(), "not in Sequential"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "not in ReLU"),
        (nn.Sequential(nn.GELU(), nn.Linear(4, 3)), "GELU"),
    ):
        with pytest.raises(ValueError, match=what):
            declared_constants(unknown)


def test_given_constants_are_used_by_the_loss_and_the_report():
    test = digits("test")
    calls = []

    def tripled(net):
        calls.append(torch.is_grad_enabled())
        return 3 * declared_constants(net)

    recipe = Recipe(epochs=3, batch=64, learning_rate=0.02, loss=lipnet.EMMA(0.1))
    plain, wide = fit(small_net(), *digits(), recipe, validation=test, radii=(0.3,)), fit(
        small_net(), *digits(), Recipe(epochs=3, batch=64, learning_rate=0.02, loss=lipnet.EMMA(0.1 / 3)), validation=test, radii=(0.1,), constants=tripled
    )  # fmt: skip
    assert wide.last.loss == pytest.approx(plain.last.loss, rel=1e-3)
    assert wide.last.certified[0] == pytest.approx(plain.last.certified[0], abs=0.01)
    assert set(calls) == {True, False}


# --------------------------------------------------------------------------------------------- optimisers and schedules


def test_warmup_and_cosine_by_hand():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = warmup_cosine(optimizer, 2, 6, floor=0.1)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2 * (0.1 + 0.45 * (1 + half)), 1.1, 2 * (0.1 + 0.45 * (1 - half)), 0.2, 0.2])
    for arguments in ((-1, 5), (5, 5), (0, 0), (0, 5, -0.1), (0, 5, 1.1)):
        with pytest.raises(ValueError, match="must be in"):
            warmup_cosine(optimizer, *arguments)


def test_lookahead_is_the_recursion_of_the_paper():
    """Gradient descent on x^2 / 2 is x <- (1 - lr) x; after k steps slow <- slow + rate (x - slow), x <- slow."""
    parameter = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = Lookahead(torch.optim.SGD([parameter], lr=0.1), steps=3, rate=0.25)
    fast = slow = parameter.detach().clone()
    for t in range(1, 11):
        optimizer.zero_grad()
        (parameter.square().sum() / 2).backward()
        optimizer.step()
        fast = fast - 0.1 * fast
        if t % 3 == 0:
            slow = slow + 0.25 * (fast - slow)
            fast = slow
        assert torch.allclose(parameter, fast, rtol=1e-14, atol=0)
    once = Lookahead(torch.optim.SGD([parameter], lr=0.1), steps=1, rate=1.0)  # the optimiser itself
    before = parameter.detach().clone()
    assert once.step(lambda: (once.zero_grad(), (parameter.square().sum() / 2).backward(), 7.0)[-1]) == 7.0
    assert torch.allclose(parameter, 0.9 * before)


@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.Adam])
def test_lookahead_goes_on_from_its_state(after, make):
    def start():
        parameter = nn.Parameter(torch.linspace(-1, 2, 5))
        optimizer = Lookahead(make([parameter], lr=0.1), steps=3)
        return parameter, optimizer, warmup_cosine(optimizer, 2, 12)

    def go(parameter, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((parameter - 1) ** 4).sum().backward()
            optimizer.step()
            schedule.step()

    whole = start()
    go(*whole, 9)
    first = start()
    go(*first, after)
    buffer = io.BytesIO()
    torch.save([first[0].detach(), first[1].state_dict(), first[2].state_dict()], buffer)
    buffer.seek(0)
    parameter, optimizer_state, schedule_state = torch.load(buffer, weights_only=True)
    second = start()
    second[0].data.copy_(parameter)
    second[1].load_state_dict(optimizer_state)
    second[2].load_state_dict(schedule_state)
    assert second[1].param_groups is second[1].optimizer.param_groups
    go(*second, 9 - after)
    assert torch.equal(second[0], whole[0])
    assert same(second[1].state_dict(), whole[1].state_dict())
    assert second[2].get_last_lr() == whole[2].get_last_lr()


def test_lookahead_shares_groups_with_the_optimiser_and_takes_new_ones():
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([one], lr=0.5)
    optimizer = Lookahead(inner, steps=2)
    optimizer.add_param_group({"params": [two], "lr": 0.25})
    assert inner.param_groups is optimizer.param_groups
    for _ in range(2):
        optimizer.zero_grad()
        ((one + two) ** 1).sum().backward()
        optimizer.step()
    assert (float(one.detach()), float(two.detach())) == (0.5, 0.75)  # -1 and -0.5, half of it taken back
    for arguments in ({"steps": 0}, {"steps": 1.5}, {"rate": 0.0}, {"rate": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            Lookahead(inner, **arguments)


# ---------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [1, 4])
def test_crop_moves_each_image_by_itself_and_fills_with_zeros(dtype, padding):
    count, height, width = 400, 5, 7
    images = torch.arange(1, 2 * height * width + 1).reshape(1, 2, height, width).to(dtype).repeat(count, 1, 1, 1)
    out = Crop(padding)(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert out.dtype == dtype
    allowed = {}
    for dy in range(-padding, padding + 1):
        for dx in range(-padding, padding + 1):
            moved = torch.zeros_like(images[0])
            rows, columns = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
            moved[:, rows, columns] = images[0][:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            allowed[moved.numpy().tobytes()] = (dy, dx)
    seen = [allowed[image.numpy().tobytes()] for image in out]  # KeyError: no such shift
    assert len(set(seen)) > 0.9 * (2 * padding + 1) ** 2
    again = Crop(padding)(images, torch.Generator().manual_seed(0))
    assert torch.equal(again, out)
    assert not torch.equal(Crop(padding)(images, torch.Generator().manual_seed(1)), out)


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = torch.arange(24.0).reshape(1, 2, 3, 4).repeat(400, 1, 1, 1)
    out = Flip()(images, torch.Generator().manual_seed(0))
    is_same = (out == images).flatten(1).all(1)
    is_mirrored = (out == images[:, :, :, [3, 2, 1, 0]]).flatten(1).all(1)
    assert (is_same ^ is_mirrored).all()
    assert 150 < is_mirrored.sum() < 250
    assert torch.equal(Flip()(images, torch.Generator().manual_seed(0)), out)


def test_augmented_images_keep_their_labels():
    """Images that tell their label in any place and mirrored: a network that pools them learns nothing from a mixed-up label."""
    labels = torch.arange(60) % 3
    images = torch.zeros(60, 1, 6, 6)
    images[:, :, 2:4, 2:4] = (labels[:, None, None, None] + 1) / 3
    seen = []

    class Pool(nn.Module):
        def forward(self, x):
            return x.sum((1, 2, 3))[:, None]

    class Recorded(nn.CrossEntropyLoss):
        def forward(self, logits, target):
            seen.append((logits.detach(), target))
            return super().forward(logits, target)

    torch.manual_seed(0)
    net = nn.Sequential(Pool(), nn.Linear(1, 3))
    net[1].weight.data.fill_(1.0)
    net[1].bias.data.zero_()
    net[1].requires_grad_(False)
    trained = nn.Sequential(net, nn.Linear(3, 3))
    trained[1].weight.data.copy_(torch.eye(3))
    fit(trained, images, labels, Recipe(epochs=3, batch=16, learning_rate=1e-12, loss=Recorded(), augment=[Crop(2), Flip()]))
    for logits, target in seen:
        moved_out = logits[:, 0] - trained[1].bias[0] <= 4 / 3 * (target + 1) + 1e-4  # a shift of 2 keeps all of it
        assert moved_out.all()
        assert torch.allclose(logits[:, 0] - trained[1].bias[0], 4 / 3 * (target + 1), atol=1e-4)
    assert len(torch.cat([target for _, target in seen])) == 180


def test_augmentation_is_new_in_every_epoch_and_part_of_the_seed():
    images, labels = digits(limit=64)
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            if self.training:
                seen.append(x.detach().clone())
            return x

    moves = (Crop(1), Flip())

    def run(seed, augment=moves):
        seen.clear()
        net = nn.Sequential(Spy(), nn.Flatten(), *small_net())
        fit(net, images.reshape(-1, 1, 8, 8), labels, Recipe(epochs=2, batch=64, augment=augment), constants=declared_anyway, seed=seed)
        return [x.sort(0).values for x in seen]

    first, second = run(0)
    assert not torch.equal(first, second)
    assert same(run(0), [first, second])
    assert not same(run(1), [first, second])
    assert torch.equal(*run(0, augment=()))


# ----------------------------------------------------------------------------------------------- stopped and gone on with

RESUMED = Recipe(epochs=4, batch=60, learning_rate=0.02, weight_decay=1e-4, warmup_epochs=0.5, clip=3.0, loss=lipnet.EMMA(), epsilon=EpsilonSchedule(0.1))


class Stop(Exception):
    pass


def run_resumed(folder, stop=None, **changes):
    def progress(report):
        if report.epoch == stop:
            raise Stop

    net = small_net(dropout=0.2)
    arguments = {"validation": digits("test", 60), "constants": declared_anyway, "seed": 5, "folder": folder, "progress": progress, **changes}
    history = fit(net, *digits(limit=200), arguments.pop("recipe", RESUMED), **arguments)
    return net, history


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_resumed(folder)


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (4,), (1, 2, 3)], ids=str)
def test_a_training_that_was_stopped_ends_in_the_same_bits(whole, tmp_path, stops):
    folder, net, history = whole
    for stop in stops:
        with pytest.raises(Stop):
            run_resumed(tmp_path / "new" / "folder", stop)
    resumed, resumed_history = run_resumed(tmp_path / "new" / "folder")
    assert same(resumed.state_dict(), net.state_dict())
    assert [timeless(report) for report in resumed_history.reports] == [timeless(report) for report in history.reports]
    assert same(stored(tmp_path / "new" / "folder"), stored(folder))
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [STATE]


def test_a_training_that_was_killed_ends_in_the_same_bits(whole, tmp_path):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        torch.set_num_threads(1)
        import test_train
        def die(report):
            if report.epoch == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        test_train.run_resumed(sys.argv[1], progress=die)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(stored(tmp_path)["reports"]) == 2
    folder, net, _ = whole
    assert same(run_resumed(tmp_path)[0].state_dict(), net.state_dict())
    assert same(stored(tmp_path), stored(folder))


def test_a_finished_training_is_not_done_again(whole):
    folder, net, history = whole
    before = (folder / STATE).read_bytes()
    again, again_history = run_resumed(folder, progress=lambda report: pytest.fail("nothing is left to do"))
    assert same(again.state_dict(), net.state_dict())
    assert again_history == history
    assert (folder / STATE).read_bytes() == before


def test_the_parts_matter(whole):
    """The comparison above can fail: the state without the slow weights, or without the generator, goes elsewhere."""
    folder, net, _ = whole
    assert not same(run_resumed(None, seed=6)[0].state_dict(), net.state_dict())
    state = stored(folder)
    other = copy.deepcopy(state)
    other["optimizer"]["slow"]["state"][0]["slow"][0] += 1e-7
    assert not same(state, other)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"recipe": Recipe(epochs=5, loss=lipnet.EMMA())}, r"another recipe \(its recipe: Recipe\(epochs=4, batch=60"),
        ({"recipe": Recipe(**{**vars(RESUMED), "loss": lipnet.EMMA(0.3)})}, "another recipe"),
        ({"seed": 6}, "another seed;"),
    ],
)
def test_a_state_of_another_training_is_refused(whole, changes, what):
    with pytest.raises(ValueError, match=what) as caught:
        run_resumed(whole[0], **changes)
    assert "\n" not in str(caught.value)


def test_a_state_of_other_data_or_another_network_is_refused(whole):
    folder = whole[0]
    images, labels = digits(limit=200)
    arguments = {"constants": declared_anyway, "seed": 5, "folder": folder}
    for other_images, other_labels in ((images[:199], labels[:199]), (images, labels.flip(0)), (images + 0.01, labels)):
        with pytest.raises(ValueError, match="another data;"):
            fit(small_net(dropout=0.2), other_images, other_labels, RESUMED, **arguments)
    wider = nn.Sequential(lipnet.SandwichLinear(64, 25), nn.Dropout(0.2), lipnet.UnitRowLinear(25, 10))
    with pytest.raises(ValueError, match="another network and another data;"):
        fit(wider, images[:50], labels[:50], RESUMED, **arguments)


def test_a_folder_can_be_begun_anew(whole, tmp_path):
    with pytest.raises(Stop):
        run_resumed(tmp_path, 2, seed=77)
    run_resumed(tmp_path, resume=False)
    assert same(stored(tmp_path), stored(whole[0]))


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_damaged_states_are_refused_in_one_sentence(whole, tmp_path):
    good = (whole[0] / STATE).read_bytes()
    start = 24 + 32
    evil = pickle.dumps({"about": _Evil(tmp_path / "executed")})
    buffer = io.BytesIO()
    torch.save({"about": _Evil(tmp_path / "executed")}, buffer)
    empty = io.BytesIO()
    torch.save([1, 2], empty)

    def signed(payload):
        return good[:24] + hashlib.sha256(payload).digest() + payload

    assert signed(good[start:]) == good
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    cases = [b"", b"x", good[:10], good[:40], good[:-1], good[: len(good) // 2], bytes(flipped), good + b"0", good[start:]]
    cases += [signed(evil), signed(buffer.getvalue()), signed(b""), signed(empty.getvalue()), signed(good[start:-100])]
    for data in cases:
        (tmp_path / STATE).write_bytes(data)
        with pytest.raises(lipnet.CheckpointError, match="resume=False") as caught:
            run_resumed(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    (tmp_path / STATE).unlink()
    (tmp_path / STATE).mkdir()
    with pytest.raises(lipnet.CheckpointError, match="cannot be read"):
        run_resumed(tmp_path)


# ------------------------------------------------------------------------------------------------------------- not finite


class _Breaks(nn.Module):
    """Cross-entropy, until the given call."""

    def __init__(self, at, gradient_only=False):
        super().__init__()
        self.at, self.gradient_only, self.calls = at, gradient_only, 0

    def forward(self, logits, labels):
        self.calls += 1
        loss = nn.functional.cross_entropy(logits, labels)
        if self.calls < self.at:
            return loss
        return loss + (0 * logits).sum().abs().sqrt() if self.gradient_only else loss * float("nan")


@pytest.mark.parametrize(("gradient_only", "what"), [(False, "the loss is nan at batch 2 of epoch 3"), (True, "a parameter is no longer finite after epoch 3")])
def test_what_is_not_finite_stops_and_the_last_good_state_stays(tmp_path, gradient_only, what):
    net, calls = small_net(), []
    recipe = Recipe(epochs=5, batch=50, loss=_Breaks(6, gradient_only))
    with pytest.raises(RuntimeError, match=what) as caught:
        fit(net, *digits(limit=100), recipe, folder=tmp_path, progress=calls.append)
    assert "the state after epoch 2 is kept" in str(caught.value)
    state = stored(tmp_path)
    assert len(state["reports"]) == len(calls) == 2
    assert all(tensor.isfinite().all() for tensor in state["net"].values())
    if not gradient_only:
        assert all(parameter.isfinite().all() for parameter in net.parameters())
    with pytest.raises(RuntimeError, match=r"batch 1 of epoch 1; lower the learning rate, or set clip$"):
        fit(small_net(), *digits(limit=100), Recipe(epochs=5, batch=50, loss=_Breaks(1)))


# ------------------------------------------------------------------------------------------------------------- many ranks

_RANK = """
    import glob, sys
    sys.path.insert(0, {tests!r})
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    import test_train
    rank, folder = int(sys.argv[1]), sys.argv[2]
    if rank == 1:
        test_train.lipnet.train._write_state = None  # rank 0 alone writes
    dist.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
    reports = []
    net, history = test_train.run_on_images(folder + "/state", seed=rank, progress=reports.append)
    assert len(reports) == (len(history.reports) if rank == 0 else 0), reports
    torch.save([net.state_dict(), [test_train.timeless(report) for report in history.reports]], folder + "/rank" + str(rank))
    dist.destroy_process_group()
    names = [open(thread + "/comm").read().strip() for thread in glob.glob("/proc/self/task/*")]
    assert "pt_gloo_runloop" not in names, names  # a thread that outlives its group aborts the process, sometimes, when it exits
"""


class _Centred(nn.Module):
    """Subtracts the mean of the batch, keeps a running one; and a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("third", torch.tensor(1 / 3))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.1)
        return x


def run_on_images(folder, seed=0, epochs=3, **arguments):
    """101 images in batches of 25, the last of one image, so that rank 1 has none; the network of rank 1 starts elsewhere, as if it was not seeded.

    (No sandwich layer: while its bias is 0 the gradient of psi is 0 but for rounding, and Adam makes whole steps of what is left.)
    """
    images, labels = digits(limit=101)
    torch.manual_seed(seed)
    net = nn.Sequential(_Centred(), nn.Flatten(), lipnet.BROLinear(64, 16), lipnet.MaxMin(), lipnet.UnitRowLinear(16, 10))
    recipe = Recipe(epochs=epochs, batch=25, learning_rate=0.01, weight_decay=1e-3, clip=1.0, loss=lipnet.EMMA(0.2), augment=[Crop(1), Flip()])
    history = fit(
        net, images.reshape(-1, 1, 8, 8), labels, recipe, validation=(images[:51].reshape(-1, 1, 8, 8), labels[:51]), constants=declared_anyway,
        seed=9, folder=folder, **arguments,
    )  # fmt: skip
    return net, history


def test_two_ranks_do_what_one_does(tmp_path):
    code = textwrap.dedent(_RANK.format(tests=os.path.dirname(__file__)))
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    (one, one_reports), (two, two_reports) = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert same(one, two)
    net, history = run_on_images(tmp_path / "alone")
    alone = net.state_dict()
    for name, tensor in one.items():
        assert torch.allclose(tensor, alone[name], rtol=0, atol=1e-5 if name != "0.mean" else 0.05), name  # shares of one batch differ in size
    assert torch.equal(one["0.third"], torch.tensor(1 / 3))
    assert torch.equal(one["0.unused"], torch.ones(2))
    for report, wanted, other in zip(one_reports, history.reports, two_reports, strict=True):
        assert report["loss"] == pytest.approx(wanted.loss, abs=1e-5)
        assert report["clean"] == pytest.approx(wanted.clean, abs=1e-9)
        assert report["certified"] == pytest.approx(wanted.certified, abs=0.02)
        assert report == other
    state = stored(tmp_path / "state")
    assert same(state["net"], one)
    resumed, _ = run_on_images(tmp_path / "state")  # one rank goes on from the state of two: here there is nothing left to do
    assert same(resumed.state_dict(), one)


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"epochs": 0}, "epochs must be a positive whole number, got 0"),
        ({"batch": 2.5}, "batch must be a positive whole number"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay not negative"),
        ({"epochs": 3, "warmup_epochs": 3}, r"warmup_epochs must be in \[0, epochs\), got 3 of 3"),
        ({"clip": 0.0}, "clip must be positive or None"),
        ({"optimizer": "sgd"}, "optimizer must be one of nadam, adam, got 'sgd'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"augment": [nn.ReLU()]}, "augment must hold values such as Crop"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "mean over a batch.*reduction='sum'"),
        ({"loss": lipnet.EMMA}, "loss must be a module"),
        ({"epsilon": EpsilonSchedule()}, "there is none in OffsetCrossEntropy"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        Recipe(**arguments)


def test_values_are_refused_when_they_are_made():
    for make in (
        lambda: Crop(0),
        lambda: Crop(1.5),
        lambda: EpsilonSchedule(0.0),
        lambda: EpsilonSchedule(low=2.0, high=1.0),
        lambda: EpsilonSchedule(low=0.0),
    ):
        with pytest.raises(ValueError, match=r"must be|needs"):
            make()


def test_a_recipe_prints_itself_and_is_equal_to_what_prints_the_same():
    recipe = Recipe(loss=lipnet.LogitAnnealing(emma=lipnet.EMMA(0.5)), augment=[Crop(2), Flip()], epsilon=EpsilonSchedule(0.5))
    again = Recipe(loss=lipnet.LogitAnnealing(emma=lipnet.EMMA(0.5)), augment=(Crop(2), Flip()), epsilon=EpsilonSchedule(0.5))
    assert recipe == again
    assert hash(recipe) == hash(again)
    assert recipe != Recipe(loss=lipnet.LogitAnnealing(emma=lipnet.EMMA(0.6)), augment=(Crop(2), Flip()), epsilon=EpsilonSchedule(0.5))
    assert recipe != "Recipe"
    assert "loss=LogitAnnealing(offset=2.0, temperature=0.75, power=5.0, emma=EMMA(epsilon=0.5))" in repr(recipe)
    assert "augment=(Crop(padding=2), Flip())" in repr(recipe)
    weighted = Recipe(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])))
    assert "weight=tensor([1.0, 2.0])" in repr(weighted)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x, y: (x[:9], y), "there are 9 (validation )?images and 20 labels"),
        (lambda x, y: (x[:0], y[:0]), r"images must be at least one, \(N, ...\), got \(0, 64\)"),
        (lambda x, y: (x, y + 1), r"labels must be in 0..9, one for each logit, got 1..10"),
        (lambda x, y: (x, y - 1), "labels must be in 0..9, one for each logit, got -1"),
        (lambda x, y: (x, y.float()), "one whole number each"),
        (lambda x, y: (x, nn.functional.one_hot(y, 10)), "one whole number each"),
        (lambda x, y: (x.long(), y), "must be uint8 or floating-point numbers, got torch.int64"),
    ],
)
@pytest.mark.parametrize("where", ["train", "validation"])
def test_data_that_do_not_fit_are_refused(change, what, where):
    images, labels = torch.rand(20, 64), torch.arange(20) % 10
    train, validation = ((images, labels), change(images, labels))[:: 1 if where == "validation" else -1]
    with pytest.raises(ValueError, match=what):
        fit(small_net(), *train, Recipe(epochs=1), validation=validation)


def test_other_arguments_that_do_not_fit_are_refused():
    images, labels = digits(limit=20)
    recipe = Recipe(epochs=1)

    def refused(what, net=None, images=images, recipe=recipe, **arguments):
        with pytest.raises(ValueError, match=what):
            fit(small_net() if net is None else net, images, labels, recipe, **arguments)

    refused("radii must be finite", radii=(-1.0,), validation=(images, labels))
    refused("radii must be finite", radii=(math.nan,))
    refused(r"Crop\(padding=4\) needs images \(N, C, H, W\), got \(20, 64\)", recipe=Recipe(augment=[Crop()]))
    refused("no parameters to train", net=nn.Flatten())
    refused("at least two classes, this network returns", net=lipnet.SandwichLinear(64, 1))
    refused(r"constants must be \(classes, classes\) = \(10, 10\), got \(3, 3\)", recipe=Recipe(loss=lipnet.EMMA()), constants=lambda net: torch.ones(3, 3))
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    refused("Linear before the last layer declares no Lipschitz constant", net=plain, validation=(images, labels))
    refused("Linear before the last layer declares no", net=plain, recipe=Recipe(loss=lipnet.EMMA()))
    assert fit(plain, images, labels, recipe, validation=(images, labels), radii=()).last.certified == ()  # no radii, no constants


def test_a_loss_that_is_no_mean_is_refused():
    class Each(nn.Module):
        def forward(self, logits, labels):
            return nn.functional.cross_entropy(logits, labels, reduction="none")

    with pytest.raises(ValueError, match="loss must return one number"):
        fit(small_net(), *digits(limit=20), Recipe(epochs=1, loss=Each()))
