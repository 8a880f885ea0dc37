"""What looking costs: a reduced capture beside a long forward pass, and the last row beside every step of decoding."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))

from tests.vision_peers import declare

declare()

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel  # noqa: E402  after the declarations above

from harness import Row, keep_freed_memory, report, threads_argument  # noqa: E402
from regard import sites  # noqa: E402
from regard.bench.measure import times, work  # noqa: E402

CPU = torch.device("cpu")
LENGTH, PROMPT, TOKENS = 4096, 64, 64
CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
REDUCED = ["received", "entropy", "last_rows"]


def fastest(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of the fastest run of each, in turns: on a shared machine the others measure its neighbours."""
    return [min(samples) for samples in times(calls, device=CPU, fewest=repeats, most=repeats)]


def captured(model: nn.Module, what: list[str], run: Callable[[], object]) -> sites.Captured:
    capture = sites.Capture(what)
    with sites.attach(model, capture):
        run()
    return capture.captured


def verify(found: sites.Captured, attentions: tuple[Tensor, ...]) -> None:
    """Against the weights that the eager model itself returns."""
    for layer, weights in enumerate(attentions):
        wanted = (weights.sum(-2), torch.special.entr(weights).sum(-1), weights[:, :, -1:])
        for name, values in zip(REDUCED, wanted, strict=True):
            torch.testing.assert_close(found.get(name, layer=layer), values, rtol=1e-4, atol=1e-4)


def prompt() -> list[Row]:
    """One forward pass over a long prompt."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**CONFIG)).eval()
    eager = LlamaModel(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    eager.load_state_dict(model.state_dict())
    ids = torch.randint(1, 32000, (1, LENGTH))

    def plain() -> object:
        return model(ids, use_cache=False)

    def ours() -> object:
        return captured(model, REDUCED, plain)

    def maps() -> object:
        return eager(ids, use_cache=False, output_attentions=True)

    short = ids[:, :1000]
    verify(
        captured(model, REDUCED, lambda: model(short, use_cache=False)),
        eager(short, use_cache=False, output_attentions=True).attentions,
    )
    peaks = [work(call, CPU).peak_bytes or 0 for call in (plain, ours, maps)]
    seconds = fastest(plain, ours, repeats=4)
    start = time.perf_counter()
    maps()
    whole = time.perf_counter() - start
    added = (peaks[1] - peaks[0]) / 1e6
    case = f"received mass, entropy and last row of {LENGTH} tokens, 4 layers × 8 heads"
    rows = []
    for peer, compared, peak, target in (
        ("plain forward", seconds[0], peaks[0], 2.5),
        ("eager, output_attentions", whole, peaks[2], 1.0),
    ):
        ratio = seconds[1] / compared
        detail: dict[str, float | str] = {
            "peak added MB": added,
            "peak MB": peaks[1] / 1e6,
            "peer's peak MB": peak / 1e6,
        }
        wanted = f"<= {target:g}, added <= 64 MB"
        rows.append(Row(case, peer, ratio, wanted, ratio <= target and added <= 64, seconds[1], compared, detail))
    return rows


def decoding() -> Row:
    """Generation with the last row of every layer and step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    ids = torch.randint(1, 32000, (1, PROMPT))

    def plain() -> Tensor:
        return model.generate(ids, max_new_tokens=TOKENS, do_sample=False)

    def ours() -> sites.Captured:
        return captured(model, ["last_rows"], plain)

    torch.testing.assert_close(ours().get("last_rows", layer=3, step=TOKENS - 1).sum(-1), torch.ones(1, 8, 1))
    ours_seconds, peer_seconds = fastest(ours, plain, repeats=7)
    ratio = ours_seconds / peer_seconds
    case = f"generate() of {TOKENS} tokens with the last row of 4 layers × 8 heads"
    return Row(case, "plain generate()", ratio, "<= 1.2", ratio <= 1.2, ours_seconds, peer_seconds)


if __name__ == "__main__":
    threads_argument()
    keep_freed_memory()
    with torch.no_grad():
        rows = [*prompt(), decoding()]
    report("capture", rows)
