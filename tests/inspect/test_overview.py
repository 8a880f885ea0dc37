"""What `overview` says of heads whose weights are known is what can be counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from regard.inspect.overview import Overview, overview
from regard.inspect.roles import NEAR, Head, Look
from regard.inspect.tally import Line
from regard.sites import AttentionCall, Tokens, attach
from regard.sites.call import RowChange
from tests.sites.families import FAMILIES

WORDS = Tokens(
    (("[CLS]", *"abcdefghijklmnopqr", "[SEP]"),),
    (("special", *["text"] * 18, "special"),),
)
LENGTH = WORDS.length


class Dictated(nn.Module):
    """A BERT of one layer whose heads attend as they are told: (H, N, M) weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        import transformers

        heads = weights.shape[0]
        config = transformers.BertConfig(
            hidden_size=8 * heads, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads, vocab_size=99
        )
        self.bert = transformers.BertModel(config).eval()
        self.dictated = weights

    def forward(self, input_ids: Tensor) -> object:
        return self.bert(input_ids=input_ids)

    def look(self, tokens: Tokens) -> Overview:
        """The overview, with the weights put in by an instrument of an outer context."""

        def tell(call: AttentionCall) -> AttentionCall:
            def change(values: Tensor, rows: slice, heads: object) -> Tensor:
                return self.dictated[None, :, rows].to(values.dtype).expand_as(values)

            return call.change_weights(RowChange(torch.ones(call.queries, dtype=torch.bool), change))

        ids = torch.zeros(1, self.dictated.shape[1], dtype=torch.long)
        with attach(self, tell):
            return overview(self, {"input_ids": ids}, tokens=tokens)


def shifted(offset: int, length: int = LENGTH) -> Tensor:
    """Each query on the key `offset` away, at the ends on itself."""
    keys = torch.arange(length) + offset
    keys = torch.where((keys < 0) | (keys >= length), torch.arange(length), keys)
    return torch.eye(length)[keys]


def on(*keys: int) -> Tensor:
    """Each query evenly on some keys."""
    weights = torch.zeros(LENGTH, LENGTH)
    weights[:, list(keys)] = 1 / len(keys)
    return weights


def uniform() -> Tensor:
    return torch.full((LENGTH, LENGTH), 1 / LENGTH)


