"""Proof files: the stand-alone checker accepts what is proved, and nothing else, whatever is done to a file."""

import ast
import contextlib
import copy
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import safetensors.numpy
from test_proof import exact, exactly_proved, largest_over_slopes

import sdp
from sdp import activation, check, proof_file
from sdp.activation import ABS, GELU, RELU, SIGMOID, SILU, SOFTPLUS, TANH, Sloped, clamp, leaky_relu

ACTIVATIONS = (RELU, ABS, TANH, SIGMOID, SOFTPLUS, SILU, GELU, leaky_relu(0.1), leaky_relu(1.5), clamp(-1.0, 2.0), Sloped(-0.5, 0.25))


def wired(seed, outputs=None, widest=5):
    """A random network: layers, skips, scales, shifts, sorted pairs; and its output."""
    rng = np.random.default_rng(seed)
    wiring = sdp.Wiring(int(rng.integers(1, widest)))
    signal = wiring.input()
    for _ in range(int(rng.integers(1, 3))):
        signal = wiring.linear(rng.standard_normal((int(rng.integers(1, widest)), len(signal))), signal)
        signal = wiring.shift(signal, rng.standard_normal(len(signal)))
        kind, bent = rng.integers(4), ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
        if kind == 0 and len(signal) > 1:
            signal = wiring.sort(signal, np.array([1]), np.array([0]))
        elif kind == 1:
            signal = wiring.add(signal, wiring.scale(wiring.nonlinear(signal, bent), rng.standard_normal(len(signal)), 1e-12))
        elif kind == 2:
            signal = wiring.join([wiring.nonlinear(signal, bent), wiring.pick(signal, rng.integers(len(signal), size=2))])
        else:
            signal = wiring.nonlinear(signal, bent)
    return wiring, wiring.linear(rng.standard_normal((outputs or int(rng.integers(1, 4)), len(signal))), signal)


def proposed(system, norm=2):
    """Multipliers and the bound that `sdp.prove` makes of them."""
    if norm != 1:
        found = sdp.lipsdp(system, norm=norm)
        return found.multipliers, found.bound
    found = [sdp.lipsdp(system.along(i)) for i in range(system.inputs)]
    return np.array([one.multipliers for one in found]), max(one.bound for one in found)


def truth(system, norm=2):
    """The largest constant over all networks with these slopes: at the ends of the slopes, as networks without loops are affine in each."""
    if norm == 2:
        return largest_over_slopes(system)
    if norm == 1:
        return max(largest_over_slopes(system.along(i)) for i in range(system.inputs))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * system.inputs)).reshape(system.inputs, -1)
    return max(largest_over_slopes(along(system, sign)) for sign in signs.T)


