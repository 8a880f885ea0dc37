"""Masks of papers: exactly the authors' masks, with exact plans, and what each paper claims of its mask."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.nn import MultiHeadAttention
from regard.ops import attention, explain
from regard.ops.engines.loops import loop_for
from regard.ops.masks import (
    Blocks,
    CandidateIsolation,
    Causal,
    CausalCross,
    CompositeModality,
    LocalBlocks,
    Mask,
    MixedBidirectionalVision,
    ModalityMutual,
    Padding,
    Prefix,
    Segments,
    Sharded,
    Tiles,
    plan,
)
from regard.ops.masks.base import EMPTY, FULL, PARTIAL
from regard.ops.normalizers import Softmax

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str, case: str) -> dict[str, Tensor]:
    kept = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(f"{case}."): tensor for key, tensor in kept.items() if key.startswith(f"{case}.")}


def flags(length: int, *spans: tuple[int, int]) -> Tensor:
    index = torch.arange(length)
    return torch.stack([(index >= start) & (index < stop) for start, stop in spans]).any(0)


def picture(mask: Mask, queries: int, keys: int) -> list[str]:
    return ["".join("x" if allowed else "." for allowed in row) for row in mask.dense(queries, keys)[0, 0].tolist()]


IMAGE, QUESTION = flags(6, (1, 3)), flags(6, (3, 5))


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (ModalityMutual(IMAGE, QUESTION), ["x.....", "xx.xx.", "xxxxx.", "xxxx..", "xxxxx.", "xxxxxx"]),
        (CompositeModality(IMAGE), ["x.....", ".x....", "..x...", "xxxx..", "xxxxx.", "xxxxxx"]),
        (CompositeModality(IMAGE, itself=False), ["x.....", "......", "......", "xxxx..", "xxxxx.", "xxxxxx"]),
        (MixedBidirectionalVision.from_visual(IMAGE), ["x.....", "xxx...", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"]),
        (
            CandidateIsolation.from_lengths(2, [1, 2, 1]),
            ["xxxxxx", "xxxxxx", "xxx...", "xx.xx.", "xx.xx.", "xx...x"],
        ),
        (
            CandidateIsolation.from_lengths(2, [1, 2, 1], "one_way"),
            ["xx....", "xx....", "xxx...", "xx.xx.", "xx.xx.", "xx...x"],
        ),
        (
            CandidateIsolation.from_lengths(2, [1, 2, 1], "diagonal"),
            ["xx....", "xx....", "..x...", "...xx.", "...xx.", ".....x"],
        ),
        (CausalCross(6, 3, 2), ["xx....", "xx....", "xxxx..", "xxxx..", "xxxxxx", "xxxxxx"]),
        (Sharded(2, 1, 3), ["xx....", "xx....", "xxxx..", "xxxx..", "xx..xx", "xx..xx"]),
        (LocalBlocks(2, 2), ["xxxx..", "xxxx..", "xxxxxx", "xxxxxx", "..xxxx", "..xxxx"]),
    ],
    ids=repr,
)
def test_picture(mask, wanted):
    assert picture(mask, 6, 6) == wanted


@st.composite
def structured_masks(draw: st.DrawFn, queries: int, keys: int) -> Mask:
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch = draw(st.sampled_from([(), (2,)]))

    def runs() -> Tensor:
        """Flags in runs, as images and texts are."""
        changes = torch.rand(*batch, keys, generator=random) < draw(st.sampled_from([0.02, 0.3]))
        return changes.cumsum(-1) % 2 == 0

    def ids() -> Tensor:
        return (torch.rand(*batch, keys, generator=random) < 0.08).cumsum(-1)

    small = st.integers(1, 9)
    kinds = {
        "local": lambda: LocalBlocks(draw(small), draw(small)),
        "sharded": lambda: Sharded(draw(small), draw(small), draw(small), draw(st.integers(0, 3)), draw(small)),
        "mutual": lambda: ModalityMutual(runs(), runs()),
        "composite": lambda: CompositeModality(runs(), draw(st.booleans())),
        "vision": lambda: MixedBidirectionalVision.from_visual(runs()),
        "candidates": lambda: CandidateIsolation(ids(), draw(st.sampled_from(["arrow", "one_way", "diagonal"]))),
        "cross": lambda: CausalCross(queries, draw(st.integers(1, 20)), draw(small), keys),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 17), st.integers(1, 17))
def test_every_tile_is_called_what_it_is(data, query_tile, key_tile):
    keys = data.draw(st.integers(1, 70))
    queries = data.draw(st.integers(1, keys))
    mask = data.draw(structured_masks(queries, keys))
    states = mask.tile_states(Tiles(2, 4, queries, keys, query_tile, key_tile)).expand(2, 4, -1, -1)
    dense = mask.dense(queries, keys, batch=2, heads=4).expand(2, 4, -1, -1)
    for row, part in enumerate(dense.split(query_tile, dim=2)):
        for column, tile in enumerate(part.flatten(0, 1).split(key_tile, dim=2)):
            tile = tile.flatten(1)
            wanted = torch.where(tile.all(-1), FULL, torch.where(tile.any(-1), PARTIAL, EMPTY))
            assert torch.equal(states[:, :, row, column].flatten(), wanted)


@pytest.mark.parametrize("case", range(5))
def test_shards_are_those_of_the_authors(case):
    kept = golden("s2_attention", str(case))
    heads, kv_heads, length, *numbers = kept["numbers"].tolist()
    mask = Causal() & Sharded.for_heads(heads, kv_heads, *numbers)
    assert torch.equal(mask.dense(length, length, heads=heads)[0].expand(heads, -1, -1), kept["mask"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(1, 3), st.integers(1, 80))
def test_the_shards_of_all_heads_are_the_whole_context_when_there_are_as_many(heads, stride, block, local, length):
    dense = (Causal() & Sharded.for_heads(heads, heads, block, local, stride)).dense(length, length, heads=heads)
    together = dense[0].any(0)
    if heads >= stride:
        assert torch.equal(together, torch.ones(length, length, dtype=torch.bool).tril())
    elif length > (stride + local) * block:  # one whole turn of the shards is out of the band
        assert not torch.equal(together, torch.ones(length, length, dtype=torch.bool).tril())


def test_a_shard_and_its_band_cost_their_share_of_the_plan():
    mask = Causal() & Sharded.for_heads(8, 8, 128, 2, 8)
    density = plan(mask, Tiles(1, 8, 2**14, 2**14, 128, 128)).density
    assert abs(density - (1 / 2) * (1 / 8) - 2 * 128 / 2**14) < 0.01


def test_the_first_block_of_a_shard_is_in_it():
    mask = Sharded(4, 1, 5, 2, 1, 2)
    heads = torch.arange(6)
    blocks = mask.first_block(heads)
    assert (blocks < 5).all()
    assert mask.allows(torch.tensor(0), heads, torch.tensor(400), blocks * 4).all()


def test_packed_shards_begin_anew_with_each_sequence():
    segments = Segments.from_lengths([7, 12])
    packed = (Causal() & Sharded(2, 1, 3, places=segments.places()) & segments).dense(19, 19, heads=3)
    for start, stop in ((0, 7), (7, 19)):
        alone = (Causal() & Sharded(2, 1, 3)).dense(stop - start, stop - start, heads=3)
        assert torch.equal(packed[..., start:stop, start:stop], alone)


def test_one_local_block_is_blocks():
    assert torch.equal(LocalBlocks(5, 1).dense(23, 23), Blocks(5).dense(23, 23))


@pytest.mark.parametrize("case", range(5))
def test_modality_mutual_is_the_authors_mask(case):
    kept = golden("mma", str(case))
    image, text, end, length, real = kept["numbers"].tolist()
    mask = ModalityMutual(flags(length, (image, text)), flags(length, (text, end))) & Padding(torch.tensor([real]))
    assert torch.equal(mask.dense(length, length)[0, 0], kept["mask"])


def test_mutual_attention_lets_an_image_depend_on_the_question_and_on_no_answer():
    image, question = flags(20, (2, 8)), flags(20, (8, 14))
    x = torch.randn(1, 20, 16, requires_grad=True)
    out = MultiHeadAttention(16, heads=2)(x, mask=ModalityMutual(image, question))
    (gradient,) = torch.autograd.grad(out[0, 2:8].square().sum(), x)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[:14].all()
    assert not reached[14:].any()


VISUAL = flags(2048, (100, 1800))


def test_no_score_between_visual_tokens_is_computed():
    """The plan of a 1700-token image: of the tiles between its tokens only those on the diagonal are visited."""
    tiles = Tiles(1, 1, 2048, 2048, 64, 64)
    inside = slice(2, 28)  # tiles of visual tokens only
    for itself in (True, False):
        states = plan(CompositeModality(VISUAL, itself), tiles).states[0, 0, inside]
        visited = torch.eye(26, dtype=torch.bool) & itself
        assert torch.equal(states[:, inside] != EMPTY, visited)
        # Nor does an image look at the text before it.
        assert (states[:, :2] == EMPTY).all()
    assert (plan(CompositeModality(VISUAL), tiles).states[0, 0, 29:, :28] == FULL).all()
    assert plan(CompositeModality(VISUAL), tiles).density < plan(Causal(), tiles).density / 3


def products(mask: Mask, length: int) -> tuple[int, int]:
    """FLOPs of the products of the tiled engine, forward and backward."""
    text, tensors = mask.flatten()
    query, key, value, grad = (torch.randn(1, 1, length, 8) for _ in range(4))
    loop = loop_for(query, key, value, tensors, [], None, text, "", Softmax().flatten()[0], 1.0, 0.0)
    with FlopCounterMode(display=False) as forward:
        out, lse = loop.forward()
    with FlopCounterMode(display=False) as backward:
        loop.backward(grad, torch.zeros_like(lse), out, lse, train_bias=False)
    return forward.get_total_flops(), backward.get_total_flops()


def test_scores_between_visual_tokens_cost_nothing_in_either_pass():
    """128 tokens of text after an image: the work grows with the image, where a causal mask's grows with its square."""
    for index in range(2):
        small, large = (products(CompositeModality(flags(n + 128, (0, n))), n + 128)[index] for n in (1024, 2048))
        assert large <= 2 * small
        causal_small, causal_large = (products(Causal(), n + 128)[index] for n in (1024, 2048))
        assert causal_large > 3 * causal_small
        assert large < causal_large / 5


