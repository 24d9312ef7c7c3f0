"""The Triton kernels give the bits of the specification: in Triton's interpreter where triton is installed, on a GPU where there is one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from certify.smoothing.noise import Gauss, Grid, count_rows, counts, noisy_rows, row_table, spec, tables

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = pathlib.Path(__file__).parent.parent
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not TRITON or not (INTERPRETED or torch.cuda.is_available()), reason="needs triton, and a GPU or its interpreter")
aot = pytest.mark.skipif(not TRITON or INTERPRETED, reason="needs triton")

ELEMENTS = 3 * 5 * 7
ROWS = row_table([0, 1, -1, 2, 0], [11, 2**32 - 1, 0, 33, 11], [0, 2**33 + 3, 5, 2**62, 7])


def images(noise, kinds=np.int16):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 5, 7, 3)).astype(kinds) if isinstance(noise, Grid) else rng.random((3, 5, 7, 3), dtype=np.float32)


def expected(noise, x, rows):
    return spec.apply(noise, x.reshape(len(x), -1), rows, noise.draw(rows, ELEMENTS)).reshape(-1, *x.shape[1:])


def drawn(noise, x, rows, **options):
    return noisy_rows(noise, torch.from_numpy(x).to(DEVICE), torch.from_numpy(rows).to(DEVICE), backend="triton", **options).cpu()


NOISES = (
    Grid(0.5, seed=2**64 - 3, scale=(0.019, 0.02, 0.021), bias=(-2.4, -2.3, 0.1)),
    Gauss(0.5, seed=1, scale=(4.9, 5.1, 5.2), bias=(-2.4, -2.3, 0.1)),
    Gauss(1.7, seed=0),
    Grid(0.1, seed=3, law="laplace"),
    Grid(0.5, seed=3, law="uniform"),
)


@runs
@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_the_bits_are_those_of_the_specification(noise):
    for kinds in (np.uint8, np.int32) if isinstance(noise, Grid) else (None,):
        x = images(noise, kinds)
        found, wanted = drawn(noise, x, ROWS), expected(noise, x, ROWS)
        assert np.array_equal(found.numpy(), wanted, equal_nan=True)
    narrow = drawn(noise, x, ROWS[:2], bfloat16=True)
    assert np.array_equal(narrow.view(torch.int16).numpy().view(np.uint16), spec.bfloat16_bits(wanted[:2]))
    assert torch.equal(narrow, found[:2].bfloat16())
    assert np.array_equal(drawn(noise, x, ROWS[3:]), wanted[3:])  # a part of the batch, alone


@runs
def test_block_sizes_do_not_matter():
    from certify.smoothing.noise.triton_kernels import launch_noise

    for noise in NOISES[:2]:
        x = images(noise)
        out = torch.empty(2, ELEMENTS, device=DEVICE)
        launch_noise(noise, torch.from_numpy(x.reshape(3, -1)).to(DEVICE), torch.from_numpy(ROWS[:2]).to(DEVICE), out, groups=8)
        assert np.array_equal(out.cpu().numpy().reshape(-1, 5, 7, 3), expected(noise, x, ROWS[:2]))


@runs
def test_where_the_upper_words_do_not_decide(monkeypatch):
    """Every bucket is made one that leaves all to the 64-bit comparisons, from a magnitude of 0 where the bucket has several thresholds."""
    noise = Grid(0.02, seed=5)  # few thresholds: the climb from 0 is short
    t = noise.tables
    blunt = tables.Tables(t.thresholds, t.total_variation, t.shift, t.offset, np.full_like(t.lookup, -2 & 0xFFFFFFFF), t.high, t.low)
    monkeypatch.setattr(spec, "tables", lambda *_: blunt)
    x = images(noise)
    assert np.array_equal(drawn(noise, x, ROWS[:2]).numpy(), expected(noise, x, ROWS[:2]))


@runs
def test_at_numbers_that_are_thresholds(monkeypatch):
    """Thresholds are what was drawn, and one above: equal in all 64 bits, which chance never shows."""
    high, low = (spec.words(6, ROWS[:1], ELEMENTS, tag)[0].astype(object) for tag in (False, True))
    numbers = [min(u, 2**64 - 1 - u) for u in high * 2**32 + low]
    for sigma, thresholds in ((0.25, {*numbers[::2], *(v + 1 for v in numbers[1::2])}), (0.26, {numbers[0] + 1})):
        noise = Grid(sigma, seed=6)
        x, ties = images(noise), tables.arrange(tuple(sorted(thresholds, reverse=True)), 0.0)
        monkeypatch.setattr(spec, "tables", lambda *_, ties=ties: ties)
        assert np.array_equal(drawn(noise, x, ROWS[:1]).numpy(), expected(noise, x, ROWS[:1]))


@runs
def test_a_slot_out_of_range_is_poison():
    rows = row_table([3, -1, 0], 1, [0, 1, 2])
    assert torch.isnan(drawn(Grid(0.5), images(Grid(0.5)), rows)).flatten(1).all(1).tolist() == [True, True, False]


@runs
@pytest.mark.parametrize(("dtype", "margin", "classes"), [(torch.float32, 0.0, 10), (torch.float32, 0.25, 3), (torch.bfloat16, 0.0, 16)])
def test_counts_are_those_of_the_reference(dtype, margin, classes):
    from certify.smoothing.noise.triton_kernels import launch_stats

    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(37, classes, generator=generator) * 3).to(dtype)
    logits[5, 2], logits[6, 1], logits[7, 0], logits[9] = torch.nan, torch.inf, -torch.inf, 0.0
    logits[8, 1] = logits[8, 2] = 40.0
    logits[10, 0] = logits[10, 1:].max() + 0.25
    rows = row_table(np.arange(37) % 4 - 1, 0, 0)
    wanted = [torch.zeros(3, n, dtype=torch.int64) for n in (classes + 1, classes, classes)]
    count_rows(logits, torch.from_numpy(rows), wanted[0], margin=margin, sums=wanted[1], squares=wanted[2], temperature=0.7)
    assert wanted[0].sum() == (rows[:, 0] >= 0).sum()
    assert wanted[0][:, -1].sum() >= 3
    for block in (8, 64):
        found = [torch.zeros_like(part, device=DEVICE) for part in wanted]
        launch_stats(logits.to(DEVICE), torch.from_numpy(rows).to(DEVICE), found[0], margin, found[1], found[2], 0.7, block)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@aot
def test_in_the_interpreter():
    """In a process of its own: the interpreter is chosen before triton is imported, and for all kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__]  # numbers that wrap around
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(".......")


