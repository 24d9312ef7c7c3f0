"""The noise is what its specification says: known answers, one set of bits on every back end, and nothing that depends on the batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from certify.errors import CertifyError
from certify.smoothing.noise import SELECTION, Gauss, Grid, build, dispatch, native, noisy_rows, row_table, spec, tables, to_grid

SHAPE = (7, 5, 3)
ROWS = row_table([0, 1, -1, 2, 0, 0], [11, 2**32 - 1, 0, 33, 11, 11], [0, 2**33 + 3, 5, 2**63 - 1, 7, SELECTION])
NOISES = (
    Grid(0.25, seed=2**64 - 3, scale=(0.019, 0.02, 0.021), bias=(-2.4, -2.3, 0.1)),
    Grid(1.0, seed=3),
    Grid(0.1, levels=16, bias=(0.25,)),
    Gauss(0.5, seed=1, scale=(4.9, 5.1, 5.2), bias=(-2.4, -2.3, 0.1)),
    Gauss(1.7),
)


def images(noise, shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.integers(0, noise.levels + 1, (3, *shape)).astype(np.int32) if isinstance(noise, Grid) else rng.random((3, *shape), dtype=np.float32)


def by_definition(noise, x, rows=ROWS):
    flat = x.reshape(len(x), -1)
    return spec.apply(noise, flat, rows, noise.draw(rows, flat.shape[1])).reshape(-1, *x.shape[1:])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The C kernels, built here."""
    path = tmp_path_factory.mktemp("noise") / "_noise.so"
    if reason := build.build(path):
        pytest.skip(reason)
    return path


@pytest.fixture(params=["numpy", "c"])
def backend(request, monkeypatch):
    if request.param == "c":
        found = native.load(request.getfixturevalue("compiled"))
        assert found is not None
        monkeypatch.setattr(native, "library", lambda: found)
    return request.param


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # of Random123
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(counter, seed, words):
    assert tuple(int(word) for word in spec.philox(*counter, seed)) == words


def test_the_counter_is_group_sample_stream_and_tag():
    rows = row_table(0, 0xFFFFFFFE, 5 << 32 | 9)
    for low in (False, True):
        expected = np.concatenate([spec.philox(group, 9, 0xFFFFFFFE, 5 | low << 31, 77) for group in range(3)])
        assert np.array_equal(spec.words(77, rows, 11, low)[0], expected[:11])


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_every_back_end_gives_the_bits_of_the_definition(noise, backend):
    for shape in (SHAPE, (2049 * 3,)):  # more than two chunks, the last of them short
        x = images(noise, shape)
        wanted = by_definition(noise, x)
        assert np.isnan(wanted[2]).all()
        assert np.isfinite(np.delete(wanted, 2, axis=0)).all()
        for threads in (1, 4):
            assert np.array_equal(noisy_rows(noise, x, ROWS, backend=backend, threads=threads), wanted, equal_nan=True)
        out = torch.full(wanted.shape, 7.0)
        source = torch.from_numpy(x)
        assert noisy_rows(noise, source, torch.from_numpy(ROWS), out, backend=backend) is out
        assert np.array_equal(out.numpy(), wanted, equal_nan=True)
        narrow = noisy_rows(noise, source, torch.from_numpy(ROWS), backend=backend, bfloat16=True)
        assert np.array_equal(narrow.view(torch.int16).numpy().view(np.uint16)[3:], spec.bfloat16_bits(wanted)[3:])
        assert narrow[2].isnan().all()


@pytest.mark.parametrize("noise", [NOISES[0], NOISES[3]], ids=repr)
def test_a_row_depends_on_its_own_line_alone(noise, backend):
    x = images(noise)
    whole = noisy_rows(noise, x, ROWS, backend=backend)
    for part in (slice(0, 1), slice(1, 5), [4, 0, 3]):
        assert np.array_equal(noisy_rows(noise, x, ROWS[part], backend=backend), whole[part], equal_nan=True)
    other = noisy_rows(noise, x[:1], ROWS[[0]], backend=backend)
    assert np.array_equal(other, whole[[0]])
    assert not np.array_equal(whole[0], whole[4])  # another sample of the same stream
    assert noisy_rows(noise, x, ROWS[:0], backend=backend).shape == (0, *SHAPE)


