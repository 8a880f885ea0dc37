"""What the heads of a model look at. "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", Li
et al., 2023, arXiv 2303.13731.

    strength   s_h(k) = mean over samples and queries i of Σ_{j: d(i, j) = k} A^h_ij
               d(i, j) = max(|row_i − row_j|, |column_i − column_j|) hops between patches, |i − j| between words
    importance the loss without a head less that of the whole model, beside I_h: `regard.inspect.head_importance`
    patterns   an autoencoder learns the maps A^h of all heads and samples, their latent vectors z are clustered, and a
               head has the pattern that most of its maps are in

Cost: time and memory of all attention maps of one site at a time, O(B H N²), and of an autoencoder on B H L maps of
`size`² numbers; importance takes a forward pass per head.

Differences: the paper's abstract and the task's one line are what could be read. Ours are the hops, maps pooled to
size × size and divided by their largest value, one hidden layer on each side of z, k-means, and means in place of the
paper's views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn import functional as F

from regard.inspect.attention_sinks import real_keys
from regard.inspect.head_importance import HeadImportance, Loss, head_importance
from regard.inspect.plotting import plotly
from regard.ops.checks import require
from regard.sites import AttentionCall, Site, attach

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "head_profile"
_HIDDEN, _LATENT, _STEPS, _RATE = 64, 2, 400, 5e-3
_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Patterns:
    """Attention maps in clusters.

    Attributes:
        cluster: of each map, numbered from the largest cluster.
        latent: z of each map.
        centers: the mean map of each cluster.
        error: what the autoencoder gets wrong, as a share of the variance of the maps.
    """

    cluster: Int[Tensor, " maps"]
    latent: Float[Tensor, "maps latent"]
    centers: Float[Tensor, "clusters size size"]
    error: float


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """How far, in which patterns and to what effect each head attends.

    Attributes:
        sites: the sites of self-attention, in the order of the model's modules.
        strength: s_h(k) of each site for k = 0, 1, 2, …
        special: for each site and head the attention that special tokens before the patches receive.
        heads: for each site and head the number of its pattern.
        patterns: the clusters of all maps: of each site in turn those of each sample, and of each of its heads.
        importance: of the heads, where a loss was given.
    """

    sites: tuple[Site, ...]
    strength: tuple[Float[Tensor, "heads hops"], ...]
    special: tuple[Float[Tensor, " heads"], ...]
    heads: tuple[Int[Tensor, " heads"], ...]
    patterns: Patterns
    importance: HeadImportance | None = None

    def distance(self, site: int) -> Float[Tensor, " heads"]:
        """Mean distance of each head's attention, without what goes to special tokens."""
        strength = self.strength[site]
        return (strength * torch.arange(strength.shape[1])).sum(1) / strength.sum(1)

    def table(self) -> Table:
        """A row for each site."""
        columns = ("mean distance", "least", "most", "patterns of heads")
        columns = (*columns, *(() if self.importance is None else ("most important",)))
        title = f"head profile, {len(self.patterns.centers)} patterns"
        table = Table(Column("site", overflow="fold"), *columns, title=title, title_justify="left", box=SIMPLE_HEAD)
        for place, site in enumerate(self.sites):
            distance = self.distance(place)
            row = [f"{value:.2f}" for value in (distance.mean(), distance.min(), distance.max())]
            row.append(" ".join(map(str, self.heads[place].tolist())))
            if self.importance is not None:
                found = dict(zip((each.name for each in self.importance.sites), self.importance.scores, strict=True))
                row.append(str(int(found[site.name].argmax())))
            table.add_row(site.name, *row)
        return table

    def figure(self) -> Figure:
        """Strength over distance for every layer, mean distance and pattern of every head, and the patterns."""
        _, make_subplots = plotly("HeadProfile.figure")
        names, centers = [site.name for site in self.sites], self.patterns.centers
        columns = max(3, len(centers))
        titles = ["strength over distance", "mean distance", "pattern", *[""] * (columns - 3)]
        titles += [f"pattern {number}" for number in range(len(centers))]
        chart = make_subplots(2, columns, subplot_titles=titles)
        for name, strength in zip(names, self.strength, strict=True):
            chart.add_scatter(y=strength.mean(0).tolist(), name=name, row=1, col=1)
        distances = [self.distance(place).tolist() for place in range(len(names))]
        for column, values in ((2, distances), (3, [heads.tolist() for heads in self.heads])):
            chart.add_heatmap(z=values, y=names, showscale=False, row=1, col=column)
        for column, center in enumerate(centers.tolist(), 1):
            chart.add_heatmap(z=center, showscale=False, row=2, col=column)
            chart.update_yaxes(autorange="reversed", row=2, col=column)
        return chart.update_layout(template="simple_white")