def test_the_engine_of_choice_skips_what_is_between_visual_tokens():
    query = torch.randn(1, 1, 2176, 8, requires_grad=True)
    assert explain(query, query, query, mask=CompositeModality(flags(2176, (0, 2048)))).engine in ("tiled", "flex")


def test_a_visual_token_gets_its_own_value_and_output_projection():
    layer = MultiHeadAttention(16, heads=2, dtype=torch.float64)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    visual = flags(12, (2, 9))
    out = layer(x, mask=CompositeModality(visual))
    torch.testing.assert_close(out[:, visual], layer.output(layer.value(x[:, visual])))
    causal = MultiHeadAttention(16, heads=2, causal=True, dtype=torch.float64)
    causal.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out[:, ~visual], causal(x)[:, ~visual])


def test_images_are_bidirectional_inside_and_text_stays_causal():
    visual = flags(30, (3, 10), (16, 25))
    dense = MixedBidirectionalVision.from_visual(visual).dense(30, 30)[0, 0]
    assert torch.equal(dense[~visual], torch.ones(30, 30, dtype=torch.bool).tril()[~visual])
    for start, stop in ((3, 10), (16, 25)):
        assert dense[start:stop, :stop].all()
        assert not dense[start:stop, stop:].any()


def test_an_image_first_is_a_prefix():
    mixed = MixedBidirectionalVision.from_visual(flags(20, (0, 8)))
    assert torch.equal(mixed.dense(20, 20), (Causal() | Prefix(8)).dense(20, 20))


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize(("theirs", "ours"), [("arrow", "arrow"), ("diag", "diagonal")])
def test_candidates_are_isolated_as_by_the_authors(theirs, ours, case):
    kept = golden("uni_encoder", f"{theirs}.{case}")
    context, *candidates = kept["lengths"].tolist()
    real, length = context + sum(candidates), kept["mask"].shape[0]
    dense = CandidateIsolation.from_lengths(context, candidates, ours).dense(real, real)[0, 0]
    assert torch.equal(dense, kept["mask"][:real, :real])
    assert not kept["mask"][real:length].any()


