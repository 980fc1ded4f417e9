"""The graph as a page: every stage is in it, folded; a real browser searches, walks and compares it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from fxq.cli.main import main
from fxq.graph import dialect
from fxq.graph.text import dump
from fxq.view.page import Viewer
from tests.browser import probe
from tests.families import Zoo, zoo

__all__ = ["zoo"]

SPEC = "nvfp4_default-fp8_kv"


def data(page: str) -> dict[str, Any]:
    """What the page unpacks."""
    content = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert content is not None
    return dict(json.loads(gzip.decompress(base64.b64decode(json.loads(content[1])["packed"]))))


def order(stage: dict[str, Any]) -> list[int]:
    """The line numbers of a stage."""
    runs = stage["runs"]
    return [first + i for first, length in zip(runs[::2], runs[1::2], strict=True) for i in range(length)]


def leaves(shape: list[Any]) -> int:
    """How many lines a shape stands for."""
    return sum(item if isinstance(item, int) else item[0] * leaves(item[1]) for item in shape)


def experts(layers: int, count: int, *, quantized: bool) -> Graph:
    """Layers of two stacks of experts, each slice with its amax and quantize node if `quantized`."""
    graph = Graph()

    def put(kind: str, name: str, target: Any, arguments: tuple[Any, ...], *shape: int) -> Node:
        node = graph.create_node(kind, target, arguments, {}, name=name)
        node.meta["val"] = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        return node

    x = put("placeholder", "x", "x", (), 3, 64)
    for layer in range(layers):
        for part in ("gate_up", "down"):
            base = f"model_layers_{layer}_mlp_experts_{part}_proj"
            w = put("get_attr", base, f"model.layers.{layer}.mlp.experts.{part}_proj", (), count, 64, 64)
            if quantized:
                made = []
                for e in range(count):
                    part_of = put("call_function", f"{base}_e{e}", dialect.SLICE, (w, e), 64, 64)
                    amax = put("call_function", f"{base}_e{e}_amax", dialect.AMAX, (part_of,))
                    made.append(
                        put("call_function", f"{base}_e{e}_q", dialect.QUANTIZE, (part_of, amax), 64, 64)
                    )
                w = put("call_function", f"{base}_q", dialect.STACK, (made,), count, 64, 64)
            name = f"matmul_{2 * layer + (part == 'down')}"
            x = put("call_function", name, torch.ops.aten.matmul.default, (x, w), 3, 64)
    graph.output(x)
    return graph


@pytest.fixture(scope="module")
def page(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fxq dump-graph --format html` prints for a Qwen3-MoE."""
    path = tmp_path_factory.mktemp("viewer") / "graph.html"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["dump-graph", str(zoo("qwen3_moe")), "--spec", SPEC, "--format", "html"]) == 0
    return path


def test_every_stage_is_there_line_by_line(page: Path) -> None:
    unpacked = data(page.read_text())
    names = [stage["name"] for stage in unpacked["stages"]]
    assert names[0] == "trace"
    assert names[-1] == "lower"
    assert "sync-groups" in names
    assert len(set(unpacked["lines"])) == len(unpacked["lines"])
    for stage in unpacked["stages"]:
        assert leaves(stage["folds"]) == len(order(stage)), stage["name"]


def test_a_stage_s_lines_are_its_dump() -> None:
    graph, viewer = experts(3, 4, quantized=True), Viewer()
    viewer.add("trace", experts(3, 4, quantized=False))
    viewer.add("quantize-experts", graph)
    unpacked = data(viewer.page("model"))
    found = [unpacked["lines"][i] for i in order(unpacked["stages"][1])]
    assert found == [line for line in dump(graph).splitlines() if line.startswith(("%", "return"))]


def test_layers_and_experts_fold() -> None:
    viewer = Viewer()
    viewer.add("trace", experts(5, 8, quantized=True))
    (folds,) = [stage["folds"] for stage in data(viewer.page("model"))["stages"]]
    # x; five layers of (weight, eight times slice, amax and quantize, stack, matmul) twice; the output
    assert folds == [1, [5, [1, [8, [3]], 3, [8, [3]], 2]], 1]


def test_the_page_is_the_same_every_time() -> None:
    made = []
    for _ in range(2):
        viewer = Viewer()
        viewer.add("trace", experts(2, 4, quantized=True))
        made.append(viewer.page("model"))
    assert made[0] == made[1]


