"""Pictures of plans: what they say is in the records, and both formats are written."""

import json

import pytest
from PIL import Image

from kimi_jax.cli import main
from kimi_jax.plan import plot

COMMON = ["plan", "--model", "linear-48b", "--no-compile", "--json"]


def test_pictures_of_several_slices_and_of_one(capsys, tmp_path):
    # Given a slice that is too small, and one that is not
    several, one = tmp_path / "several.svg", tmp_path / "one.png"
    assert main([*COMMON, "--topology", "v5e:2x2", "--topology", "h200:1", "--plot", str(several)]) == 0
    records = json.loads(capsys.readouterr().out)

    # Then what it needs is said, the numbers of the other, and where they come from
    text = several.read_text()
    needed, planned = records
    assert needed["short"] in text and plot.REFUSED in text
    share = 100 * planned["memory"]["experts"] / planned["memory"]["available"]
    assert f">{share:.0f}</text>" in text and ">h200:1</text>" in text and ">tokens/s at most</text>" in text
    assert "by arithmetic, neither compiled nor run" in text and f"jax {planned['versions']['jax']}" in text

    # and one slice has a picture of its own
    assert main([*COMMON, "--topology", "h100:1", "--experts", "int4", "--plot", str(one)]) == 0
    with Image.open(one) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_the_line_of_the_best_slices():
    points = [("a", 4, 10.0), ("b", 8, 9.0), ("c", 8, 30.0), ("d", 16, 31.0), ("e", 4, 2.0)]
    records = [{"topology": name, "chips": chips, "tokens_per_second": rate} for name, chips, rate in points]
    assert [record["topology"] for record in plot.pareto(records)] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--plot", "plan.gif"], "--plot 'plan.gif' ends in 'gif', expected .png or .svg"),
        (["--plot", "plan.png", "--train"], "--train goes without --plot"),
    ],
)
def test_pictures_that_are_refused(more, reason, capsys):
    assert main([*COMMON, "--topology", "h200:1", *more]) == 1
    out, err = capsys.readouterr()
    assert out == "" and reason in err
