"""Random decoder architectures as a repository's own code: what nobody has seen, and much that looks alike.

`Architecture(seed)` chooses names, attention, MLP, experts and look-alikes; `save` writes a directory with
`auto_map`, its modelling file and random weights, which is loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import VOCABULARY, fill

HIDDEN, HEADS, HEAD, LAYERS, EXPERTS = 64, 4, 16, 2, 4
Linear = Callable[..., str]  # (name, inputs, outputs) -> the statement that makes it
Called = Callable[..., str]  # (name, argument) -> the expression that calls it

ATTENTIONS = (
    "separate",
    "grouped",
    "fused",
    "fused by head",
    "fused value first",
    "latent",
    "linear",
    "shared keys",
    "gated",
)
MLPS = ("gated", "gated fused", "gated interleaved", "plain", "gated after norm")
STORAGES = (
    "",
    "stack",
    "stack in out",
    "stack interleaved",
    "list",
    "list split",
    "list of tensors",
    "bmm",
    "weighed",
)
LOOK_ALIKES = ("", "gate of heads", "taps", "low rank", "value gate", "mask list")


@dataclass
class Architecture:
    """What a seed chooses."""

    seed: int
    attention: str = ""
    mlp: str = ""
    experts: str = ""
    look_alike: str = ""
    flags: dict[str, bool] = field(default_factory=dict)
    width: int = 96
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        self.attention, self.mlp = chance.choice(ATTENTIONS), chance.choice(MLPS)
        self.experts, self.look_alike = chance.choice(STORAGES), chance.choice(LOOK_ALIKES)
        flags = ("bias", "norms", "sliding", "parallel", "shared", "tied", "clamped", "expert_bias", "scaled")
        self.flags = {flag: chance.random() < 0.35 for flag in flags}
        self.width = chance.choice((32, 48, 96, 80))
        words = [
            "".join(chance.choices(string.ascii_lowercase, k=chance.randint(1, 6))) + f"_{i}"
            for i in range(40)
        ]
        self.names = dict(zip(NAMES, words, strict=False))

    @property
    def name(self) -> str:
        """The seed, and what it chose."""
        flags = ", ".join(flag for flag, on in self.flags.items() if on)
        experts, look_alike = self.experts or "none", self.look_alike or "no look-alike"
        mlp = f"{self.mlp} {self.width}"
        return f"{self.seed}: attention {self.attention}, mlp {mlp}, experts {experts}, {look_alike}; {flags}"

    @property
    def architecture(self) -> str:
        """The class."""
        return "GeneratedForCausalLM"


# What has a name of its own in every architecture.
NAMES = (
    *("embed", "layers", "norm", "head", "attn", "mlp", "n1", "n2", "q", "k", "v", "o", "qkv", "q_norm"),
    *("k_norm", "kv_a", "kv_b", "kv_norm", "vg", "hg", "taps", "conv", "gate", "up", "down", "gate_up"),
    *("mid", "router", "experts", "shared", "shared_gate", "lo", "hi", "og", "text", "image"),
)


def save(architecture: Architecture, directory: Path) -> PreTrainedModel:
    """Write its config, its modelling file and random weights; the model, in bfloat16."""
    directory.mkdir(parents=True)
    module = f"modeling_generated_{architecture.seed}"
    (directory / f"{module}.py").write_text(source(architecture))
    config = {
        "architectures": ["GeneratedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.GeneratedConfig",
            "AutoModelForCausalLM": f"{module}.GeneratedForCausalLM",
        },
        "model_type": f"generated_{architecture.seed}",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": architecture.flags["tied"],
        "dtype": "bfloat16",
        **({"num_experts": EXPERTS} if architecture.experts else {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    made = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(made, trust_remote_code=True, dtype=torch.bfloat16)
    fill(model, torch.Generator().manual_seed(architecture.seed))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if architecture.flags["tied"]:
        weights.pop(f"{architecture.names['head']}.weight")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


def expert_weights(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """Name -> one matrix a routed expert."""
    found: dict[str, list[torch.Tensor]] = {}
    for owner, module in model.named_modules():
        if type(module).__name__ != "MoE":
            continue
        for name, parameter in module.named_parameters():
            p = parameter.detach()
            if p.dim() == 3:
                found[f"{owner}.{name}"] = list(p)
            elif p.dim() == 2 and any(word.isdigit() for word in name.split(".")):
                found[f"{owner}.{name}"] = [p]
    return found


def source(a: Architecture) -> str:
    """Its modelling file."""
    n, on = a.names, a.flags
    bias = f"bias={on['bias']}"

    def linear(name: str, inputs: int, outputs: int, bias: str = bias) -> str:
        return f"self.{n[name]} = nn.Linear({inputs}, {outputs}, {bias})"

    def called(name: str, x: str = "x") -> str:
        return f"self.{n[name]}({x})"

    return FILE.format(
        **{name: word for name, word in n.items() if name not in ("mlp", "experts")},
        mlp_=n["mlp"],
        hidden=HIDDEN,
        heads=HEADS,
        layers_=LAYERS,
        vocabulary=VOCABULARY,
        one="1 + " if on["scaled"] else "",
        attention_init=_block(_attention_init(a, linear), 8),
        attention_forward=_block(_attention(a, called), 8),
        mlp=_mlp(a, "MLP", a.width, linear, called),
        expert=_mlp(a, "Expert", 32, linear, called),
        moe=_moe(a, linear) if a.experts else "",
        mix=f"MoE() if index or {LAYERS} == 1 else MLP()" if a.experts else "MLP()",
        look_init=_block(_look_alike(a, linear, called)[0], 8),
        look=_block(_look_alike(a, linear, called)[1], 8),
        residual=_block(PARALLEL if on["parallel"] else SERIAL, 8).format(**n),
        tied=f'{{"{n["head"]}.weight": "{n["embed"]}.weight"}}' if on["tied"] else "{}",
    )


SERIAL = """\
y, kept = self.{attn}(self.{n1}(x), kept)
x = x + y
x = x + self.{mlp}(self.{n2}(x))
"""
PARALLEL = """\
z = self.{n1}(x)
y, kept = self.{attn}(z, kept)
x = x + y + self.{mlp}(z)
"""


def _block(text: str, indent: int) -> str:
    return text.strip("\n").replace("\n", "\n" + " " * indent)


def _attention_init(a: Architecture, linear: Linear) -> str:
    small = HIDDEN // 2
    lines = {
        "grouped": [("q", HIDDEN), ("k", small), ("v", small)],
        "fused": [("qkv", 3 * HIDDEN)],
        "fused by head": [("qkv", 3 * HIDDEN)],
        "fused value first": [("qkv", HIDDEN + 2 * small)],
        "latent": [("q", HEADS * 24), ("kv_a", 40)],
    }.get(a.attention, [("q", HIDDEN), ("k", HIDDEN), ("v", HIDDEN)])
    made = [linear(name, HIDDEN, size) for name, size in lines]
    if a.attention == "latent":
        made += [linear("kv_b", 32, HEADS * 32), f"self.{a.names['kv_norm']} = Norm(32)"]
    if a.attention == "gated":
        made.append(linear("og", HIDDEN, HIDDEN))
    if a.look_alike == "gate of heads":
        made.append(linear("hg", HIDDEN, HEADS))
    if a.flags["norms"]:
        made += [f"self.{a.names[name]} = Norm({HEAD})" for name in ("q_norm", "k_norm")]
    return "\n".join([*made, linear("o", HIDDEN, HIDDEN)])


def _attention(a: Architecture, called: Called) -> str:
    heads = f"view(b, s, {HEADS}, -1)"
    small = f"view(b, s, {HEADS // 2}, -1).repeat_interleave(2, 2)"
    split = {
        "grouped": f"q, k, v = {called('q')}.{heads}, {called('k')}.{small}, {called('v')}.{small}",
        "fused": f"q, k, v = {called('qkv')}.view(b, s, 3, {HEADS}, {HEAD}).unbind(2)",
        "fused by head": f"q, k, v = {called('qkv')}.view(b, s, {HEADS}, 3, {HEAD}).unbind(3)",
        "fused value first": f"sizes = [{HIDDEN // 2}, {HIDDEN}, {HIDDEN // 2}]\n"
        f"v, q, k = {called('qkv')}.split(sizes, -1)\n"
        f"q, k, v = q.{heads}, k.{small}, v.{small}",
        "latent": f"q = {called('q')}.{heads}\n"
        f"latent, turned = {called('kv_a')}.split([32, 8], -1)\n"
        f"kv = {called('kv_b', called('kv_norm', 'latent'))}.{heads}\n"
        f"k, v = kv.split([16, 16], -1)\n"
        f"k = torch.cat([k, turned[:, :, None].expand(-1, -1, {HEADS}, -1)], -1)",
    }.get(a.attention, f"q, k, v = {called('q')}.{heads}, {called('k')}.{heads}, {called('v')}.{heads}")
    lines = [split]
    if a.flags["norms"] and a.attention != "latent":
        lines.append(f"q, k = {called('q_norm', 'q')}, {called('k_norm', 'k')}")
    lines.append("q, k, v = (t.transpose(1, 2) for t in (q, k, v))")
    if a.attention == "shared keys":
        lines.append("k, v = (k, v) if kept is None else kept")
    lines.append("q, k = rotated(q), rotated(k)" if a.attention != "shared keys" else "q = rotated(q)")
    lines.append(
        "there, here = torch.arange(s, device=x.device)[:, None], torch.arange(s, device=x.device)[None]"
    )
    lines.append("seen = here <= there" + (" & (here > there - 8)" if a.flags["sliding"] else ""))
    if a.attention == "linear":
        lines.append("scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2) * seen")
        lines.append("y = scores @ v / (scores.sum(-1, keepdim=True) + 1)")
    elif a.attention == "gated":
        lines.append("scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~seen, -1e9)")
        lines.append("y = scores.float().softmax(-1).to(v.dtype) @ v")
    else:
        lines.append("y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)")
    lines.append("y = y.transpose(1, 2)")
    if a.look_alike == "gate of heads":
        lines.append(f"y = y * {called('hg')}.sigmoid()[..., None]")
    lines.append("y = y.reshape(b, s, -1)")
    if a.attention == "gated":
        lines.append(f"y = y * {called('og')}.sigmoid()")
    lines.append(f"return {called('o', 'y')}, " + ("(k, v)" if a.attention == "shared keys" else "None"))
    return "\n".join(lines)


def _mlp(a: Architecture, name: str, width: int, linear: Linear, called: Called) -> str:
    kind = a.mlp
    fused = kind in ("gated fused", "gated interleaved")
    if kind == "plain":
        made, h = [linear("up", HIDDEN, width)], f"h = F.relu({called('up')}).square()"
    elif fused:
        pieces = "h.chunk(2, -1)" if kind == "gated fused" else "(h[..., ::2], h[..., 1::2])"
        made = [linear("gate_up", HIDDEN, 2 * width)]
        h = f"h = {called('gate_up')}\ng, u = {pieces}\nh = {_joined(a)}"
    else:
        made = [linear("gate", HIDDEN, width), linear("up", HIDDEN, width)]
        h = f"g, u = {called('gate')}, {called('up')}\nh = {_joined(a)}"
    if kind == "gated after norm":
        made.append(f"self.{a.names['mid']} = Norm({width})")
        h += f"\nh = {called('mid', 'h')}"
    made.append(linear("down", width, HIDDEN))
    return CLASS.format(
        name=name, made=_block("\n".join(made), 8), forward=_block(f"{h}\nreturn {called('down', 'h')}", 8)
    )


def _joined(a: Architecture) -> str:
    """The product of gate and up."""
    if a.flags["clamped"]:
        return "(u.clamp(-7, 7) + 1) * (g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)))"
    return "F.silu(g) * u"


CLASS = """
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        {made}

    def forward(self, x):
        {forward}