def scattered() -> Tensor:
    """Each query on one far key of its own."""
    return torch.eye(LENGTH).roll(LENGTH // 2, dims=1)


def near() -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    weights = (distance <= NEAR[1]).float()
    return weights / weights.sum(-1, keepdim=True)


def thirds() -> Tensor:
    """Each query evenly on three far keys of its own."""
    return sum(torch.eye(LENGTH).roll(shift, dims=1) for shift in (7, 10, 13)) / 3  # pyright: ignore[reportReturnType]


DICTATED: dict[str, Callable[[], Tensor]] = {
    "previous": lambda: shifted(-1),
    "next": lambda: shifted(1),
    "self": lambda: torch.eye(LENGTH),
    "sink": lambda: on(7),
    "special": lambda: 0.5 * on(0, LENGTH - 1) + 0.5 * uniform(),
    "local": near,
    "broad": uniform,
    "focused": scattered,
    "mixed": thirds,
}


@pytest.fixture(scope="module")
def seen() -> Overview:
    return Dictated(torch.stack([make() for make in DICTATED.values()])).look(WORDS)


@pytest.fixture(scope="module")
def heads(seen: Overview) -> dict[str, Head]:
    return dict(zip(DICTATED, seen.layers[0].heads, strict=True))


@pytest.mark.parametrize("role", DICTATED)
def test_head_that_does_one_thing_has_its_role(role: str, heads: dict[str, Head]):
    assert heads[role].role == role


def test_shares_are_those_of_the_weights(heads: dict[str, Head]):
    assert heads["previous"].looks["previous"] == Look(1.0, 1.0, pytest.approx(1 / LENGTH))
    assert heads["broad"].looks["special"].share == pytest.approx(2 / LENGTH)
    assert heads["broad"].first == pytest.approx(1 / LENGTH)
    assert heads["special"].looks["special"].share == pytest.approx(0.5 + 1 / LENGTH)
    assert heads["special"].looks["special"].most == 1.0
    assert heads["local"].looks["local"].share == pytest.approx(1.0)


def test_sink_is_the_position_the_others_look_at(heads: dict[str, Head]):
    assert heads["sink"].sink_at == 7
    assert heads["sink"].looks["sink"] == Look(1.0, 1.0, pytest.approx(1 / LENGTH))


def test_weight_on_itself_makes_no_sink(heads: dict[str, Head]):
    assert heads["self"].looks["sink"].share == 0.0


def test_entropy_of_even_rows_is_the_logarithm_of_their_keys(heads: dict[str, Head]):
    assert heads["broad"].entropy == pytest.approx(math.log(LENGTH), rel=1e-6)
    assert heads["mixed"].entropy == pytest.approx(math.log(3), rel=1e-6)
    assert heads["mixed"].breadth == pytest.approx(math.log(3) / math.log(LENGTH), rel=1e-6)
    assert heads["self"].entropy == 0.0


def test_distance_is_weighted_by_attention(heads: dict[str, Head]):
    assert heads["previous"].distance == pytest.approx((LENGTH - 1) / LENGTH)
    assert heads["sink"].distance == pytest.approx(sum(abs(i - 7) for i in range(LENGTH)) / LENGTH)


def test_largest_weights_are_kept_in_order(seen: Overview):
    layer = seen.layers[0]
    previous = list(DICTATED).index("previous")
    assert layer.top_keys[previous, 1:, 0].tolist() == list(range(LENGTH - 1))
    assert layer.top_weights.shape == (len(DICTATED), LENGTH, 8)
    assert bool((layer.top_weights.diff(dim=-1) <= 0).all())


def test_received_is_the_mean_of_the_other_queries(seen: Overview):
    sink = seen.layers[0].received[list(DICTATED).index("sink")]
    assert sink.tolist() == [1.0 if key == 7 else 0.0 for key in range(LENGTH)]


def test_sentences_say_position_and_numbers(seen: Overview):
    said = {note.role: note.text for note in seen.notable()}
    assert said["previous"] == "looks at the previous token in 100% of cases, with 100% of all attention"
    assert said["sink"] == "rests on “g” (position 7) in 100% of cases, with 100% of all attention"
    assert said["broad"].endswith(f"as if evenly over {LENGTH} tokens")
    assert "mixed" not in said


def test_result_prints_and_draws_every_notable_head(seen: Overview):
    assert seen.table().row_count == len(seen.notable()) == 8
    drawn = {trace.name for trace in seen.figure().data}  # pyright: ignore[reportAttributeAccessIssue]
    assert drawn == set(DICTATED)


def test_threshold_needs_more_than_even_attention_gives():
    """Of 5 tokens, 4 lie within the neighbourhood of each: that much on them is no locality."""
    short = Tokens((tuple("abcde"),), (("text",) * 5,))
    (head,) = Dictated(torch.full((1, 5, 5), 0.2)).look(short).layers[0].heads
    assert head.looks["local"].share >= 0.5
    assert head.role == "broad"


def on_grid(row: int, column: int, side: int = 6) -> Tensor:
    """Patches of a square picture after a class token, each on the one so many rows and columns away."""
    weights = torch.zeros(side * side + 1, side * side + 1)
    weights[0, 0] = 1.0
    for at in range(side * side):
        y, x = at // side + row, at % side + column
        inside = 0 <= y < side and 0 <= x < side
        weights[at + 1, y * side + x + 1 if inside else at + 1] = 1.0
    return weights


def test_patches_have_neighbours_in_the_plane():
    weights = torch.stack([on_grid(0, -1), on_grid(0, 1), on_grid(1, 0), on_grid(1, 1)])
    seen = Dictated(weights).look(Tokens.patches((6, 6)))
    left, right, below, diagonal = seen.layers[0].heads
    assert (left.role, right.role, below.role) == ("previous", "next", "local")
    assert left.looks["previous"].share == 1.0
    assert seen.says(0, left).startswith("looks at the patch to the left")
    assert below.distance == pytest.approx(30 / 36)
    assert (diagonal.role, diagonal.distance) == ("local", pytest.approx(math.sqrt(2) * 25 / 36))


def test_tokens_before_patches_are_special():
    seen = Dictated(on_grid(0, 0)[None]).look(Tokens.patches((6, 6)))
    assert seen.lines[0].labels[:2] == ("[CLS]", "0,0")
    assert seen.lines[0].kinds[0] == "special"


def family(name: str, **more: Tokens) -> Overview:
    kind = FAMILIES[name]
    inputs = {key: value[:1] for key, value in kind.inputs().items()}
    return overview(kind.build().eval(), inputs, **more)


@pytest.fixture(scope="module")
def causal() -> Overview:
    return family("GPT-2")


def test_causal_head_is_measured_by_what_it_sees(causal: Overview):
    """Random weights are nearly even: over the keys in sight, not over the whole sequence."""
    for layer in causal.layers:
        for head in layer.heads:
            assert head.breadth > 0.95
            assert "next" not in head.looks
            assert head.looks["sink"].chance > 1 / 12


def test_no_weights_of_masked_keys_are_kept(causal: Overview):
    layer = causal.layers[0]
    ahead = layer.top_keys > torch.arange(12)[None, :, None]
    assert float(layer.top_weights[ahead].max()) == 0.0


def test_received_and_top_are_the_models_own_weights():
    kind = FAMILIES["BERT"]
    model = kind.build().eval()
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    inputs = {key: value[:1] for key, value in kind.inputs().items()}
    host = model(**inputs, output_attentions=True).attentions
    for layer, weights in zip(overview(model, inputs).layers, host, strict=True):
        torch.testing.assert_close(layer.top_weights, weights[0].topk(8).values)
        off = weights[0] * (1 - torch.eye(12))
        torch.testing.assert_close(layer.received, off.sum(1) / 11)
        entropy = -(weights[0] * weights[0].log()).sum(-1) / math.log(12)
        torch.testing.assert_close(layer.entropy, entropy)


def test_encoder_decoder_has_two_lines_and_cross_attention_no_neighbours():
    source = Tokens((tuple(f"s{i}" for i in range(12)),), (("text",) * 12,))
    target = Tokens((tuple(f"t{i}" for i in range(7)),), (("text",) * 7,))
    seen = family("T5", tokens=source, target_tokens=target)
    cross = [layer for layer in seen.layers if layer.kind == "cross"]
    assert len(cross) == 2
    for layer in cross:
        assert (seen.lines[layer.queries].labels, seen.lines[layer.keys].labels) == (target.labels[0], source.labels[0])
        assert all(set(head.looks) <= {"special", "sink"} and head.distance is None for head in layer.heads)


def test_windows_are_looked_at_one_by_one():
    seen = family("Swin", tokens=Tokens.patches((16, 16)))
    assert [layer.windows for layer in seen.layers] == [16, 16, 4, 4]
    assert seen.lines == (Line(*(row[0] for row in vars(Tokens.patches((4, 4))).values()), grid=(4, 4)),)


def test_watch_is_told_of_every_site():
    told: list[str] = []
    kind = FAMILIES["BERT"]
    inputs = {key: value[:1] for key, value in kind.inputs().items()}
    overview(kind.build().eval(), inputs, watch=lambda name, event: told.append(f"{name} {event}"))
    assert told == [f"encoder.layer.{number}.attention.self done" for number in (0, 1)]


def test_batch_of_several_is_refused():
    kind = FAMILIES["BERT"]
    with pytest.raises(ValueError, match="overview: a batch of 2; look at one sample"):
        overview(kind.build(), kind.inputs())


def test_one_token_is_refused():
    with pytest.raises(ValueError, match="sees two keys or more: 1 queries, 1 keys; give a longer input"):
        overview(FAMILIES["BERT"].build(), {"input_ids": torch.ones(1, 1, dtype=torch.long)})


def test_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention that can be reached"):
        overview(nn.Linear(2, 2), torch.ones(1, 2))


def test_sink_needs_its_threshold(heads: dict[str, Head]):
    head = heads["sink"]
    weaker = replace(head, looks={"sink": Look(0.29, 1.0, 0.05)}, breadth=0.5, peak=0.29)
    enough = replace(weaker, looks={"sink": Look(0.31, 1.0, 0.05)})
    assert (weaker.role, enough.role) == ("mixed", "sink")