def along(system, direction):
    """With the input `direction * x`, x one number."""
    columns = np.zeros((system.size, system.count + 1))
    columns[: system.inputs, 0] = direction
    columns[system.inputs :, 1:] = np.eye(system.count)
    return sdp.LureSystem(1, system.rows @ columns, system.lower, system.upper, system.output @ columns)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A proof of a small network with a skip, a MaxMin pair and ReLUs, and the model whose tensors it names."""
    folder = tmp_path_factory.mktemp("proof")
    rng = np.random.default_rng(5)
    first, second, last = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4, 4), (2, 4)))
    bias = rng.standard_normal(4).astype(np.float32)
    wiring = sdp.Wiring(3)
    hidden = wiring.nonlinear(wiring.shift(wiring.linear(first.astype(float), wiring.input()), bias.astype(float)), RELU)
    sorted_pair = wiring.sort(wiring.linear(second.astype(float), hidden), np.array([0]), np.array([1]))
    output = wiring.linear(last.astype(float), wiring.add(hidden, sorted_pair))
    tensors = {"0.weight": first, "0.bias": bias, "1.weight": second, "2.weight": last}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    linears = [k for k, step in enumerate(wiring.steps) if step.what == "linear"]
    names = {**dict(zip(linears, ("0.weight", "1.weight", "2.weight"), strict=True)), 2: "0.bias"}
    system = wiring.system(output)
    multipliers, bound = proposed(system)
    about = {"model": "four weights"}
    claimed = proof_file.write(folder / "good.proof", wiring.steps, output.number, 3, multipliers, bound, 2, about, names)
    return {"path": folder / "good.proof", "model": folder / "model.safetensors", "tensors": tensors, "wiring": wiring, "output": output} | {
        "system": system, "multipliers": multipliers, "bound": bound, "claimed": claimed, "names": names, "about": about
    }  # fmt: skip


def forge(source, target, edit, sealed=True):
    """A copy of a proof, edited; with all digests made anew, if it is to be sealed."""
    meta, arrays, _ = check.tensors(source)
    document = json.loads(meta["proof"])
    arrays = copy.deepcopy(arrays)
    edit(document, arrays)
    if sealed:
        proof_file._store(target, document, arrays)
        document["sha256"] = check.tensors(target)[2]
        document["network"] = proof_file._network(document["inputs"], document["output"], document["steps"], document["sha256"])
    proof_file._store(target, document, arrays)
    return target


def system_of(path):
    """The system that the checker sees in a file."""
    meta, arrays, _ = check.tensors(path)
    document = json.loads(meta["proof"])
    v, (lower, upper), c = check.rebuild(document, arrays)
    return sdp.LureSystem(document["inputs"], v[0], lower, upper, c[0]), float.fromhex(document["bound"])


# What is accepted


def test_round_trip(written):
    proof = proof_file.read(written["path"])
    assert (proof.output, proof.inputs, proof.norm, proof.bound) == (written["output"].number, 3, 2, written["claimed"])
    assert Fraction(proof.rho) <= Fraction(proof.bound) ** 2
    assert np.array_equal(proof.multipliers, written["multipliers"])
    assert dict(proof.names) == written["names"]
    assert dict(proof.about) == written["about"]
    assert proof.network == proof_file.digest(written["wiring"].steps, written["output"].number, 3)
    for ours, theirs in zip(written["wiring"].steps, proof.steps, strict=True):
        assert (ours.what, ours.of, ours.name, set(ours.numbers)) == (theirs.what, theirs.of, theirs.name, set(theirs.numbers))
        assert all(np.array_equal(array, theirs.numbers[name]) for name, array in ours.numbers.items())
    again = proof_file.write(
        written["path"].with_name("again.proof"), proof.steps, proof.output, 3, proof.multipliers, proof.bound, 2, proof.about, proof.names
    )
    assert again == proof.bound
    assert written["path"].with_name("again.proof").read_bytes() == written["path"].read_bytes()


def test_a_proof_is_a_safetensors_file(written):
    arrays = safetensors.numpy.load_file(written["path"])
    assert np.array_equal(arrays["1.matrix"], written["tensors"]["0.weight"])


def test_the_checker_stands_alone(written, tmp_path):
    """Copied elsewhere, with nothing of this package in reach."""
    source = pathlib.Path(check.__file__)
    text = source.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(text)))
    used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert used - {"numpy"} <= set(sys.stdlib_module_names)
    shutil.copy(source, tmp_path / "checker.py")
    bad = forge(written["path"], tmp_path / "bad.proof", lambda document, _: document.update(bound=(1.0).hex()))
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({name: 2 * array for name, array in written["tensors"].items()}, other)
    for arguments, code, start in (
        ([written["path"]], 0, "proved: |f(x) - f(y)|_2 <= L |x - y|_2"),
        ([written["path"], written["model"]], 0, "proved: "),
        ([bad], 1, "rejected: "),
        ([written["path"], other], 1, "rejected: "),
        ([tmp_path / "nowhere"], 1, "rejected: "),
        ([], 1, "usage: "),
    ):
        run = subprocess.run(
            [sys.executable, "-I", "-W", "error", tmp_path / "checker.py", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (run.returncode, run.stderr) == (code, "")
        assert run.stdout.startswith(start)
        assert run.stdout.count("\n") == 1


def test_the_printed_constant_is_not_below_the_proved_one(written, tmp_path):
    for k in range(20):
        bound = written["claimed"] * (1 + k * 1.234e-10)
        holds, sentence = check.check(forge(written["path"], tmp_path / "more.proof", setter(bound=bound.hex())))
        assert holds
        assert Fraction(bound) <= Fraction(sentence.partition("L = ")[2].partition(",")[0]) <= Fraction(bound) * (1 + Fraction(1, 10**8))


@pytest.mark.parametrize("norm", [2, math.inf, 1])
def test_the_checker_agrees_with_prove(norm, tmp_path):
    """On random networks: what is proved is accepted, with at most 1e-8 more; and never below the truth."""
    for seed in range(100 if norm == 2 else 30):
        wiring, output = wired(seed, outputs=1 if norm == math.inf else None)
        system = wiring.system(output)
        multipliers, bound = proposed(system, norm)
        assert math.isfinite(bound)
        path = tmp_path / "one.proof"
        claimed = proof_file.write(path, wiring.steps, output.number, wiring.inputs, multipliers, bound, norm)
        assert bound <= claimed <= bound * (1 + 1e-8)
        assert check.check(path)[0]
        assert proof_file.read(path).multipliers.shape == multipliers.shape
        if seed < 30 and system.count <= 8:
            assert truth(system, norm) <= claimed * (1 + 1e-13)
        forge(path, path, lambda document, _: document.update(rho=(float.fromhex(document["rho"]) * (1 - 1e-6)).hex()))
        assert not check.check(path)[0], seed


def test_nonlinearities_that_are_affine_have_no_multipliers(tmp_path):
    """With all slopes one number, they are part of the linear maps."""
    wiring = sdp.Wiring(2)
    halved = wiring.nonlinear(wiring.linear(np.array([[3.0, 1.0], [0.0, 1.0]]), wiring.input()), Sloped(0.5, 0.5))
    output = wiring.nonlinear(wiring.nonlinear(halved, leaky_relu(1.0)), RELU)
    multipliers, bound = proposed(wiring.system(output))
    assert multipliers.shape == (2,)
    claimed = proof_file.write(tmp_path / "one.proof", wiring.steps, output.number, 2, multipliers, bound)
    assert truth(wiring.system(output)) <= claimed * (1 + 1e-13)
    for slope in (0.4, 0.6, 1.0):
        edit = [array_setter("nonlinear", name, lambda ends, slope=slope: 0 * ends + slope) for name in ("lower", "upper")]
        forge(tmp_path / "one.proof", tmp_path / "bad.proof", lambda document, arrays, edit=edit: [change(document, arrays) for change in edit])
        assert "narrower than those of slopes(0.5,0.5)" in check.check(tmp_path / "bad.proof")[1]


# What is not: every field, by somebody who makes all digests anew


def step_of(document, what, nth=0):
    return [k for k, step in enumerate(document["steps"]) if step["what"] == what][nth]


def edit_rho(document, _):
    document["rho"] = (float.fromhex(document["rho"]) * (1 - 1e-6)).hex()


def edit_bound(document, _):
    document["bound"] = (float.fromhex(document["bound"]) * (1 - 1e-15)).hex()


def edit_both(document, arrays):
    edit_rho(document, arrays)
    document["bound"] = (float.fromhex(document["bound"]) * (1 - 4e-7)).hex()


def setter(**values):
    return lambda document, _: document.update(values)


def step_setter(kind, **values):
    return lambda document, _: document["steps"][step_of(document, kind)].update(values)


def slope_setter(lower, upper):
    """Both ends moved."""

    def edit(document, arrays):
        array_setter("nonlinear", "lower", lambda ends: ends + lower)(document, arrays)
        array_setter("nonlinear", "upper", lambda ends: ends + upper)(document, arrays)

    return edit


def array_setter(what, name, change):
    def edit(document, arrays):
        key = f"{step_of(document, what)}.{name}"
        arrays[key] = change(arrays[key])

    return edit


def multiplier_setter(text):
    return lambda document, _: document["multipliers"].__setitem__(1, text)


def spoiled(value):
    def change(array):
        array = array.copy()
        array.flat[1] = value
        return array

    return change


REJECTED = {
    "a smaller rho": (edit_rho, "Matrix|matrix"),
    "a smaller bound": (edit_bound, "its bound is below"),
    "both smaller": (edit_both, "Matrix|matrix"),
    "rho is not a number": (setter(rho="nan"), "NaN"),
    "bound is not a number": (setter(bound="nan"), "NaN"),
    "an infinite bound": (setter(bound="inf"), "infinity"),
    "an infinite rho": (setter(rho="inf", bound="inf"), "infinity"),
    "a negative bound": (setter(bound=(-9.0).hex()), "negative"),
    "rho is no text": (setter(rho=9.0), "no proof"),
    "rho is zero": (setter(rho="0x0p+0"), "diagonal"),
    "a negative multiplier": (multiplier_setter((-1.0).hex()), "negative multiplier"),
    "a multiplier of zero": (multiplier_setter("0x0p+0"), "diagonal"),
    "a multiplier that is not a number": (multiplier_setter("nan"), "NaN"),
    "an infinite multiplier": (multiplier_setter("inf"), "infinity"),
    "a multiplier too many": (lambda document, _: document["multipliers"].append("0x1p+0"), "multipliers"),
    "a multiplier too few": (lambda document, _: document["multipliers"].pop(), "multipliers"),
    "another format": (setter(format=2), "format"),
    "another method": (setter(method="trust me"), "format or its words"),
    "another claim": (setter(proves="|f(x) - f(y)|_2 <= 0"), "format or its words"),
    "another norm": (setter(norm="inf"), "format or its words"),
    "another norm and its words": (setter(norm="inf", proves=check.WORDS["inf"], bound=(99.0).hex()), "its multipliers are"),
    "l1 and its words": (setter(norm="1", proves=check.WORDS["1"]), "reshape"),
    "a norm that is none": (setter(norm="3"), "no proof"),
    "an input less": (setter(inputs=2), "numbers"),
    "an input more": (setter(inputs=4), "numbers"),
    "no inputs": (setter(inputs=0), "output is signal"),
    "negative inputs": (setter(inputs=-3), "output is signal"),
    "many inputs": (setter(inputs=10**12), "of at most"),
    "inputs that are a text": (setter(inputs="3"), "no proof"),
    "no output": (setter(output=99), "output is signal 99"),
    "a negative output": (setter(output=-1), "output is signal -1"),
    "no steps": (setter(steps=[]), "output is signal"),
    "a step that takes itself": (step_setter("linear", of=[1]), "step 1 cannot be 'linear' of the signals \\[1\\]"),
    "a step that takes a later one": (step_setter("linear", of=[5]), "step 1 cannot be"),
    "a step that takes a negative one": (step_setter("linear", of=[-1]), "step 1 cannot be"),
    "a step that takes nothing": (step_setter("linear", of=[]), "step 1 cannot be"),
    "a step that takes two": (step_setter("linear", of=[0, 0]), "step 1 cannot be"),
    "an input that takes something": (lambda document, _: document["steps"].append({"what": "input", "of": [0], "activation": "", "arrays": []}), "cannot be"),
    "an unknown step": (step_setter("shift", what="swish"), "cannot be 'swish'"),
    "a sum that is a product": (step_setter("add", what="multiply"), "cannot be 'multiply'"),
    "a sum of different lengths": (
        lambda document, _: document["steps"][step_of(document, "add", -1)].update(of=[1, step_of(document, "pick")]),
        "\\(add\\) has parts for",
    ),
    "an array that is not there": (step_setter("linear", arrays=["matrix", "error"]), "no proof"),
    "a matrix that is not used": (step_setter("linear", arrays=[]), "no proof"),
    "a matrix for another input": (array_setter("linear", "matrix", lambda matrix: matrix[:, :2]), "has parts for"),
    "a matrix that is a vector": (array_setter("linear", "matrix", np.ravel), "has parts for"),
    "a matrix that is one row": (array_setter("linear", "matrix", lambda matrix: matrix[0]), "has parts for"),
    "a matrix that is not a number": (array_setter("linear", "matrix", spoiled(math.nan)), "NaN"),
    "a matrix that is infinite": (array_setter("linear", "matrix", spoiled(math.inf)), "infinity"),
    "an offset that is not a number": (array_setter("shift", "offset", spoiled(math.nan)), "NaN"),
    "an offset for another signal": (array_setter("shift", "offset", lambda offset: offset[:1]), "has parts for"),
    "picks of nothing": (array_setter("pick", "which", lambda which: which + 99), "no proof|out of bounds"),
    "a scale of one number": (array_setter("scale", "factor", lambda factor: np.append(factor, 1.0)), "has parts for"),
    "a weight that is larger": (array_setter("linear", "matrix", lambda matrix: 1.001 * matrix), "Matrix|matrix"),
    "a flipped slope": (array_setter("nonlinear", "lower", lambda lower: lower - 1.0) , "Matrix|matrix"),
    "slopes of minus the function": (slope_setter(-1.0, -1.0), "narrower"),
    "a narrower upper slope": (array_setter("nonlinear", "upper", lambda upper: upper * (1 - 1e-9)), "narrower"),
    "a narrower lower slope": (array_setter("nonlinear", "lower", lambda lower: lower + 1e-9), "narrower"),
    "no slopes": (array_setter("nonlinear", "upper", lambda upper: 0 * upper), "narrower"),
    "slopes that cross": (slope_setter(1.0, -1.0), "narrower"),
    "endless slopes": (array_setter("nonlinear", "upper", lambda upper: upper + 1e300), "narrower"),
    "another activation": (step_setter("nonlinear", activation="abs"), "narrower than those of abs"),
    "a steeper leak": (step_setter("nonlinear", activation="leaky_relu(-0.1)"), "narrower"),
    "an unknown activation": (step_setter("nonlinear", activation="swish"), "'swish', whose slopes are not known"),
    "an activation without numbers": (step_setter("nonlinear", activation="slopes"), "not known"),
    "an activation with numbers": (step_setter("nonlinear", activation="relu(2)"), "not known"),
    "slopes that are not numbers": (step_setter("nonlinear", activation="slopes(nan,nan)"), "narrower"),
    "infinite slopes": (step_setter("nonlinear", activation="slopes(-inf,inf)"), "narrower"),
    "no activation": (step_setter("nonlinear", activation=""), "not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_forged_is_rejected(name, written, tmp_path):
    edit, reason = REJECTED[name]
    path = forge(written["path"], tmp_path / "bad.proof", edit)
    holds, sentence = check.check(path)
    assert not holds
    assert sentence.startswith(f"rejected: {path}: ")
    assert re.search(reason, sentence), sentence


@pytest.mark.parametrize("field", proof_file._FIELDS)
def test_a_field_that_is_missing_is_missed(field, written, tmp_path):
    path = forge(written["path"], tmp_path / "bad.proof", lambda document, _: document.pop(field), sealed=False)
    with pytest.raises(ValueError, match=r"is no proof: its fields are"):
        proof_file.read(path)
    assert not check.check(path)[0] or field == "about"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (setter(extra=1), "its fields are"),
        (setter(format=2), "its format is 2, known is 1"),
        (setter(proves="less"), "words are not known"),
        (setter(inputs=True), "not whole numbers"),
        (setter(about={"model": 3}), "not texts"),
        (setter(names={"99.matrix": "0.weight"}), "its steps have the arrays"),
        (multiplier_setter("nan"), "not all finite"),
        (multiplier_setter("-0x1p+0"), "not all finite"),
        (lambda document, _: document["multipliers"].pop(), "multipliers for"),
        (array_setter("linear", "matrix", spoiled(math.nan)), "its array 1.matrix has NaN"),
        (array_setter("pick", "which", lambda which: which.astype(float)), "wrong type"),
        (array_setter("nonlinear", "upper", lambda upper: 0 * upper), "narrower"),
        (step_setter("linear", of=[9]), "cannot be"),
        (lambda _, arrays: arrays.update(more=np.ones(3)), "its steps have the arrays"),
    ],
)
def test_what_is_not_well_formed_is_not_read(edit, reason, written, tmp_path):
    with pytest.raises(ValueError, match=reason) as raised:
        proof_file.read(forge(written["path"], tmp_path / "bad.proof", edit))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "edit",
    [
        array_setter("linear", "matrix", spoiled(0.125)),
        array_setter("shift", "offset", spoiled(0.125)),
        array_setter("nonlinear", "lower", lambda lower: lower - 0.5),
        step_setter("nonlinear", activation="clamp(0,6)"),
        setter(output=0),
        lambda document, arrays: arrays.update({"1.matrix": arrays["1.matrix"].reshape(-1, 3)[::-1].copy()}),
    ],
)
def test_without_new_digests_any_change_of_the_network_is_seen(edit, written, tmp_path):
    path = forge(written["path"], tmp_path / "bad.proof", edit, sealed=False)
    assert check.check(path) == (False, f"rejected: {path}: its steps or arrays are not those that it was written with")
    with pytest.raises(ValueError, match="not those that it was written with"):
        proof_file.read(path)


def test_a_file_that_is_cut_short_is_rejected(written, tmp_path):
    data, path = written["path"].read_bytes(), tmp_path / "cut.proof"
    for length in [*range(0, 64), *range(64, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:length])
        assert not check.check(path)[0]
        with pytest.raises(ValueError, match="is no proof"):
            proof_file.read(path)


def test_bytes_that_changed_never_make_a_false_claim(written, tmp_path):
    """Most changes are seen; those that are not, in texts about the model and in the last digits of multipliers, leave a claim that is true."""
    rng, path, accepted = np.random.default_rng(0), tmp_path / "flipped.proof", 0
    fgl = truth(written["system"])
    for _ in range(400):
        data = bytearray(written["path"].read_bytes())
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        if check.check(path)[0]:
            accepted += 1
            system, bound = system_of(path)
            assert np.array_equal(system.rows, written["system"].rows)
            assert bound >= fgl * (1 - 1e-13)
    assert accepted < 100


def test_other_multipliers_prove_nothing_that_is_false(written, tmp_path):
    """Larger or smaller, one or all: what is accepted is true; and a claim below the truth is accepted with none."""
    rng, path = np.random.default_rng(1), tmp_path / "other.proof"
    fgl, accepted = truth(written["system"]), 0
    for trial in range(200):
        factors = np.exp(rng.normal(size=len(written["multipliers"])) * (1e-6, 1e-3, 0.1, 1.0)[trial % 4])
        if trial % 2:
            factors[1:] = 1.0
        claim = fgl * (1 - 1e-9) if trial % 3 == 0 else written["claimed"] * (1 + (1e-9, 1e-4, 0.1)[trial % 3])

        def edit(document, _, factors=factors, claim=claim):
            document["multipliers"] = [(a * b).hex() for a, b in zip(written["multipliers"].tolist(), factors.tolist(), strict=True)]
            document["bound"], document["rho"] = claim.hex(), math.nextafter(claim * claim, 0.0).hex()

        holds, _ = check.check(forge(written["path"], path, edit))
        assert claim >= fgl or not holds
        accepted += holds
    assert accepted > 10


@pytest.mark.parametrize("output", range(9))
def test_another_output_is_another_network(output, written, tmp_path):
    """The claim is about the signal that is named: accepted only where it is true of it, and with another digest."""
    path = forge(written["path"], tmp_path / "other.proof", setter(output=output))
    if check.check(path)[0]:
        system, bound = system_of(path)
        assert largest_over_slopes(system) <= bound
    network = json.loads(check.tensors(path)[0]["proof"])["network"]
    assert network != proof_file.digest(written["wiring"].steps, written["output"].number, 3)


def test_swapped_weights(written, tmp_path):
    """Proved, if at all, of the network that has them so; and not of the model."""

    def swap(document, arrays):
        first, second = step_of(document, "linear", 1), step_of(document, "linear", 2)
        arrays[f"{first}.matrix"], arrays[f"{second}.matrix"] = arrays[f"{first}.matrix"][::-1].copy(), arrays[f"{second}.matrix"][:, ::-1].copy()

    path = forge(written["path"], tmp_path / "swapped.proof", swap)
    if check.check(path)[0]:
        system, bound = system_of(path)
        assert largest_over_slopes(system) <= bound
    assert not check.check(path, written["model"])[0]


# The model


def test_a_proof_knows_its_model(written, tmp_path):
    holds, sentence = check.check(written["path"], written["model"])
    assert holds
    assert f"4 of whose 18 arrays are tensors of {written['model']}" in sentence, sentence
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({**written["tensors"], "more": np.ones(2, dtype=bool)}, other)
    assert check.check(written["path"], other)[0]
    for name, array in written["tensors"].items():
        changed = array.copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        for tensors in (
            {**written["tensors"], name: changed},
            {**written["tensors"], name: array.reshape(1, *array.shape)},
            {**written["tensors"], name: array.astype(np.float16)},
            {key: value for key, value in written["tensors"].items() if key != name},
        ):
            safetensors.numpy.save_file(tensors, other)
            holds, sentence = check.check(written["path"], other)
            assert not holds
            assert f"1 of its arrays are not the tensors of {other} that they should be: ['{name}']" in sentence
    other.write_bytes(written["model"].read_bytes()[:-1])
    assert not check.check(written["path"], other)[0]
    assert not check.check(written["path"], tmp_path / "nowhere")[0]


def test_half_precision_and_double_tensors_are_known(written, tmp_path):
    model = tmp_path / "model.safetensors"
    for kind in (np.float16, np.float32, np.float64):
        matrix = np.array([[0.5, -1.25], [3.0, 0.1]], dtype=kind)
        safetensors.numpy.save_file({"w": matrix}, model)
        wiring = sdp.Wiring(2)
        output = wiring.linear(matrix.astype(float), wiring.input())
        proof_file.write(tmp_path / "w.proof", wiring.steps, output.number, 2, np.zeros(0), sdp.prove(wiring.system(output), np.zeros(0)), names={1: "w"})
        assert check.check(tmp_path / "w.proof", model)[0]


def test_a_proof_of_one_file_is_not_one_of_another(written, tmp_path):
    """With the digest of the model's file on record, only that file will do; with neither digest nor names, none."""
    arguments = (written["wiring"].steps, written["output"].number, 3, written["multipliers"], written["bound"], 2)
    path, other = tmp_path / "one.proof", tmp_path / "other.safetensors"
    safetensors.numpy.save_file(written["tensors"], other, metadata={"made": "later"})
    proof_file.write(path, *arguments, about={"model_sha256": check.tensors(written["model"])[0]["sha256"]}, names=written["names"])
    assert check.check(path, written["model"])[0]
    assert not check.check(path, other)[0]
    proof_file.write(path, *arguments)
    assert check.check(path)[0]
    assert "it is not about the file" in check.check(path, written["model"])[1]