"""


def _look_alike(a: Architecture, linear: Linear, called: Called) -> tuple[str, str]:
    """What lies between attention and MLP of a layer: (its parts, what it does to x)."""
    none = "bias=False"
    match a.look_alike:
        case "taps":
            made = linear("taps", HIDDEN, HEADS * 4, none) + "\n" + linear("conv", HIDDEN, HIDDEN, none)
            return made, (
                f"v = F.pad({called('conv')}, (0, 0, 3, 0)).unfold(1, 4, 1)\n"
                f"v = v.reshape(*x.shape[:2], {HEADS}, {HEAD}, 4)\n"
                f"v = v * {called('taps')}.view(*x.shape[:2], {HEADS}, 1, 4)\n"
                "x = x + v.sum(-1).reshape(x.shape)"
            )
        case "low rank":
            made = linear("lo", HIDDEN, 16, none) + "\n" + linear("hi", 16, HIDDEN, none)
            return made, f"x = x * (1 + {called('hi', called('lo'))})"
        case "value gate":
            made = linear("vg", HIDDEN, HIDDEN, none) + "\n" + linear("conv", HIDDEN, HIDDEN, none)
            return made, f"x = x + {called('conv')} * {called('vg')}.sigmoid()"
        case "mask list":
            made = linear("text", HIDDEN, HIDDEN, none) + "\n" + linear("image", HIDDEN, HIDDEN, none)
            return made, (
                "flat, is_text = x.reshape(-1, x.shape[-1]), x[..., 0].reshape(-1) > 0\n"
                "first, second = torch.where(is_text)[0], torch.where(~is_text)[0]\n"
                f"flat = flat.index_add(0, first, {called('text', 'flat[first]')})\n"
                f"x = flat.index_add(0, second, {called('image', 'flat[second]')}).view(x.shape)"
            )
    return "", ""


def _moe(a: Architecture, linear: Linear) -> str:
    n, two = a.names, a.mlp != "plain"
    rows = 64 if two else 32
    made = [linear("router", HIDDEN, EXPERTS, "bias=False")]
    piece = {
        "gated fused": "g, u = h.chunk(2, -1)",
        "gated interleaved": "g, u = h[..., ::2], h[..., 1::2]",
    }.get("gated interleaved" if a.experts == "stack interleaved" else "gated fused")
    act = f"{piece}\nh = {_joined(a)}" if two else "h = F.relu(h).square()"
    up, down = f"self.{n['gate_up']}", f"self.{n['down']}"
    per_token = "ids, xk = chosen.reshape(-1), x.repeat_interleave(2, 0)\n"
    weighed = "y = (h.view(-1, 2, h.shape[-1]) * weights[..., None]).sum(1)"
    bias = a.flags["expert_bias"] and a.experts.startswith("stack")
    stacked = [
        f"{up} = nn.Parameter(torch.zeros({EXPERTS}, {rows}, {HIDDEN}))",
        f"{down} = nn.Parameter(torch.zeros({EXPERTS}, {HIDDEN}, 32))",
    ]
    turned = [
        f"{up} = nn.Parameter(torch.zeros({EXPERTS}, {HIDDEN}, {rows}))",
        f"{down} = nn.Parameter(torch.zeros({EXPERTS}, 32, {HIDDEN}))",
    ]
    modules = [f"self.{n['experts']} = nn.ModuleList(Expert() for _ in range({EXPERTS}))"]
    added = f" + self.{n['shared_gate']}[ids]" if bias else ""
    loop = (
        "y = torch.zeros_like(x)\n"
        f"for e in range({EXPERTS}):\n"
        "    token, slot = torch.where(chosen == e)\n"
        "    y = y.index_add(0, token, {call} * weights[token, slot, None])"
    )
    match a.experts:
        case "stack" | "stack interleaved":
            made += stacked
            body = (
                per_token + f"h = torch.bmm({up}[ids], xk.unsqueeze(-1)).squeeze(-1){added}\n{act}\n"
                f"h = torch.bmm({down}[ids], h.unsqueeze(-1)).squeeze(-1)\n{weighed}"
            )
        case "stack in out":
            made += turned
            body = (
                per_token + f"h = torch.bmm(xk.unsqueeze(1), {up}[ids]).squeeze(1){added}\n{act}\n"
                f"h = torch.bmm(h.unsqueeze(1), {down}[ids]).squeeze(1)\n{weighed}"
            )
        case "bmm":
            made += turned
            body = (
                f"xk = x.unsqueeze(0).expand({EXPERTS}, -1, -1)\nh = torch.bmm(xk, {up})\n{act}\n"
                f"h = torch.bmm(h, {down})\ny = (h * spread.t()[..., None]).sum(0)"
            )
        case "list":
            made += modules
            body = loop.format(call=f"self.{n['experts']}[e](x[token])")
        case "list split":
            made += modules
            body = (
                "ids = chosen.reshape(-1)\norder = ids.argsort()\n"
                f"counts = torch.bincount(ids, minlength={EXPERTS}).tolist()\n"
                "pieces = x[order // 2].split(counts)\n"
                f"h = torch.cat([self.{n['experts']}[e](p) for e, p in enumerate(pieces)])\n"
                "y = torch.zeros_like(x).index_add(0, order // 2, h * weights.reshape(-1)[order, None])"
            )
        case "list of tensors":
            made += [
                f"{up} = nn.ParameterList(torch.zeros({rows}, {HIDDEN}) for _ in range({EXPERTS}))",
                f"{down} = nn.ParameterList(torch.zeros({HIDDEN}, 32) for _ in range({EXPERTS}))",
            ]
            inner = _block(f"h = F.linear(x[token], {up}[e])\n{act}", 4)
            body = loop.format(call=f"F.linear(h, {down}[e])").replace("    y = y", f"    {inner}\n    y = y")
        case _:
            made += modules
            body = (
                "y = torch.zeros_like(x)\n"
                f"for e in range({EXPERTS}):\n    y = y + spread[:, e, None] * self.{n['experts']}[e](x)"
            )
    if bias:
        made.append(f"self.{n['shared_gate']} = nn.Parameter(torch.zeros({EXPERTS}, {rows}))")
    if a.flags["shared"]:
        made.append(f"self.{n['shared']} = MLP()")
        body += f"\ny = y + self.{n['shared']}(x)"
    forward = (
        "shape = x.shape\nx = x.reshape(-1, shape[-1])\n"
        f"scores = self.{n['router']}(x).float().softmax(-1)\n"
        "weights, chosen = scores.topk(2, -1)\n"
        "weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)\n"
        "spread = torch.zeros_like(scores).to(x.dtype).scatter(1, chosen, weights)\n"
        f"{body}\nreturn y.view(shape)"
    )
    return CLASS.format(name="MoE", made=_block("\n".join(made), 8), forward=_block(forward, 8))


FILE = """\
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class GeneratedConfig(PreTrainedConfig):
    model_type = "generated"


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return ({one}self.weight.float() * y).to(x.dtype)


