"""What `python -m benchmarks gpu` does where there is no GPU, and that its check notices what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jaxce
from benchmarks import gpu, gpu_check, hlo

PROGRAM = """
%body_of_fusion (p0: f32[100,8], p1: s32[]) -> f32[10,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[10,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={10,8}
}

%update (q0: bf16[100,8], q1: f32[10,8], q2: s32[]) -> bf16[100,8] {
  %q0 = bf16[100,8]{1,0} parameter(0)
  %q1 = f32[10,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %narrow = bf16[10,8]{1,0} convert(%q1)
  ROOT %put = bf16[100,8]{1,0} dynamic-update-slice(%q0, %narrow, %q2, %none)
}

%body (state: (s32[], f32[100,8], bf16[100,8])) -> (s32[], f32[100,8], bf16[100,8]) {
  %state = (s32[], f32[100,8]{1,0}, bf16[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %y = bf16[100,8]{1,0} get-tuple-element(%state), index=2
  %slice = f32[10,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%body_of_fusion
  %written = bf16[100,8]{1,0} fusion(%y, %slice, %i), kind=kLoop, calls=%update
  ROOT %next = (s32[], f32[100,8]{1,0}, bf16[100,8]{1,0}) tuple(%i, %x, %written)
}

%condition (s: (s32[], f32[100,8], bf16[100,8])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[100,8]) -> bf16[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %room = bf16[100,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %all = (s32[], f32[100,8]{1,0}, bf16[100,8]{1,0}) tuple(%start, %a, %room)
  %loop = (s32[], f32[100,8]{1,0}, bf16[100,8]{1,0}) while(%all), condition=%condition, body=%body, backend_config=_
  ROOT %result = bf16[100,8]{1,0} get-tuple-element(%loop), index=2
}
""".replace("config=_", 'config={"known_trip_count":{"n":"10"}}')


def test_kernels_read_and_write_slices_of_large_arrays():
    index, part = 4, 10 * 8
    assert hlo.kernels(PROGRAM) == {
        "launches": 2 * 10,
        "bytes": 10 * ((4 * part + index + 4 * part) + (4 * part + index + 2 * part)),
    }


def test_without_a_card_it_ends_with_a_sentence():
    for option in [], ["--check"]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "gpu", *option],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (done.returncode, done.stderr.strip()) == (1, gpu.NO_CARD)


BROKEN = {
    "loss": (
        "softmax_cross_entropy",
        lambda loss: lambda *a, **k: loss(*a, **k) * 1.00001,
        "dense float32 fresh, loss",
    ),
    "NaN": (
        "softmax_cross_entropy",
        lambda loss: lambda z, y, ignore_index=None: loss(z, y * 0, ignore_index=ignore_index),
        "a label that is no class",
    ),
    "kernel": (
        "linear_cross_entropy",
        lambda loss: lambda h, k, y, **o: loss(h, 1.05 * k, y, **o),
        "linear bfloat16 store None, gradient in kernel",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_the_check_notices(fault, monkeypatch, capsys):
    name, broken, expected = BROKEN[fault]
    monkeypatch.setattr(jaxce, name, broken(getattr(jaxce, name)))
    with pytest.raises(SystemExit, match="1"):
        gpu_check.run()
    assert f"WRONG {expected}" in capsys.readouterr().out
