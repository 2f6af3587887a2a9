"""The figures of a made-up plan, each computed again by hand, and advice where it does not fit."""

import json

import ml_collections
import pytest

from diffusion_jax.devices.chips import Chip
from diffusion_jax.plan import report
from diffusion_jax.plan.compiling import Plan
from diffusion_jax.plan.count import Counts
from diffusion_jax.plan.floor import Work
from diffusion_jax.plan.memory import Held
from diffusion_jax.plan.search import Found
from diffusion_jax.plan.topology import Topology

GIB = 2**30
CHIP = Chip("v0", "v0", peak_flops=100.0, hbm=16 * GIB, hbm_bandwidth=1.0, interconnect=10.0)
TPU = Topology("v5p:2x2x1", [object()] * 4, "tpu", CHIP, 16 * GIB, clock=50.0)
CPU = Topology("cpu:2", [object()] * 2, "cpu")


def plan(topology=TPU, **fields):
    whole = Counts(1000, {"all-reduce": 30, "all-gather": 40}, {"all-reduce": 2, "all-gather": 4})
    held = Held(parameters=GIB, moments=2 * GIB, ema=GIB, other=8, frozen=0, batch=1024)
    made = Plan(
        topology=topology,
        mesh={"data": 4, "fsdp": 1},
        batch_size=8,
        per_device_batch=2.0,
        remat="full",
        held=held,
        unread=1024,
        arguments=sum(held) - 1024 + 512,
        temporaries=GIB,
        code=1024,
        peak=6 * GIB,
        model_flops=3000,
        step_flops=4000,
        kernel_flops=400,
        counts=whole._replace(cycles=200),
        once=Counts(100, cycles=20),
        optimal_seconds=3.0,
        work=[
            Work("dot.1", "matrix product", 2, 60, 10, 0.6, "models/unet/unet.py:7"),
            Work("copy.2", "transpose, copy", 1, 0, 4, 4.0, ""),
        ],
        seconds={"compile": 2.0},
        host_bytes=GIB,
    )
    return made._replace(**fields)


def test_seconds_by_hand():
    found = plan()
    # 3 s with each loop once, 200 cycles in place of 20; kernels: 400 / 4 devices at 100 a second.
    assert report.in_full(3.0, found.counts, found.once) == 30.0
    assert report.estimated_seconds(found) == 31.0
    assert report.cycle_seconds(found) == 200 / 50
    assert report.peak_seconds(found) == 3000 / 4 / 100
    assert report.floor_seconds(found) == 4.6 and report.floor_seconds(plan(work=[])) is None
    assert report.link_seconds(found) == (2 * 30 + 40) / 10
    assert report.in_full(3.0, found.counts, Counts()) is None
    blind = plan(CPU)
    assert report.estimated_seconds(blind) is report.link_seconds(blind) is None


def test_the_dictionary_is_json_and_adds_up():
    found = json.loads(json.dumps(report.as_dict(plan())))
    assert found["bytes"]["padding"] == 512 and found["bytes"]["total"] == 6 * GIB + 2048
    assert found["mfu"] == pytest.approx(7.5 / 31) and found["fits"] is True
    assert found["flops"]["step"] == 1000 and found["flops"]["kernels"] == 100
    assert found["collectives"] == {
        "all-gather": {"count": 4, "bytes": 40},
        "all-reduce": {"count": 2, "bytes": 30},
    }


def test_the_text_says_it_to_a_person():
    text = report.as_text(plan())
    assert text.startswith("v5p:2x2x1: 4 devices (data 4), batch 8, 2 per device, remat full")
    assert "6.00 GiB  of 16.00 GiB (38 %): fits" in text
    assert "31 s  the compiler's, loops in full: 0.2581 samples/s, MFU 24.2 %" in text
    assert "(+10.0 % beside the count by arithmetic)" in text  # 1000 + 100 beside 1000
    assert "floor" in text and "at most 1.739 samples/s, MFU 163.0 %" in text
    assert "0.6 s  2 x dot.1 (matrix product), models/unet/unet.py:7" in text
    assert "4 s  copy.2 (transpose, copy), no line known" in text
    assert "does not fit" in report.as_text(plan(peak=17 * GIB))
    assert "time of a step" not in report.as_text(plan(CPU))


def test_a_table_has_a_line_for_each_policy():
    lines = report.table([Found("full", 2, plan()), Found(False, 0, None)]).splitlines()
    assert lines[1].split() == ["full", "2", "6.00", "GiB", "31.0000", "s", "0.2581"]
    assert lines[2].split() == ["False", "none", "fits"]


@pytest.mark.parametrize(
    ("topology", "changes", "batch", "needed", "ideas", "none"),
    [
        # 16 GiB hold 8 GiB always and 2 GiB a sample: 4 samples.
        (TPU, {}, 8, 24, ["--per_device_batch=4 (in", "remat=full", "fsdp=-1", "v5p:2x2x2"], []),
        (TPU, {"remat": "full"}, 1, 24, ["fsdp=-1"], ["remat", "batch"]),
        (TPU, {"fsdp": -1}, 8, 160, ["a smaller --per_device_batch"], ["fsdp=-1", "batch="]),
        (Topology("h100:2", [0, 0], "cpu", CHIP, 16 * GIB), {}, 1, 24, ["as h100:4"], []),
    ],
)
def test_advice_is_what_can_still_be_changed(topology, changes, batch, needed, ideas, none):
    config = ml_collections.ConfigDict({"model": {}, "mesh": {}})
    if "remat" in changes:
        config.model.remat = changes["remat"]
    if "fsdp" in changes:
        config.mesh.fsdp = changes["fsdp"]
    held = 8 * GIB if needed == 24 else 15.9 * GIB
    said = report.advice(config, topology, batch, needed * GIB, int(held))
    assert said.startswith("try ")
    assert all(idea in said for idea in ideas) and not any(idea in said for idea in none), said