def rotated(x):
    half = x.shape[-1] // 2
    rate = 1.0 / 100.0 ** (torch.arange(half, device=x.device).float() / half)
    angle = torch.arange(x.shape[-2], device=x.device).float()[:, None] * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        {attention_init}

    def forward(self, x, kept):
        b, s, _ = x.shape
        {attention_forward}

{mlp}
{expert}
{moe}

class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.{n1}, self.{n2} = Norm({hidden}), Norm({hidden})
        self.{attn} = Attention()
        self.{mlp_} = {mix}
        {look_init}

    def forward(self, x, kept):
        {residual}
        {look}
        return x, kept


class GeneratedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GeneratedConfig
    _tied_weights_keys = {tied}

    def __init__(self, config):
        super().__init__(config)
        self.{embed} = nn.Embedding({vocabulary}, {hidden})
        self.{layers} = nn.ModuleList(Layer(index) for index in range({layers_}))
        self.{norm} = Norm({hidden})
        self.{head} = nn.Linear({hidden}, {vocabulary}, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.{embed}

    def get_output_embeddings(self):
        return self.{head}

    def set_output_embeddings(self, value):
        self.{head} = value

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        x, kept = self.{embed}(input_ids), None
        for layer in self.{layers}:
            x, kept = layer(x, kept)
        return CausalLMOutputWithPast(logits=self.{head}(self.{norm}(x)))
"""
