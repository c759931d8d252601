"""Reading libtpu's dump: loops, and the bundles in each."""

import pytest
from tpu.schedule import read_kernel

BUNDLES = """\
LB: loop body
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sld [smem:[#a]] } /* Start region 1
second line of a comment */ }
   0x2 PF: > { %s2 = smov 0 }
   0x3   :  {}
   0x4 LB: > > { %v1 = vadd.f32 %v0, %v0 }
   0x5   : > > { %v2 = vadd.f32 %v1, %v0 }
   0x6   : > { %v3 = vld [vmem:[#spill]] }
   0x7 LB: > > { %v4 = vadd.f32 %v0, %v0 }
   0x8   : > { %s3 = smov 0 }
   0x9   :  { %s4 = smov 0 }
"""
UTILIZATION = """\
== CAPACITY:
VALU, VLOAD:FILL
    4     3
== UTILIZATION:
0 0
0 0
0 0
0 0
4 0
2 0
0 1
4 0
0 0
0 0
"""


def test_bundles_are_counted_per_loop(tmp_path):
    (tmp_path / "1-mine.1-70-schedule-analysis_final_bundles.txt").write_text("not this")
    (tmp_path / "2-mine.1-71-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "3-mine.1-69-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "4-mine_too.1-71-final_bundles.txt").write_text("")

    loops = read_kernel(tmp_path, "mine")

    # The empty bundle, printed without its depth, belongs to the loop around its place.
    assert [(loop.depth, loop.bundles, loop.spills) for loop in loops] == [(0, 2, 0), (1, 5, 1), (2, 2, 0), (2, 1, 0)]
    assert loops[2].use == {"VALU": 0.75, "VLOAD:FILL": 0.0}


def test_a_kernel_that_is_not_in_the_dump_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"0 files of kernel 'mine' end in final_bundles\.txt"):
        read_kernel(tmp_path, "mine")
