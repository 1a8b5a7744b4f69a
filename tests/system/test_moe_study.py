"""The study of experts' balance: it runs, measures what it says, and what is in the tree comes from its results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.system.environment import ROOT

pytest.importorskip("matplotlib")
ARMS = ["unbalanced", "losses", "bias", "dense (active)", "dense (total)"]


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import moe_report
        import moe_study

        yield moe_study, moe_report
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def quick(modules: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    modules[0].main(["--quick", "--output", str(folder)])
    return folder


def assert_whole(report: Any, folder: Path) -> None:
    """Every arm, step, window and layer, and figures and text that belong to them."""
    results = report.Results(folder)
    setting = results.setting
    assert list(results.arms) == ARMS
    experts = [f"load_{expert}" for expert in range(setting["experts"])]
    windows = setting["steps"] // setting["window"]
    assert len(results.windows) == 3 * windows * setting["layers"]
    for row in results.windows:
        assert sum(row[name] for name in experts) == pytest.approx(1, abs=1e-3)
        assert 1 <= row["effective_experts"] <= setting["experts"] + 1e-3
        assert row["max_vio"] == pytest.approx(max(row[name] for name in experts) * setting["experts"] - 1, abs=1e-3)
    assert len(results.steps) == 5 * setting["steps"]
    for name in ARMS:
        assert 0 < results.arms[name]["validation"] < 6
        assert results.losses(name)[-1] < results.losses(name)[0]
        assert results.rate(name) > 0
    for name in report.FIGURES:
        text = (folder / f"moe_study_{name}.svg").read_text()
        assert text.rstrip().endswith("</svg>")
        assert len(text) < 200_000
    assert (folder / "moe_study.md").read_text() == report.document(results)


def test_a_quick_run(quick: Path, modules: Any) -> None:
    assert_whole(modules[1], quick)


def test_the_results_in_the_tree(modules: Any) -> None:
    """Of the setting that the study has now, and the notebook with what they say."""
    study, report = modules
    for folder, renormalize in ((report.RESULTS, False), (report.RENORMALIZED, True)):
        assert_whole(report, folder)
        setting = replace(study.Setting(), renormalize=renormalize)
        assert report.Results(folder).setting == json.loads(json.dumps(asdict(setting)))
    results = report.Results()
    assert report.NOTEBOOK.read_text() == report.notebook(results)


def test_models_are_of_equal_parameters_or_flops(modules: Any) -> None:
    results = modules[1].Results()
    routers = results.setting["layers"] * results.setting["experts"] * results.setting["hidden"]
    sparse, active, total = (results.arms[name] for name in ("unbalanced", "dense (active)", "dense (total)"))
    assert sparse["parameters"] == total["parameters"] + routers
    assert sparse["active_parameters"] == active["parameters"] + routers
    assert {results.arms[name]["parameters"] for name in ARMS[:3]} == {sparse["parameters"]}


def test_arms_differ_in_balancing_alone(modules: Any) -> None:
    study = modules[0]
    setting = replace(study.QUICK, steps=4)
    runs = study.study(setting)
    unbalanced, losses, bias = runs[:3]
    assert unbalanced.losses[0] == losses.losses[0] == bias.losses[0]
    assert len({run.losses[-1] for run in (unbalanced, losses, bias)}) == 3
    for router in bias.routers:
        assert 0 < router.balance_bias.abs().max() <= setting.steps * setting.bias_rate + 1e-6
    assert all(router.balance_bias is None for run in (unbalanced, losses) for router in run.routers)
    again = study.study(setting)
    assert [run.losses for run in again] == [run.losses for run in runs]
