"""Kernels compiled for AVX2 and for AVX-512 on one machine: integers give equal bits, floats are near."""

from __future__ import annotations

import os
import platform
import subprocess

import pytest
import torch
from torch import Tensor

from node.model.weights.panels import bfloat16_panels
from tests import kernel_answers
from tests.kernel_answers import LANES
from tests.processes import ROOT, python

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c"}
SECONDS = 180.0  # compiles once for each state of the sources, on a busy machine
NEAR = 2e-6  # of the largest number: sums of another number of lanes, in float32
ROUNDED = (
    1e-2  # where a CPU multiplies bfloat16, queries, weights of the softmax and rows of prompts are rounded
)

Forms = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Forms:
    """The answers of this machine's kernels, and those of AVX2's."""
    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    own = kernel_answers.answers()
    if own[LANES] != 16:
        pytest.skip("this CPU has no AVX-512: its kernels are those of AVX2")
    file = tmp_path_factory.mktemp("forms") / "avx2.pt"
    kept = {"NUMBA_CACHE_DIR": str(pytestconfig.cache.mkdir("kernels-haswell"))}
    subprocess.run(
        python("tests.kernel_answers", str(file)), cwd=ROOT, env={**os.environ, **AVX2, **kept},
        check=True, timeout=SECONDS,
    )  # fmt: skip
    other = torch.load(file, weights_only=True)
    assert other.pop(LANES) == 8
    del own[LANES]
    return own, other


def test_sums_of_integers_have_the_same_bits_on_every_cpu(forms: Forms):
    own, other = forms
    names = [name for name in own if name.startswith("int8")]
    assert names
    assert [name for name in names if not torch.equal(own[name], other[name])] == []


def test_sums_of_floats_differ_by_their_order_alone(forms: Forms):
    own, other = forms
    assert own.keys() == other.keys()
    errors = {name: (own[name] - other[name]).abs().max() / own[name].abs().max() for name in own}
    assert {name: error for name, error in errors.items() if not error < bound(name)} == {}


def bound(name: str) -> float:
    return ROUNDED if name.startswith("attention bfloat16") or is_rounded(name) else NEAR


def is_rounded(name: str) -> bool:
    """Whether this machine's kernel rounds the rows for this product."""
    return name.startswith("bfloat16") and name.endswith("panels") and bfloat16_panels.IS_USABLE


def test_in_each_form_a_row_has_the_same_bits_alone_in_a_batch_and_over_panels(forms: Forms):
    for found in forms:
        whole = {name.partition(",")[0]: each for name, each in found.items() if name.endswith("40 rows")}
        assert len(whole) == 2 * len(kernel_answers.SHAPES)
        for name, each in found.items():
            rows = whole.get(name.partition(",")[0])
            if rows is not None and not (found is forms[0] and is_rounded(name)):
                assert torch.equal(each, rows[: len(each)]), name
        for kind in ("float32", "bfloat16"):
            last, alone = found[f"attention {kind}, prefill"][-1:], found[f"attention {kind}, decode"]
            assert (last - alone).abs().max() < bound(f"attention {kind}, prefill") * alone.abs().max()
