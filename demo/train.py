"""Train the demo model: a small Qwen3-MoE language model of the text that ships with CPython.

The text is the pydoc topics and the standard library's own sources, read from the running interpreter.
A byte-level BPE tokenizer and the model are trained on it from scratch, and two disjoint sets of excerpts
are cut from documents that training never sees: `calib.jsonl` and `heldout.jsonl`.

    python demo/train.py --device cuda                                   # rewrites demo/
    python demo/train.py --device cpu --steps 20 --batch 8 --out /tmp/demo/model   # a smoke test

`--out` receives the checkpoint and the tokenizer; the two .jsonl files are written beside it.
"""

import argparse
import functools
import json
import math
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END = "<|endoftext|>"
MAX_BYTES = 4_000_000  # limit on model.safetensors
LINES = 64  # lines of calib.jsonl and of heldout.jsonl; a document gives two, so the number is even
EVAL_WINDOW = 256  # tokens; perplexity is measured over windows of this length

# Tests, foreign packages, generated tables (encodings) and what was added when this interpreter was built.
SKIP_DIRS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "lib2to3",
    "pydoc_data",
}
SKIP_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|sitecustomize|usercustomize|entities")

# Documents that carry a notice of their own or an address are trained on, never quoted in the .jsonl files.
NOTICE = re.compile(r"copyright|\w@\w+\.", re.IGNORECASE)


def read_documents() -> dict[str, str]:
    """Text by document name, in sorted order: every pydoc topic, then every standard library source."""
    from pydoc_data.topics import topics

    documents = {f"topic:{name}": text for name, text in sorted(topics.items())}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if SKIP_DIRS.intersection(folders) or any(part.startswith("config-") for part in folders):
            continue
        if path.is_symlink() or SKIP_FILES.fullmatch(path.stem):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents[path.relative_to(root).as_posix()] = text
    return documents


def long_lines(text: str) -> set[str]:
    """The stripped lines of 30 characters or more; shorter ones recur everywhere in code."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}


def cut_excerpt(text: str, rng: random.Random) -> str | None:
    """600 to 1300 characters of whole lines from a random place in the first half of text, or None."""
    lines = text.splitlines()
    start, limit = rng.randrange(max(1, len(lines) // 2)), rng.randint(900, 1300)
    taken: list[str] = []
    for line in lines[start:]:
        if sum(map(len, taken)) + len(taken) + len(line) > limit:
            break
        taken.append(line)
    excerpt = "\n".join(taken).strip("\n").rstrip()
    return excerpt if len(excerpt) >= 600 else None


def split_documents(documents: dict[str, str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """(training documents, calibration excerpts, held-out excerpts).

    A document that gives an excerpt is taken out of training whole and gives to one set only. Pydoc topics
    quote one another, so an excerpt is refused if over a tenth of its long lines are in another document.
    """
    seen_in = Counter(line for text in documents.values() for line in long_lines(text))
    rng = random.Random(seed)
    names = [name for name, text in documents.items() if 3_000 <= len(text) <= 24_000]
    names = [name for name in names if not NOTICE.search(documents[name])]
    rng.shuffle(names)
    excerpts: list[str] = []
    taken: set[str] = set()
    for name in names:
        if len(excerpts) == 2 * LINES:
            break
        text = documents[name]
        middle = text.rfind("\n", 0, len(text) // 2) + 1
        halves = (text[:middle], text[middle:])
        found = [cut for half in halves if (cut := cut_excerpt(half, rng))]
        lines = [long_lines(cut) for cut in found]
        novel = all(sum(seen_in[line] > 1 for line in of_cut) <= len(of_cut) / 10 for of_cut in lines)
        if len(found) == len(halves) and novel:
            excerpts += found
            taken.add(name)
    if len(excerpts) < 2 * LINES:
        raise SystemExit(f"only {len(excerpts)} excerpts found, {2 * LINES} wanted")
    calib, heldout = excerpts[:LINES], excerpts[LINES:]
    rng.shuffle(calib)
    rng.shuffle(heldout)
    return [text for name, text in documents.items() if name not in taken], calib, heldout


def write_lines(path: Path, texts: list[str]) -> None:
    """Write texts as JSON lines of the form {"text": ...}."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of texts; every string is encodable and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One int64 tensor: each text's tokens after an <|endoftext|>."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream += tokenizer.backend_tokenizer.encode(text).ids
    return torch.tensor(stream)