# What is not written


def test_a_proof_on_a_region_is_not_written(tmp_path):
    wiring = sdp.Wiring(2, sdp.Region(np.zeros(2), 0.5))
    output = wiring.nonlinear(wiring.linear(np.eye(2), wiring.input()), TANH)
    multipliers, bound = proposed(wiring.system(output))
    with pytest.raises(ValueError, match="slopes of step 2 are narrower than those of tanh everywhere"):
        proof_file.write(tmp_path / "local.proof", wiring.steps, output.number, 2, multipliers, bound)
    assert not list(tmp_path.iterdir())


def test_what_does_not_check_is_not_written(written, tmp_path):
    """And what was there before is left alone."""
    path = tmp_path / "kept.proof"
    path.write_bytes(b"before")
    steps, output, multipliers, bound = written["wiring"].steps, written["output"].number, written["multipliers"], written["bound"]
    for used, claim, norm, reason in (
        (multipliers, bound * (1 - 1e-3), 2, "the checker did not accept it, nor 0.0001 more: "),
        (0.5 * multipliers, bound, 2, "the checker did not accept it"),
        (-multipliers, bound, 2, "negative multiplier"),
        (multipliers * math.nan, bound, 2, "NaN"),
        (multipliers[1:], bound, 2, "its multipliers are"),
        (multipliers, bound, math.inf, "its multipliers are"),
        (multipliers, math.inf, 2, "a finite bound above 0, got inf"),
        (multipliers, math.nan, 2, "a finite bound above 0, got nan"),
        (multipliers, 0.0, 2, "a finite bound above 0"),
        (multipliers, bound, 3, "proofs are written from l2, l-infinity and l1, got p=3"),
    ):
        with pytest.raises(ValueError, match=reason) as raised:
            proof_file.write(path, steps, output, 3, used, claim, norm)
        assert "\n" not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)
    for about, names, reason in (
        ({"epochs": 3}, {}, "are texts"),
        ({}, {1: 3}, "are texts"),
        ({}, {0: "x"}, "those of linear, shift, scale steps, got one for step 0 of"),
        ({}, {99: "x"}, "got one for step 99 of"),
    ):
        with pytest.raises(ValueError, match=reason):
            proof_file.write(path, steps, output, 3, multipliers, bound, 2, about, names)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["kept.proof"]