def test_the_definition_of_grid_noise_in_whole_numbers():
    """One element, with Python's integers."""
    noise = Grid(0.5, seed=9)
    high, low = (spec.words(9, ROWS, 40, tag).astype(object) for tag in (False, True))
    k = noise.draw(ROWS, 40)
    for row in range(len(ROWS)):
        for e in range(40):
            u = high[row, e] << 32 | low[row, e]
            v = 2**64 - 1 - u if u >> 63 else u
            size = sum(v < q for q in noise.tables.thresholds)
            assert k[row, e] == (size if u >> 63 else -size)


GRIDS = [Grid(s, levels=levels) for s, levels in ((1e-3, 1), (0.3, 1), (8.0, 1), (0.12, 255), (1.0, 255), (3.0, 255))]


@pytest.mark.parametrize("noise", [*GRIDS, Grid(0.05, law="laplace"), Grid(0.3, levels=1, law="uniform"), Grid(0.5, law="uniform")], ids=repr)
def test_the_table_and_the_climb_give_the_definition_at_every_threshold(noise):
    t = noise.tables
    edges = np.array([max(q + step, 0) for q in (*t.thresholds, 2**32, 2**62) for step in (-(2**32), -1, 0, 1, 2**32)], dtype=np.uint64)
    v = np.concatenate([edges, np.random.default_rng(0).integers(0, 2**63, 20_000, dtype=np.uint64), [np.uint64(0), np.uint64(2**63 - 1)]])
    v = v[v < 2**63]
    wanted = np.array([len(t.thresholds)] * len(v)) - np.searchsorted(np.array(t.thresholds[::-1], dtype=np.uint64), v, side="right")
    for u in (v, ~v):
        word, low = (u >> np.uint64(32)).astype(np.uint32), u.astype(np.uint32)
        magnitude, undecided = t.magnitude(word)
        assert np.array_equal(magnitude[~undecided], wanted[~undecided])
        assert (magnitude <= wanted).all()
        assert np.array_equal(t.climb(magnitude, word, low), wanted)
        assert undecided[: len(edges)].any() == bool(t.thresholds)
        assert undecided[-20_000:].mean() < 1e-3


def test_back_ends_where_the_upper_words_do_not_decide(backend, monkeypatch):
    """All is left to the 64-bit comparisons."""
    noise = Grid(0.25, seed=5)
    t = noise.tables
    blunt = tables.Tables(t.thresholds, t.total_variation, t.shift, t.offset, np.full_like(t.lookup, -2 & 0xFFFFFFFF), t.high, t.low)
    x = images(noise)
    wanted = by_definition(noise, x)
    monkeypatch.setattr(spec, "tables", lambda *_: blunt)
    assert np.array_equal(noisy_rows(noise, x, ROWS, backend=backend), wanted, equal_nan=True)


def test_back_ends_at_numbers_that_are_thresholds(backend, monkeypatch):
    """Thresholds are what was drawn, and one above: equal in all 64 bits, which chance never shows."""
    noise = Grid(0.25, seed=6)
    x = images(noise)
    high, low = (spec.words(noise.seed, ROWS[:1], x[0].size, tag)[0].astype(object) for tag in (False, True))
    drawn = [min(u, 2**64 - 1 - u) for u in high * 2**32 + low]
    for thresholds in ({*drawn[::2], *(v + 1 for v in drawn[1::2])}, {drawn[0] + 1}, {drawn[-1]}):
        ties = tables.arrange(tuple(sorted(thresholds, reverse=True)), 0.0)
        monkeypatch.setattr(spec, "tables", lambda *_, ties=ties: ties)
        wanted = by_definition(noise, x)
        assert np.array_equal(noisy_rows(noise, x, ROWS, backend=backend), wanted, equal_nan=True)
        assert ties.magnitude(spec.words(noise.seed, ROWS[:1], x[0].size)[0])[1].any()