def test_candidates_share_position_ids():
    mask = CandidateIsolation(torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2]]))
    assert mask.positions().tolist() == [[0, 1, 2, 3, 2, 2], [0, 1, 2, 1, 2, 3]]


def test_query_groups_see_frames_up_to_their_time():
    dense = CausalCross(12, 4, 5).dense(12, 20)[0, 0]
    for group in range(4):
        rows = dense[3 * group : 3 * (group + 1)]
        assert rows[:, : 5 * (group + 1)].all()
        assert not rows[:, 5 * (group + 1) :].any()


@pytest.mark.parametrize("frames", [1, 3, 5, 8, 96])
def test_a_query_sees_its_share_of_the_video_however_many_frames_there_are(frames):
    seen = CausalCross(8, frames, 1).dense(8, frames)[0, 0].sum(-1) / frames
    share = (torch.arange(8) + 1) / 8
    assert (seen >= share).all()
    assert (seen - share < 1 / frames).all()
    assert all((a <= b).all() for a, b in pairwise(seen))


def test_padded_videos_see_what_they_see_alone():
    together = CausalCross(6, torch.tensor([2, 5]), 3, 15).dense(6, 15, batch=2)[:, 0]
    for sample, frames in enumerate((2, 5)):
        assert torch.equal(together[sample, :, : 3 * frames], CausalCross(6, frames, 3).dense(6, 3 * frames)[0, 0])
        assert not together[sample, :, 3 * frames :].any()