def test_a_digest_is_of_the_network_only(written):
    steps, output = list(written["wiring"].steps), written["output"].number
    digest = proof_file.digest(steps, output, 3)
    assert digest == proof_file.digest(copy.deepcopy(steps), output, 3)
    assert digest != proof_file.digest(steps, output - 1, 3)
    assert digest != proof_file.digest([*steps, steps[0]], output, 3)
    changed = dict(steps[1].numbers)
    changed["matrix"] = spoiled(0.0)(changed["matrix"])
    assert digest != proof_file.digest([steps[0], sdp.wiring.Step("linear", (0,), changed), *steps[2:]], output, 3)


# The arithmetic of the checker, against fractions


def fractions_of(wiring, output):
    """The rows of the nonlinearities and the output, exactly, from the steps."""
    width, at, signals, rows = wiring.inputs + wiring.count, wiring.inputs, [], []

    def unit(j):
        return [Fraction(int(i == j)) for i in range(width)]

    for step in wiring.steps:
        of, numbers = [signals[j] for j in step.of], step.numbers
        if step.what == "input":
            made = [unit(j) for j in range(wiring.inputs)]
        elif step.what == "linear":
            made = [[sum((a * row[i] for a, row in zip(line, of[0], strict=True)), Fraction(0)) for i in range(width)] for line in exact(numbers["matrix"])]
        elif step.what == "scale":
            made = [[Fraction(float(factor)) * x for x in row] for factor, row in zip(numbers["factor"], of[0], strict=True)]
        elif step.what == "add":
            made = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(*of, strict=True)]
        elif step.what == "pick":
            made = [of[0][k] for k in numbers["which"]]
        elif step.what == "join":
            made = [row for part in of for row in part]
        elif step.what == "nonlinear":
            rows, made, at = rows + of[0], [unit(at + k) for k in range(len(of[0]))], at + len(of[0])
        else:
            made = of[0]
        signals.append(made)
    return rows, signals[output.number]


