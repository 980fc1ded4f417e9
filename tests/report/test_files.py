"""The report in the output: its data, and the page as a real browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml

import fxq
from fxq.numbers.formats import NVFP4
from fxq.numbers.nvfp4 import quantize_measured
from fxq.numbers.quality import MOST_STEPS, STEPS, Quality, qualities
from fxq.passes import PASSES
from fxq.pipeline import spec
from fxq.report.files import DIRECTORY, WORST, Details, content, write
from fxq.report.summary import Report
from tests import reader
from tests.browser import probe
from tests.families import EXPERTS, Zoo, zoo

__all__ = ["zoo"]

SPEC = "nvfp4_default_mse-fp8_cast_kv"


@pytest.fixture(scope="module")
def made(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled Qwen3-MoE, calibrated with one token so that most experts are dead."""
    out = tmp_path_factory.mktemp("report") / "out"
    fxq.compile(zoo("qwen3_moe"), SPEC, calib=[[5]], out=out)
    return out


@pytest.fixture(scope="module")
def data(made: Path) -> dict[str, Any]:
    return dict(json.loads((made / DIRECTORY / "report.json").read_text()))


def test_every_quantized_weight_has_its_error(data: dict[str, Any], made: Path, zoo: Zoo) -> None:
    by_name = {weight["name"]: weight for weight in data["weights"]}
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"):
        expected = reader.sqnr_db(made, zoo("qwen3_moe"), name)
        assert by_name[f"{name}.weight"]["sqnr_db"] == [pytest.approx(expected, abs=0.01)]
    down = by_name["model.layers.1.mlp.experts.down_proj"]
    assert (down["layer"], down["projection"]) == (1, "mlp.experts.down_proj")
    expected = reader.sqnr_db(made, zoo("qwen3_moe"), "layers.1.mlp.experts.3.down_proj")
    assert down["sqnr_db"][3] == pytest.approx(expected, abs=0.01)
    assert len(by_name) == 2 * (4 + 2)


def test_tokens_and_dead_experts_are_those_of_calibration(data: dict[str, Any]) -> None:
    assert [layer["layer"] for layer in data["tokens"]] == [0, 1]
    assert all(sum(layer["tokens"]) == 2 and len(layer["tokens"]) == EXPERTS for layer in data["tokens"])
    assert data["summary"]["dead_experts"] == 2 * (EXPERTS - 2)


def test_groups_exclusions_and_sizes_are_there(data: dict[str, Any], made: Path) -> None:
    assert {g["linears"]: g["count"] for g in data["groups"]} == {
        "model.layers.*.self_attn.{q_proj,k_proj,v_proj}": 2,
        "model.layers.*.mlp.experts.*.{gate_proj,up_proj}": 2 * EXPERTS,
    }
    reasons = {e["name"]: e["reason"] for e in data["excluded"]}
    assert "router" in reasons["model.layers.*.mlp.gate"]
    assert reasons["model.embed_tokens"].startswith("an embedding")
    tensors = reader.read_checkpoint(made).tensors.values()
    assert sum(data["sizes"].values()) == sum(entry.end - entry.begin for entry in tensors)
    assert data["sizes"]["weights"] == 8 * data["sizes"]["scales"] - 8 * 4 * 2 * (2 * (4 + 3 * EXPERTS))


def test_only_what_is_measured_differs_between_runs(made: Path, zoo: Zoo, tmp_path: Path) -> None:
    fxq.compile(zoo("qwen3_moe"), SPEC, calib=[[5]], out=tmp_path / "again")
    first, second = (
        json.loads((p / DIRECTORY / "report.json").read_text()) for p in (made, tmp_path / "again")
    )
    assert first.pop("measured")["seconds"].keys() == second.pop("measured")["seconds"].keys()
    assert first == second


def test_the_amaxes_of_inputs_are_those_of_the_scales(data: dict[str, Any], made: Path) -> None:
    held = reader.read_checkpoint(made)
    names = held.quantized_linears()
    amaxes = {name: 2688 * float(held.multiplier(name, "input_scale")) for name in names}
    found = data["summary"]
    assert found["largest_input_amax"] == pytest.approx(max(amaxes.values()), rel=1e-5)
    assert found["largest_input_amax"] == pytest.approx(
        amaxes[found["largest_input"].removesuffix(".weight")]
    )
    assert found["median_input_amax"] == pytest.approx(median(amaxes.values()), rel=1e-5)


def test_a_massive_activation_is_named() -> None:
    report = Report("spec")
    report.measure_inputs({"a": 3.0, "b": 2.0, "c": 1.0})
    assert not list(report.massive())
    report.measure_inputs({"a": 3.0, "b": 2.0, "c": 3000.0})
    (warning,) = report.massive()
    assert warning.startswith("c: its input reaches 3000, 1000 times the median")
    assert "input amaxes     3 at the median, the largest 3000 (c)" in str(report)


