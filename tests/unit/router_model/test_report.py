"""The report for a person: words and pictures that say what the numbers say."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from router_model.alpha_curve import ALPHAS
from router_model.curve_plots import alpha_labels
from router_model.errors import RouterError
from router_model.evaluation import evaluate
from router_model.evaluation_set import held_out
from router_model.learning_curve import PowerLaw
from router_model.picture import tick_name
from router_model.plots import write_plots
from router_model.report import report_markdown, summary_lines
from tests.unit.router_model.doubles import FakeOutlook, fake_output, planned_manifest
from tests.unit.router_model.worlds import TEACHERS, make_table, summary


def full_report(*, helps: bool = True, curves: bool = True) -> dict[str, Any]:
    """A router that sees the rewards through noise, on 120 prompts and 5 teachers."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(120, 5))
    learnability = -1.5 - 0.4 * quality + 0.5 * rng.normal(size=quality.shape)
    manifest = planned_manifest(
        [
            summary(name, float(mean), reward=0.5)
            for name, mean in zip(TEACHERS, quality.mean(axis=0), strict=True)
        ]
    )
    law = PowerLaw(0.1, 2.0, 0.5)
    rows = [
        {"n_prompts": n, "regret": law.at(n), "regret_se": 0.01, "best_single_regret": 0.28}
        for n in (50, 100, 200, 400)
    ]
    if curves:
        manifest = dataclasses.replace(manifest, facts={"label_curve": rows})
    table = make_table(quality, learnability)
    noise = 0.4 * rng.normal(size=quality.shape)
    seen = {alpha: table.rewards(alpha, manifest.normalization) + noise for alpha in (0.4, *ALPHAS)}
    others = {alpha: FakeOutlook(seen[alpha], helps=alpha < 0.85) for alpha in ALPHAS} if curves else {}
    output = fake_output(seen[0.4], others=others, helps=helps, conformal_width=1.0, coverage=0.9)
    baselines = {"knn": seen[0.4] + rng.normal(size=quality.shape), "paper_bt": noise}
    return evaluate(output, held_out(table, manifest), manifest, baselines=baselines)


def test_the_report_is_written_for_a_person() -> None:
    """The verdict stands on top, and every method has its row with its numbers."""
    report = full_report()
    lines = report_markdown(report).splitlines()
    assert lines[2] == "**Routing helps.**"
    assert len(report["methods"]) == 9  # without family_strong: no family is known
    for facts in report["methods"].values():
        duel = facts["versus_best_single"]
        cells = f"| {duel['win']:.0%} / {duel['tie']:.0%} / {duel['loss']:.0%} |"
        assert any(f"| {facts['mean_reward']:.3f} |" in line and cells in line for line in lines)
    text = "\n".join(lines)
    assert report["label_advice"]["text"].startswith("More labels would pay")
    assert report["label_advice"]["text"] in text
    assert "holds one for" in text
    assert "falls back to the best single teacher at alpha = 0.9, 1." in text
    assert "verdict: routing helps" in summary_lines(report)[0]
    assert any(report["label_advice"]["text"] in line for line in summary_lines(report))


def test_a_router_that_has_fallen_back_says_so_below_the_verdict() -> None:
    """Once in the report and once on the terminal; otherwise not a word of it."""
    report = full_report(helps=False)
    text = report_markdown(report)
    assert text.splitlines()[2] == "**Routing does not help here: use best_single.**"
    assert text.splitlines()[4] == (
        "The router has fallen back to the best single teacher: 1 training prompts cannot show a "
        "gain, 10 are needed."
    )
    for point in report["curves"]["alpha"]:
        point["helps"] = False
    assert "falls back to the best single teacher at every alpha." in report_markdown(report)
    assert text.lower().count("the router has fallen back") == 1
    assert "fallen back" in summary_lines(report)[1]
    assert "has fallen back" not in report_markdown(full_report())


def test_who_answers_names_those_who_do() -> None:
    """Five by name, the rest and the silent ones by their number; and which teacher is the best single."""
    report = full_report()
    shares = {"alpaca": 0.3, "bison": 0.0, "camel": 0.25, "dingo": 0.2, "eland": 0.1}
    more = {"fox": 0.08, "gnu": 0.04, "hare": 0.03, "ibex": 0.0}
    report["methods"]["persyn"]["share"] = shares | more
    listed = "alpaca 30%, camel 25%, dingo 20%, eland 10%, fox 8%, 2 others together 7%, 2 never asked."
    assert listed in report_markdown(report).splitlines()
    report["methods"]["best_single"]["share"] = {"alpaca": 0.1, "camel": 0.9}
    assert "The best single teacher, chosen on the training prompts, is `camel`." in report_markdown(report)
    assert "best single teacher: camel" in summary_lines(report)


def test_all_pictures_that_the_report_names_are_drawn(tmp_path: Path) -> None:
    """Six with both curves; four without, and a picture of an earlier report does not stay behind."""
    for curves, n_pictures in ((True, 6), (False, 4)):
        report = full_report(curves=curves)
        paths = write_plots(report, tmp_path)
        text = report_markdown(report)
        assert len(paths) == n_pictures
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
        assert text.count("![") == n_pictures
        for path in paths:
            assert f"({path.name})" in text
            picture = imread(path)
            assert min(picture.shape[:2]) > 300
            assert picture[..., :3].std() > 0.05  # something is drawn


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Each is drawn whole or not at all: the error names the picture, and no draft stays behind."""
    report = full_report(curves=False)
    (tmp_path / "shares.png").mkdir()
    with pytest.raises(RouterError, match=r"shares\.png: cannot be written"):
        write_plots(report, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["methods.png", "shares.png", "win_tie_loss.png"]
    with pytest.raises(RouterError, match=r"methods\.png: cannot be written"):
        write_plots(report, tmp_path / "absent")
    (tmp_path / "alpha.png").mkdir()
    with pytest.raises(RouterError, match=r"alpha\.png: cannot be removed"):
        write_plots(report, tmp_path)


@pytest.mark.parametrize("length", [30, 36, 37, 60, 72, 73, 200])
@pytest.mark.parametrize("separator", ["-", "x"])
def test_long_names_fit_and_keep_both_ends(length: int, separator: str) -> None:
    """Two lines of at most 36 letters; vendors differ at the start, models of one family at the end."""
    name = f"vendor/{separator.join(f'{n:04}' for n in range(60))}"[: length - 3] + "-v2"
    lines = tick_name(name).split("\n")
    assert len(lines) == (1 if length <= 36 else 2)
    assert all(0 < len(line) <= 36 for line in lines)
    assert lines[0].startswith("vendor/0000")
    assert "".join(lines).endswith("-v2")
    assert ("".join(lines) == name) == (length <= 72)


def test_points_of_the_trade_off_that_coincide_share_a_label() -> None:
    """Two at one place and one far off: two labels."""
    places = ((0.0, 0.9, -1.0), (0.1, 0.9, -1.0), (0.2, 0.5, -0.5))
    curve = [{"alpha": a, "mean_quality": q, "mean_learnability": m} for a, q, m in places]
    assert alpha_labels(curve) == [("0 to 0.1", 0.9, -1.0), ("0.2", 0.5, -0.5)]