@pytest.mark.parametrize("seed", range(40))
def test_the_signals_of_the_checker_hold_the_exact_ones(seed, tmp_path):
    wiring, output = wired(seed)
    multipliers, bound = proposed(wiring.system(output))
    proof_file.write(tmp_path / "one.proof", wiring.steps, output.number, wiring.inputs, multipliers, bound)
    meta, arrays, _ = check.tensors(tmp_path / "one.proof")
    v, _, c = check.rebuild(json.loads(meta["proof"]), arrays)
    for ball, rows in zip((v, c), fractions_of(wiring, output), strict=True):
        assert ball.shape[1] == len(rows)
        for i, row in enumerate(rows):
            for j, entry in enumerate(row):
                assert abs(Fraction(ball[0, i, j]) - entry) <= Fraction(ball[1, i, j])
        assert (ball[1] <= 1e-10 * (1 + np.abs(ball[0]))).all()


@pytest.mark.parametrize("seed", range(30))
def test_sums_and_products_of_balls_hold_the_exact_ones(seed):
    """The worst corners of the radii, and entries that cancel, vanish and underflow."""
    rng = np.random.default_rng(seed)

    def ball(*shape):
        middle = rng.choice([0.0, 1.0, -1.0, 0.1, 1 / 3, 1e8 + 0.1, 1e-200, 3e-170], shape) * rng.choice([1.0, -1.0, 2.0**-7], shape)
        return np.stack([middle, rng.choice([0.0, 0.0, 1e-16, 1e-3, 1e-180], shape)])

    a, b, other = ball(3, 4), ball(4, 2), ball(3, 4)
    for _ in range(4):
        one, two, three = (
            [
                [Fraction(m) + int(s) * Fraction(r) for m, r, s in zip(*row, strict=True)]
                for row in zip(x[0], x[1], rng.integers(-1, 2, x[0].shape), strict=True)
            ]
            for x in (a, b, other)
        )
        cases = [
            (check.times(a, b), [[sum(one[i][k] * two[k][j] for k in range(4)) for j in range(2)] for i in range(3)]),
            (check.times(a[:, :, :1], other, np.multiply), [[one[i][0] * three[i][j] for j in range(4)] for i in range(3)]),
            (check.plus(a, other), [[one[i][j] + three[i][j] for j in range(4)] for i in range(3)]),
        ]
        for found, exactly in cases:
            for i, row in enumerate(exactly):
                for j, entry in enumerate(row):
                    assert abs(Fraction(found[0, i, j]) - entry) <= Fraction(found[1, i, j])