def test_a_query_group_does_not_depend_on_later_frames():
    layer = MultiHeadAttention(16, heads=2)
    x, video = torch.randn(1, 6, 16), torch.randn(1, 12, 16, requires_grad=True)
    out = layer(x, video, mask=CausalCross(6, 3, 4))
    for group in range(3):
        (gradient,) = torch.autograd.grad(out[0, 2 * group : 2 * group + 2].square().sum(), video, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert torch.equal(reached, torch.arange(12) < 4 * (group + 1))


def test_masks_of_modalities_hold_while_decoding():
    """The last queries of a row see what they see in the whole row."""
    visual, text = flags(40, (5, 20)), flags(40, (20, 30))
    query, key, value = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    for mask in (
        ModalityMutual(visual, text),
        CompositeModality(visual),
        MixedBidirectionalVision.from_visual(visual),
        CandidateIsolation.from_lengths(10, [15, 15]),
        Sharded(3, 2, 2, places=torch.arange(40)),
    ):
        whole = attention(query, key, value, mask=mask, backend="tiled")
        last = attention(query[:, :, 33:], key, value, mask=mask, backend="tiled")
        torch.testing.assert_close(last, whole[:, :, 33:])


FLAGS = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sharded(0, 1, 1), "block_size 0"),
        (lambda: Sharded(4, 1, 0), "stride 0"),
        (lambda: Sharded(4, 1, 2, -1), "head_step -1"),
        (lambda: Sharded(4, 1, 2, places=torch.zeros(3)), "torch.float32"),
        (lambda: Sharded(4, 1, 2, group=2).validate(1, 3, 5, 5), "3 heads in groups of 2"),
        (lambda: Sharded(4, 1, 2, places=torch.arange(3)).validate(1, 1, 5, 5), "5 keys"),
        (lambda: LocalBlocks(4, 0), "blocks 0"),
        (lambda: ModalityMutual(FLAGS, FLAGS.int()), "text of shape .* torch.int32"),
        (lambda: ModalityMutual(FLAGS, FLAGS).validate(1, 1, 3, 3), "3 keys"),
        (lambda: CompositeModality(FLAGS).validate(1, 1, 3, 2), "3 queries for 2 keys"),
        (lambda: MixedBidirectionalVision(FLAGS), "from_visual"),
        (lambda: MixedBidirectionalVision.from_visual(FLAGS.int()), "visual of shape"),
        (lambda: CausalCross(0, 1, 1), "queries 0"),
        (lambda: CausalCross(1, 0, 1), "frames 0"),
        (lambda: CausalCross(4, 3, 2).validate(1, 1, 4, 5), "4 queries and 5 keys, made for 4 and 6"),
        (lambda: CausalCross(4, torch.tensor([3]), 2), "without keys"),
        (lambda: CausalCross(4, torch.tensor([3.0]), 2, 6), "torch.float32"),
        (lambda: CausalCross(4, torch.tensor([3]), 2, 6).validate(2, 1, 4, 6), "1 entries for a batch of 2"),
        (lambda: CandidateIsolation(torch.tensor([0, 1]), "bow"), "pattern 'bow'"),
        (lambda: CandidateIsolation(FLAGS), "torch.bool"),
        (lambda: CandidateIsolation(torch.tensor([0, 1])).validate(1, 1, 3, 3), "3 keys"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