def test_narrowing_applies_to_every_stage() -> None:
    viewer = Viewer(only="*gate_up*", cone=None)
    viewer.add("trace", experts(2, 4, quantized=False))
    viewer.add("quantize-experts", experts(2, 4, quantized=True))
    viewer_of_cone = Viewer(cone="%model_layers_1_mlp_experts_down_proj_e3_q")
    viewer_of_cone.add("trace", experts(2, 4, quantized=False))
    viewer_of_cone.add("quantize-experts", experts(2, 4, quantized=True))
    assert [len(o) for o in viewer.orders] == [2, 2 * (1 + 4 * 3 + 1)]
    assert [len(o) for o in viewer_of_cone.orders] == [0, 4]


def test_unknown_cones_and_globs_are_errors(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--cone", "no node is called"), ("--only", "no node's name")):
        assert main(["dump-graph", str(zoo("llama")), "--format", "html", option, "nothing_like_it"]) == 2
        printed = capsys.readouterr()
        assert expected in printed.err
        assert not printed.out


def test_a_browser_searches_and_walks_it(page: Path, tmp_path: Path) -> None:
    found = probe(
        page,
        """
stageBox.value = [...stageBox.options].find((o) => o.text.includes("sync-groups")).value;
searchBox.value = "layers.1*q_proj.weight";
show();
const rows = [...document.querySelectorAll(".line")].map((r) => r.dataset.name);
document.querySelector(".line").click();
const first = document.getElementById("node").innerText;
[...document.querySelectorAll("#node a")].find((a) => a.textContent.endsWith("_amax")).click();
const second = document.getElementById("node").innerText;
return { ready: document.body.dataset.ready, rows, first, second };""",
        tmp_path,
    )
    assert found["ready"] == "yes"
    assert found["rows"] == ["model_layers_1_self_attn_q_proj_weight"]
    assert "@model.layers.1.self_attn.q_proj.weight" in found["first"]
    assert "bf16[64,64]" in found["first"]
    assert "trace" in found["first"]
    assert "fxq.amax" in found["second"]
    assert "quantize-linears" in found["second"]


def test_a_browser_compares_two_stages(page: Path, tmp_path: Path) -> None:
    found = probe(
        page,
        """
const pick = (box, text) => { box.value = [...box.options].find((o) => o.text.includes(text)).value; };
pick(stageBox, "sync-groups"); pick(sinceBox, "fuse-experts"); show();
const note = document.querySelector(".note").textContent;
const changed = [...document.querySelectorAll(".fold")].find((f) => f.textContent.includes("changed"));
changed.click();
const name = document.querySelector(".line.changed").dataset.name;
document.querySelector(".line.changed").click();
return { note, name, node: document.getElementById("node").innerText };""",
        tmp_path,
    )
    added, changed, removed = (int(n) for n in re.findall(r"\d+", found["note"]))
    unpacked = data(page.read_text())
    before, after = (
        {
            unpacked["lines"][i].split(" ")[0]: unpacked["lines"][i]
            for s in unpacked["stages"]
            if s["name"] == name
            for i in order(s)
        }
        for name in ("fuse-experts", "sync-groups")
    )
    assert added == len(after.keys() - before.keys())
    assert removed == len(before.keys() - after.keys())
    assert changed == sum(before[name] != after[name] for name in after.keys() & before.keys())
    assert "line after fuse-experts" in found["node"]


def test_60_000_nodes_open_folded(tmp_path: Path) -> None:
    viewer = Viewer()
    viewer.add("trace", experts(60, 160, quantized=False))
    viewer.add("quantize-experts", experts(60, 160, quantized=True))
    path = tmp_path / "large.html"
    path.write_text(viewer.page("large", compared="trace"))
    assert path.stat().st_size < 2_000_000
    found = probe(
        path,
        """
const elements = document.querySelectorAll("*").length;
reveal("model_layers_31_mlp_experts_down_proj_e99_amax");
const row = document.querySelector('[data-name="model_layers_31_mlp_experts_down_proj_e99_amax"]');
const box = row.getBoundingClientRect();
const seen = box.top >= 0 && box.bottom <= innerHeight;
return { elements, text: row.textContent, seen, order: stage.order.length };""",
        tmp_path,
    )
    assert found["order"] > 57_000
    assert found["elements"] < 300
    assert "fxq.amax" in found["text"]
    assert found["seen"]


def test_the_page_fits_a_phone(page: Path, tmp_path: Path) -> None:
    wide = probe(page, "return document.documentElement.scrollWidth - innerWidth;", tmp_path, width=500)
    assert wide <= 0