@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("seed", range(10))
def test_the_matrix_of_the_checker_holds_the_exact_one(seed, norm, monkeypatch):
    """Every entry, for numbers that all round; caught on its way, when rho has been added."""
    rng = np.random.default_rng(seed)
    inputs, count = 3, 4
    v, c, rho = rng.standard_normal((count, inputs + count)), rng.standard_normal((1, inputs + count)), float(rng.random() + 30)
    low = -rng.random(count)
    high, t = low + rng.random(count), rng.random(count) + 0.1
    mu = rng.random(inputs if norm == "inf" else 0)
    seen, plus = [], check.plus
    monkeypatch.setattr(check, "plus", lambda a, b: seen.append(plus(a, b)) or seen[-1])
    with contextlib.suppress(ValueError):
        check.prove(norm, rho, np.concatenate([t, mu]), np.stack([v, 0 * v]), np.stack([low, high]), np.stack([c, 0 * c]))
    size = inputs + count
    wanted = [[Fraction(0)] * (size + 1) for _ in range(size + 1)]
    for k, row in enumerate(exact(v)):
        for i, j in itertools.product(range(size), repeat=2):
            p, q = (int(j == inputs + k) - Fraction(float(ends[k])) * row[j] for ends in (low, high))
            p_i, q_i = (int(i == inputs + k) - Fraction(float(ends[k])) * row[i] for ends in (low, high))
            wanted[i][j] += Fraction(float(t[k])) * (p_i * q + q_i * p)
    for j, entry in enumerate(exact(c)[0]):
        wanted[size][j] = wanted[j][size] = entry
    for i in range(inputs):
        wanted[i][i] += Fraction(float(mu[i])) if norm == "inf" else Fraction(rho)
    wanted[size][size] = 2 * Fraction(rho) - sum(map(Fraction, mu.tolist())) if norm == "inf" else Fraction(1)
    middle, radius = seen[3]
    for i, j in itertools.product(range(size + 1), repeat=2):
        assert abs(Fraction(middle[i, j]) - wanted[i][j]) <= Fraction(radius[i, j])
    assert (radius <= 1e-13 * (1 + np.abs(middle))).all()