COMPILE = r"""
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from certify.smoothing.noise import triton_kernels as kernels

tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"

def facts(kernel, types, constants, aligned=()):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*") or name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.OPTIONS)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "inexact": sorted(set(re.findall(r"\b(?:fma|mad)\.r\w\S*|\w+(?:\.\w+)*\.(?:ftz|approx)\S*|\b(?:add|sub|mul|div|sqrt)(?!\.rn)\S*\.f32", ptx))),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stores": sorted(set(re.findall(r"st\.global\S*", ptx))),
    }

noise = {"images_ptr": "*i32", "rows_ptr": "*i64", "out_ptr": "*fp32", "images": "i32", "elements": "i32", "seed_ptr": "*i64", "scale_ptr": "*fp32",
         "bias_ptr": "*fp32", "sigma": "fp32", "lookup_ptr": "*i64", "high_ptr": "*i32", "low_ptr": "*i32"}
grid = {"SHIFT": 16, "OFFSET": 16256, "CHANNELS": 3, "GROUPS": kernels.GROUPS}
gauss = {**grid, "SHIFT": 0, "OFFSET": 0}
stats = {"logits_ptr": "*fp32", "rows_ptr": "*i64", "counts_ptr": "*i64", "sums_ptr": "*i64", "squares_ptr": "*i64", "rows": "i32", "classes": "i32",
         "slots": "i32", "stride": "i32", "margin": "fp32", "temperature": "fp32"}
found = {}
for out in ("fp32", "bf16"):
    found["grid " + out] = facts(kernels.noise_rows, {**noise, "out_ptr": "*" + out}, grid, {"elements"})
    found["gauss " + out] = facts(kernels.noise_rows, {**noise, "images_ptr": "*fp32", "out_ptr": "*" + out}, gauss, {"elements"})
found["stats"] = facts(kernels.stats_rows, stats, {"MARGIN": True, "SOFT": True, "ROWS": 64, "CLASSES": 16, "UNIT": kernels.UNIT})
print(json.dumps(found))
"""


@aot
def test_the_kernels_compile_for_hopper_without_a_gpu():
    """No multiplication is fused with an addition, nothing is approximated or flushed to zero, nothing spills, and stores are of 16 bytes."""
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name, facts in found.items():
        assert facts["inexact"] == [], name
        assert facts["stack"] == 0, name
    for name in ("grid fp32", "grid bf16", "gauss fp32", "gauss bf16"):
        assert found[name]["stores"] == ["st.global.v4.b32"], found[name]
    assert counts.UNIT == 1 << 20