def head_profile(
    model: nn.Module,
    data: Mapping[str, Any],
    *,
    grid: tuple[int, int] | None = None,
    patterns: int = 6,
    size: int = 16,
    seed: int = 0,
    loss: Loss | None = None,
) -> HeadProfile:
    """Attention strength by distance, patterns, and on request importance, of every head of self-attention.

    Args:
        model: any model that `sites.attach` reaches.
        data: the arguments of its forward pass.
        grid: rows and columns of an image's patches, which are the last of the tokens; None for text.
        patterns: how many clusters of maps.
        size: what maps are pooled to, or their own length if that is less; at most one size for all sites.
        seed: of the autoencoder and the clusters.
        loss: ``loss(model, data)``, as of `head_importance`, for the importance of the heads.

    Raises ValueError for tokens that are not the grid, for fewer maps than patterns, and without self-attention.
    """
    found: list[tuple[Site, Tensor, Tensor, Tensor]] = []

    def measure(call: AttentionCall) -> AttentionCall:
        if call.site.kind == "self":
            found.append((call.site, *_measure(call, grid, size)))
        return call

    with torch.no_grad(), attach(model, measure):
        model(**data)
    require(bool(found), _OWNER, "no self-attention came through the door", "see sites.find(model).table()")
    sites, strength, special, maps = zip(*found, strict=True)
    width = min(each.shape[-1] for each in maps)
    pooled = [F.adaptive_avg_pool2d(each, width) for each in maps]
    clusters = attention_patterns(torch.cat([each.flatten(0, 1) for each in pooled]), patterns=patterns, seed=seed)
    of_sites = clusters.cluster.split([each.shape[0] * each.shape[1] for each in pooled])
    heads = tuple(of.view(each.shape[:2]).mode(0).values for of, each in zip(of_sites, pooled, strict=True))
    importance = None if loss is None else head_importance(model, [data], loss, ablate=True)
    return HeadProfile(sites, strength, special, heads, clusters, importance)


def attention_patterns(maps: Float[Tensor, "maps size size"], *, patterns: int = 6, seed: int = 0) -> Patterns:
    """Clusters of maps by the latent vectors of an autoencoder: the same for the same seed, on the CPU.

    Maps are divided by their largest value. Raises ValueError for fewer maps than patterns.
    """
    ways = "give fewer patterns or more data"
    require(0 < patterns <= len(maps), _OWNER, f"{patterns} patterns of {len(maps)} maps", ways)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    rows = (maps - maps.mean(0)).flatten(1)
    # The generator of the process is left as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encoder, decoder = (
            nn.Sequential(nn.Linear(first, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, last))
            for first, last in ((rows.shape[1], _LATENT), (_LATENT, rows.shape[1]))
        )
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            F.mse_loss(decoder(encoder(rows)), rows).backward()
            optimizer.step()
    with torch.no_grad():
        latent = encoder(rows)
        error = F.mse_loss(decoder(latent), rows) / rows.square().mean().clamp(min=torch.finfo(rows.dtype).tiny)
    cluster = _k_means(latent, patterns, torch.Generator().manual_seed(seed))
    centers = torch.stack([maps[cluster == number].mean(0) for number in range(int(cluster.max()) + 1)])
    return Patterns(cluster, latent, centers, error.item())


def _k_means(points: Float[Tensor, "points width"], count: int, random: torch.Generator) -> Int[Tensor, " points"]:
    """Lloyd's clusters from k-means++ seeds, numbered from the largest; clusters that end up empty are left out."""
    points = (points - points.mean(0)) / points.std(0, correction=0).clamp(min=1e-6)
    centers = points[torch.randint(len(points), (1,), generator=random)]
    while len(centers) < count:
        away = torch.cdist(points, centers).amin(1).square() + 1e-12
        centers = torch.cat([centers, points[torch.multinomial(away, 1, generator=random)]])
    nearest = torch.cdist(points, centers).argmin(1)
    for _ in range(_ROUNDS):
        members = F.one_hot(nearest, count).to(points.dtype)
        sizes = members.sum(0)[:, None]
        centers = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centers)
        nearest = torch.cdist(points, centers).argmin(1)
    order = torch.bincount(nearest, minlength=count).argsort(descending=True, stable=True)
    return order.argsort()[nearest]


def _measure(call: AttentionCall, grid: tuple[int, int] | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Strength (heads, hops), attention to special tokens (heads,) and maps (samples, heads, size, size)."""
    length = call.keys
    require(call.queries == length, _OWNER, f"{call.queries} queries of {length} keys", "give whole sequences")
    patches = length if grid is None else grid[0] * grid[1]
    way_out = "give the rows and columns of the patches"
    require(0 < patches <= length, _OWNER, f"grid {grid} and {length} tokens at {call.site.name}", way_out)
    before = length - patches
    real = real_keys(call)[:, before:].cpu()
    places = torch.arange(patches)[:, None] if grid is None else torch.cartesian_prod(*map(torch.arange, grid))
    hops = (places[:, None] - places).abs().amax(-1)

    weights = torch.cat([call.weights(rows) for rows in call.tiles()], 2)[:, :, before:].float().cpu()
    asked = weights * real[:, None, :, None]
    received = asked[..., before:].sum(0).flatten(1)
    strength = weights.new_zeros(weights.shape[1], int(hops.max()) + 1).index_add(1, hops.flatten(), received)
    special = asked[..., :before].sum((0, 2, 3))
    return strength / real.sum(), special / real.sum(), _pooled(weights[..., before:], real, size)


def _pooled(
    weights: Float[Tensor, "samples heads patches patches"], real: Bool[Tensor, "samples patches"], size: int
) -> Float[Tensor, "samples heads size size"]:
    """Maps of the real tokens of each sample, pooled to one size: that of the shortest if it is less."""
    size = min(size, int(real.sum(1).min()))
    cut = [sample[:, kept][:, :, kept] for sample, kept in zip(weights, real, strict=True)]
    return torch.stack([F.adaptive_avg_pool2d(each, size) for each in cut])