def test_the_factor_is_not_trusted(monkeypatch):
    """With R = 0 what is left is the matrix itself: accepted only if it is diagonally dominant, by more than its radii."""
    none, slopes = np.zeros((2, 0, 1)), np.zeros((2, 0))

    def accepted(rho, middle, radius):
        try:
            check.prove("2", rho, np.zeros(0), none, slopes, np.array([[[middle]], [[radius]]]))
        except ValueError:
            return False
        return True

    assert accepted(1.0001, 1.0, 0.0)
    assert not accepted(0.9999, 1.0, 0.0)
    assert not accepted(1.0001, 1.0, 1e-3)
    monkeypatch.setattr(np.linalg, "cholesky", np.zeros_like)
    assert accepted(1.5, 0.9, 0.05)
    assert not accepted(1.5, 0.9, 0.2)
    assert not accepted(1.5, 1.2, 0.0)
    monkeypatch.setattr(np.linalg, "cholesky", lambda matrix: np.full_like(matrix, math.nan))
    assert not accepted(1.5, 0.9, 0.05)


def smallest_accepted(system, multipliers, guess):
    """Just above what the checker does not accept, by bisection."""
    balls = [np.stack([part, 0 * part]) for part in (system.rows, system.output)]
    low, high = guess * (1 - 1e-3), guess * (1 + 1e-3)
    for _ in range(60):
        middle = (low + high) / 2
        try:
            check.prove("2", middle, multipliers, balls[0], np.stack([system.lower, system.upper]), balls[1])
            high = middle
        except ValueError:
            low = middle
    return high