def make_model(tokenizer: PreTrainedTokenizerFast, top_k: int) -> Qwen3MoeForCausalLM:
    """A fresh 1.9 M parameter model; every linear's input dimension is a multiple of 16."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,  # of dense layers; this model has none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=top_k,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # a padding index would freeze the embedding of <|endoftext|>
        experts_implementation="grouped_mm",
    )
    return Qwen3MoeForCausalLM(config)


class Objective(nn.Module):
    """Next-token cross-entropy of a model, and the load imbalance of its routers."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        super().__init__()
        self.lm = model

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy in nats per token, imbalance) over windows of tokens, [batch, length + 1].

        The imbalance is the Switch Transformer's, meaned over layers: 1 where each expert of a layer gets
        its even share. The library's own loss pools the layers, so it cannot see a layer that collapsed.
        """
        out = self.lm.model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        logits = self.lm.lm_head(out.last_hidden_state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        probs = torch.stack(out.router_logits).float().softmax(-1)  # [layers, tokens, experts]
        chosen = probs.topk(self.lm.num_experts_per_tok).indices
        share = torch.zeros_like(probs).scatter_(-1, chosen, 1.0 / chosen.shape[-1]).mean(1)
        return loss, (share * probs.mean(1)).sum(-1).mean() * self.lm.num_experts


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warmup to 1, then half a cosine down to 0.02."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_gradients(model: Qwen3MoeForCausalLM) -> None:
    """Print the gradient norm of each expert tensor and router; stop if one of them is zero."""
    for name, param in model.named_parameters():
        if ".mlp." in name:
            norms = param.grad.flatten(1).norm(dim=1)  # one per expert
            print(f"  gradient {name}: {norms.norm():.2e}, nonzero for {int((norms > 0).sum())} experts")
            if not norms.norm() > 0:
                raise SystemExit(f"no gradient reaches {name}")


def train(model: Qwen3MoeForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Train model in place on random windows of stream.

    On CUDA the forward and backward passes run on bf16 copies of fp32 master weights, so the loss that is
    minimised is the loss of the bf16 checkpoint that is saved; on the CPU everything is fp32.
    """
    device = torch.device(args.device)
    objective = Objective(model).to(device).train()
    stream = stream.to(device)
    params = dict(objective.named_parameters())
    decayed = [p for n, p in params.items() if p.dim() > 1 and "embed" not in n]
    plain = [p for n, p in params.items() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    warmup = max(1, min(200, args.steps // 10))
    schedule = functools.partial(learning_rate, steps=args.steps, warmup=warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    generator = torch.Generator().manual_seed(args.seed)
    last = len(stream) - args.seq_len - 1
    starts = torch.randint(last, (args.steps, args.batch, 1), generator=generator).to(device)
    offsets = torch.arange(args.seq_len + 1, device=device)
    losses = torch.zeros(args.steps, device=device)
    began = time.perf_counter()
    for step in range(args.steps):
        weights = {n: p.bfloat16() for n, p in params.items()} if device.type == "cuda" else params
        loss, imbalance = functional_call(objective, weights, (stream[starts[step] + offsets],))
        (loss + args.balance * imbalance).backward()
        if step == 0:
            check_gradients(model)
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses[step] = loss.detach()
        if (step + 1) % max(1, min(250, args.steps // 4)) == 0:
            mean, seconds = losses[max(0, step - 99) : step + 1].mean().item(), time.perf_counter() - began
            print(
                f"step {step + 1}/{args.steps}: train loss {mean:.4f}, imbalance {imbalance.item():.3f}, "
                f"gradient norm {norm.item():.2f}, {seconds:.0f} s",
                flush=True,
            )


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[torch.Tensor]:
    """Each text's tokens in consecutive windows of at most EVAL_WINDOW; the first of each is context only."""
    for text in texts:
        for window in tokenizer(text, return_tensors="pt").input_ids[0].split(EVAL_WINDOW):
            if len(window) > 1:
                yield window


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Perplexity per token of texts under model."""
    total, count = 0.0, 0
    for window in windows(tokenizer, texts):
        logits = model(window[None].to(model.device)).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:].to(model.device), reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def unigram_perplexity(stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Perplexity of the same tokens under the token frequencies of stream, each count raised by one."""
    counts = torch.bincount(stream, minlength=len(tokenizer)) + 1
    log_probs = (counts / counts.sum()).log()
    return math.exp(-torch.cat([log_probs[window[1:]] for window in windows(tokenizer, texts)]).mean().item())


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out, device = Path(__file__).parent / "model", "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--out", type=Path, default=out, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.4)
    parser.add_argument("--balance", type=float, default=0.002, help="weight of the router imbalance")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token is routed to, of 16")
    parser.add_argument("--vocab-size", type=int, default=1024)
    return parser.parse_args()


def main() -> None:
    """Collect the text, train the tokenizer and the model, save both, and measure the saved checkpoint."""
    args = parse_args()
    torch.manual_seed(args.seed)
    documents = read_documents()
    training, calib, heldout = split_documents(documents, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(args.out.parent / "calib.jsonl", calib)
    write_lines(args.out.parent / "heldout.jsonl", heldout)

    tokenizer = train_tokenizer(training, args.vocab_size)
    tokenizer.save_pretrained(args.out)
    stream = encode_stream(tokenizer, training)
    model = make_model(tokenizer, args.top_k)
    characters, parameters = sum(map(len, training)), sum(p.numel() for p in model.parameters())
    print(f"{len(training)} training documents, {characters} characters, {len(stream)} tokens")
    print(f"{parameters} parameters", flush=True)

    train(model, stream, args)

    model.to("cpu", torch.bfloat16)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"model.safetensors: {size} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"model.safetensors is over {MAX_BYTES} bytes")

    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    for name, texts in (("calib", calib), ("heldout", heldout)):
        print(
            f"{name} perplexity per token: {perplexity(model, tokenizer, texts):.3f} "
            f"(unigram {unigram_perplexity(stream, tokenizer, texts):.1f})"
        )


if __name__ == "__main__":
    main()