def test_it_says_how_it_was_made(data: dict[str, Any], made: Path, zoo: Zoo, tmp_path: Path) -> None:
    how = data["made"]
    assert how["model"] == str(zoo("qwen3_moe").resolve())
    assert how["versions"]["torch"] == torch.__version__
    assert how["calibration"] | {"tokens_hash": ""} == {
        "from": "list in memory",
        "samples": 1,
        "tokens": 1,
        "shortest": 1,
        "longest": 1,
        "tokens_hash": "",
        "seq_len": 512,
        "pack": False,
    }
    assert how["evaluation"] is None
    assert spec.load(how["spec"], PASSES).passes == spec.load(SPEC, PASSES).passes
    again = fxq.compile(how["model"], how["spec"], calib=[[5]], out=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        made / "model.safetensors"
    ).read_bytes()
    assert again.report.made["calibration"]["tokens_hash"] == how["calibration"]["tokens_hash"]


def test_a_model_of_the_hub_is_named_as_there(zoo: Zoo, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--some-model" / "snapshots" / "abc"
    shutil.copytree(zoo("llama"), snapshot)
    fxq.compile(snapshot, "nvfp4_weight_only", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "owner/some-model"
    assert "An NVFP4 checkpoint of `owner/some-model`" in card
    assert str(tmp_path) not in card
    assert "bits per quantized weight | 4." in card


def test_a_card_that_exists_stays(zoo: Zoo, tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    (source / "README.md").write_text("# mine")
    fxq.compile(source, "nvfp4_weight_only", out=tmp_path / "out", evaluate=[[3, 4, 5]])
    assert (tmp_path / "out" / "README.md").read_text() == "# mine"


@pytest.mark.parametrize(
    ("kl", "passes", "inputs", "words"),
    [
        (0.001, ["gptq"], 0, "small: predictions are nearly the source's"),
        (0.05, ["lower"], 4, "moderate: try a gptq spec.*; or one that quantizes less"),
        (0.5, [{"gptq": {"order": "act"}}], 4, "large: try one that quantizes less"),
        (0.5, ["gptq"], 0, "large: try `skip`"),
    ],
)
def test_the_verdict_names_what_helps(kl: float, passes: list[Any], inputs: int, words: str) -> None:
    report = Report("spec", input_nodes=inputs, kl_divergence=kl, top1_agreement=0.9)
    report.made = {"spec": {"passes": passes}}
    assert re.match(words, str(report.verdict))
    assert f"verdict          {report.verdict}" in str(report)


def test_no_measurement_no_verdict() -> None:
    assert Report("spec").verdict is None


def test_a_live_model_is_named_by_its_class(zoo: Zoo, tmp_path: Path) -> None:
    report = Report("spec")
    assert content(report, Details("LlamaForCausalLM"))["title"] == "LlamaForCausalLM"


def test_plain_maxima_are_no_steps_away_and_searched_ones_are_the_search_s() -> None:
    w = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    amax = w.abs().amax((1, 2)).float()
    plain, searched = (qualities(w, quantize_measured(w, amax, scale), NVFP4) for scale in ("max", "mse"))
    for m in plain:
        assert sum(m.steps) == m.steps[MOST_STEPS] == 40 * 4
    for m, was in zip(searched, plain, strict=True):
        assert sum(m.steps) == 40 * 4
        assert m.error < was.error
        assert 0 < m.steps[MOST_STEPS] < 40 * 4


def test_crest_and_spread_are_those_of_the_blocks() -> None:
    w = torch.ones(1, 2, 32)
    w[0, 0, 0] = 8.0
    (m,) = qualities(w, quantize_measured(w, torch.tensor([8.0]), "max"), NVFP4)
    rms = math.sqrt((64 + 15) / 16)
    assert m.crest == pytest.approx((8 / rms + 3) / 4, rel=1e-5)
    assert m.spread == pytest.approx(8.0, rel=1e-5)


def test_zero_weights_count_nowhere() -> None:
    w = torch.zeros(1, 16, 32)
    (m,) = qualities(w, quantize_measured(w, torch.tensor([0.0]), "mse"), NVFP4)
    assert (sum(m.steps), m.crest, m.spread, m.sqnr_db) == (0, 0.0, 0.0, None)


def test_the_worst_come_first_and_say_what_distinguishes_them() -> None:
    good = Quality(1.0, 100.0, 2.0, 5.0, (0,) * len(STEPS))
    weights: dict[tuple[str, int | None], Quality] = {("m.0.experts.up", e): good for e in range(20)}
    weights["m.0.experts.up", 7] = good._replace(error=4.0, spread=50.0)
    weights["m.0.experts.up", 9] = good._replace(error=3.0, crest=3.5)
    weights["m.0.experts.up", 2] = good._replace(error=2.0)
    tokens = {"m.0.experts.up": torch.tensor([5] * 9 + [0] * 11)}
    worst = content(Report("spec"), Details("model", weights, tokens))["worst"]
    assert [w["expert"] for w in worst[:3]] == [7, 9, 2]
    assert len(worst) == WORST
    assert "50 times the median block's (its fellows' 5)" in worst[0]["reason"]
    assert "outliers inside blocks" in worst[1]["reason"]
    assert "no token reached it" in worst[1]["reason"]
    assert worst[2]["reason"].startswith("no outlier")


def test_exact_weights_have_no_sqnr_and_the_page_is_valid_json_all_the_same() -> None:
    weights: dict[tuple[str, int | None], Quality] = {("w", None): Quality(0.0, 1.0)}
    report = Report("spec", sqnr_db=math.inf, worst_sqnr_db=math.inf)
    made = json.dumps(content(report, Details("model", weights)), allow_nan=False)
    assert json.loads(made)["weights"][0]["sqnr_db"] == [None]


# The page.

_DRAWN = """
const inks = [...document.querySelectorAll(".map canvas")].map((canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i + 3]) seen.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
  return seen.size;
});
"""


def test_the_page_shows_the_report(made: Path, data: dict[str, Any], tmp_path: Path) -> None:
    found = probe(
        made / DIRECTORY / "report.html",
        _DRAWN
        + """
const canvas = document.querySelectorAll(".map canvas")[2], box = canvas.getBoundingClientRect();
const at = { clientX: box.left + box.width / 2, clientY: box.top + 30 };
canvas.dispatchEvent(new PointerEvent("pointermove", at));
return {
  inks, tip: document.getElementById("tip").textContent,
  sections: [...document.querySelectorAll("h2")].map((h) => h.textContent),
  tiles: [...document.querySelectorAll(".tile")].map((t) => t.textContent),
  wide: document.documentElement.scrollWidth - innerWidth,
};""",
        tmp_path,
    )
    assert len(found["inks"]) == 3
    assert all(colours > 10 for colours in found["inks"]), found["inks"]
    assert re.match(r"model\.layers\.0\.mlp\.experts, expert \d: (no token|1 token|2 tokens)", found["tip"])
    assert "How close the weights are" in found["sections"]
    assert "Left as they are" in found["sections"]
    assert any(str(data["summary"]["dead_experts"]) in tile for tile in found["tiles"])
    assert found["wide"] <= 0


def large() -> tuple[Report, Details]:
    """What a model of 61 layers and 384 experts would report."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[tuple[str, int | None], Quality] = {}
    tokens = {}
    for layer in range(61):
        name = f"model.layers.{layer}"
        weights[f"{name}.self_attn.o_proj.weight", None] = Quality(1.0, 130.0, 2.1, 5.0, (3,) * len(STEPS))
        for projection in ("gate_up_proj", "down_proj"):
            energies = 130 + torch.rand(384, generator=generator)
            for expert, energy in enumerate(energies.tolist()):
                weights[f"{name}.mlp.experts.{projection}", expert] = Quality(1.0, energy, 2.1, 5.0)
        tokens[f"{name}.mlp.experts.down_proj"] = torch.randint(0, 900, (384,), generator=generator)
    return Report("nvfp4_default_mse", experts=61 * 384, dead_experts=9), Details("large", weights, tokens)


@pytest.mark.parametrize("width", [1100, 400])
def test_61_layers_of_384_experts_fit_a_screen_and_a_phone(width: int, tmp_path: Path) -> None:
    report, details = large()
    write(report, details, tmp_path)
    page = tmp_path / DIRECTORY / "report.html"
    assert page.stat().st_size < 2_000_000
    found = probe(
        page,
        _DRAWN
        + """
document.querySelectorAll(".pick button")[1].click();
return {
  inks, wide: document.documentElement.scrollWidth - innerWidth,
  pressed: document.querySelector('.pick [aria-pressed="true"]').textContent,
  tall: Math.max(...[...document.querySelectorAll(".map")].map((m) => m.clientHeight)),
};""",
        tmp_path,
        width=max(width, 500),  # Chromium's windows are no narrower
    )
    assert all(colours > 10 for colours in found["inks"]), found["inks"]
    assert found["pressed"] == "mlp.experts.gate_up_proj"
    assert found["wide"] <= 0
    assert found["tall"] < 700


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    name = '</script><script>document.title="broken"</script><!--'
    weights: dict[tuple[str, int | None], Quality] = {(name, None): Quality(1.0, 100.0)}
    write(Report("<b>", warnings=[name]), Details(name, weights), tmp_path)
    page = tmp_path / DIRECTORY / "report.html"
    text = page.read_text()
    assert text.count("</script>") == 2
    found = probe(page, "return [document.querySelector('h1').textContent, document.title];", tmp_path)
    assert found[0] == name
    assert found[1] != "broken"


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    write(Report("spec"), Details("model"), tmp_path)
    text = (tmp_path / DIRECTORY / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest", text)


def test_engines_do_not_see_the_report(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert {"report.json", "report.html"}.isdisjoint(names)
    assert not [p for p in (made / DIRECTORY).iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".py")]