def test_a_library_that_is_not_of_this_source_or_gives_other_bits_is_not_used(compiled, tmp_path, monkeypatch):
    assert native.load(compiled) is not None
    assert native.load(tmp_path / "missing.so") is None
    monkeypatch.setattr(native, "digest", lambda: "0" * 64)
    assert native.load(compiled) is None
    monkeypatch.undo()
    other = tmp_path / "_noise.c"
    other.write_text(build.SOURCE.read_text().replace("8.3321608736e-3f", "8.332e-3f"))
    monkeypatch.setattr(build, "SOURCE", other)
    assert build.build(tmp_path / "other.so") is None
    monkeypatch.setattr(native, "digest", build.digest)
    assert native.load(tmp_path / "other.so") is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert "numpy" in native.describe()
    with pytest.raises(CertifyError, match="no back end 'c'"):
        noisy_rows(NOISES[0], images(NOISES[0]), ROWS, backend="c")


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    assert "fails" in build.build(tmp_path / "_noise.so")
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    assert "cannot be run" in build.build(tmp_path / "_noise.so")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in build.build(tmp_path / "_noise.so")
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_rounded_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    y = np.concatenate([bits, bits & 0xFFFF8000, [0x7F7FFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000, 1]]).astype(np.uint32).view(np.float32)
    wanted = torch.from_numpy(y).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(spec.bfloat16_bits(y)[~np.isnan(y)], wanted[~np.isnan(y)])


def test_images_of_bytes_are_on_the_grid():
    pixels = np.arange(256, dtype=np.float32).reshape(1, -1) / np.float32(255)
    x, distance = to_grid(pixels)
    assert np.array_equal(x[0], np.arange(256))
    exact = np.sqrt(np.sum((pixels.astype(np.longdouble) - np.arange(256, dtype=np.longdouble) / 255) ** 2))
    assert exact <= distance[0] <= 1.01 * exact + 1e-14
    x, distance = to_grid([[0.5, 0.25], [0.55, 0.5]], levels=2)
    assert x.tolist() == [[1, 0], [1, 1]]
    assert np.allclose(distance, [0.25, 0.05], rtol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Grid(0.0), "sigma is a positive"),
        (lambda: Gauss(float("nan")), "sigma is a positive"),
        (lambda: Grid(0.5, seed=-1), "seed"),
        (lambda: Gauss(0.5, seed=1.0), "seed"),
        (lambda: Grid(0.5, levels=0), "levels"),
        (lambda: Grid(0.5, levels=255.0), "levels"),
        (lambda: Grid(0.5, scale=(1.0, 2.0), bias=(0.0, 0.0, 0.0)), "one for each channel"),
        (lambda: Gauss(0.5, bias=()), "one for each channel"),
        (lambda: Grid(100.0).tables, "at most 4096 steps"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.float32), ROWS[:1]), "added to uint8, int16, int32"),
        (lambda: noisy_rows(Gauss(0.5), np.zeros((1, 4)), ROWS[:1]), "added to float32"),
        (lambda: noisy_rows(Gauss(0.5, bias=(1.0, 2.0)), np.zeros((1, 5), np.float32), ROWS[:1]), "for 2 channels"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), ROWS[:2]), "slot from -1 to 0"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), ROWS[:, :2]), "int64 table"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), row_table(0, 1 << 32, 0)), "a stream from 0"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), ROWS[:1], np.zeros((1, 5), np.float32)), "of shape"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), ROWS[:1], bfloat16=True), "no bfloat16"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), ROWS[:1], backend="cuda"), "no back end 'cuda'"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.uint8), torch.from_numpy(ROWS[:1])), "in one place"),
        (lambda: noisy_rows(Grid(0.5), np.zeros((1, 4), np.int64), ROWS[:1]), "got int64"),
        (lambda: to_grid([[float("nan")]]), "finite"),
    ],
)
def test_refusals_are_one_sentence(call, message):
    with pytest.raises(CertifyError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_triton_that_is_missing_is_named_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "certify.smoothing.noise.triton_kernels", raising=False)
    with pytest.raises(CertifyError, match=r"lipnet\[gpu\]"):
        dispatch._kernels()


def test_the_numpy_form_needs_no_torch():
    code = (
        "import sys, numpy as np; from certify.smoothing.noise import *; "
        "noisy_rows(Grid(.5), np.zeros((1, 4), np.uint8), row_table(0, 0, 0)); sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