@pytest.mark.parametrize("seed", range(25))
def test_the_edge_of_what_is_accepted_is_exactly_feasible(seed):
    """The smallest rho that the checker takes is feasible in fractions; and no larger than it has to be."""
    rng = np.random.default_rng(seed)
    system = sdp.feed_forward([rng.standard_normal(shape) for shape in ((3, 2), (2, 3), (2, 2))], slopes=((0.0, 1.0), (-1.0, 1.0), (0.1, 0.7))[seed % 3])
    multipliers, bound = proposed(system)
    rho = smallest_accepted(system, multipliers, bound**2)
    assert abs(rho / bound**2 - 1) < 1e-9
    root = Fraction(math.nextafter(math.sqrt(rho), 0.0))
    assert exactly_proved(system, multipliers, math.nextafter(math.sqrt(rho), math.inf))
    assert not exactly_proved(system, multipliers, float(root) * (1 - 1e-9))


def test_the_slopes_that_are_known():
    """The range that each activation needs is within the one that it gets, and holds the difference quotients that are seen."""
    points = np.linspace(-8, 8, 4001)
    for bent in ACTIVATIONS:
        wiring = sdp.Wiring(1)
        output = wiring.nonlinear(wiring.input(), bent)
        low, high = bent.range
        document = {"inputs": 1, "output": 1, "steps": [{"what": s.what, "of": s.of, "activation": s.name, "arrays": list(s.numbers)} for s in wiring.steps]}
        arrays = {f"1.{name}": array for name, array in wiring.steps[output.number].numbers.items()}
        check.rebuild(document, arrays)
        for name, end in (("lower", low + 3e-9), ("upper", high - 3e-9)):
            with pytest.raises(ValueError, match="narrower"):
                check.rebuild(document, {**arrays, f"1.{name}": np.array([end])})
        if bent.text in check.SLOPES:
            least, most = check.SLOPES[bent.text]
            if isinstance(bent, activation.Smooth):
                value = activation._SMOOTH[bent.name].value[0](points)
                seen = np.diff(value) / np.diff(points)
                assert least - 1e-12 <= seen.min()
                assert seen.max() <= most + 1e-12
                assert seen.min() <= least + 1e-3
                assert most - 1e-3 <= seen.max()
