"""search: the warm start, the exchange, the other objectives, and bad input."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from model_zoo import tiny_model
from torch import Tensor

from pymape import search
from pymape.importance import Importance
from pymape.masks import ModuleMasks
from pymape.model_layout import ModelLayout, layout

LAYOUT = ModelLayout(
    model_type="bert",
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=3,
    filters=5,
    head_cost=5,
    filter_cost=2,
    fingerprint="0123456789abcdef" * 4,
)  # 2 x (2 x 5 + 5 x 2) = 40 parameters
GROUPED = replace(LAYOUT, heads=6)


def make(samples: int, seed: int, shape: ModelLayout = LAYOUT) -> Importance:
    """Small integer gradients: sums are exact, and ties common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randint(-3, 4, (samples, shape.layers, width), generator=generator).float()

    ids = [f"{seed}-{sample}" for sample in range(samples)]
    return Importance(draw(shape.heads), draw(shape.filters), ids, shape, {"model": "Tiny"})


def weights(kind: str, forget: Importance, normalize: bool = True) -> Tensor:
    """Of the layers in J, [L]."""
    influence = getattr(forget, kind).double().square().mean(0).sum(1)
    return 1 / influence if normalize else torch.ones_like(influence)


def objective(
    heads: Tensor,
    filters: Tensor,
    forget: Importance,
    retain: Importance,
    lam: float,
    across: bool = False,
    first_order: bool = False,
    normalize: bool = True,
) -> Tensor:
    """J of candidate masks [S, L, U], straight from its definition."""

    def loss_change(importance: Importance) -> Tensor:
        change = torch.zeros(len(heads), dtype=torch.float64)
        for kind, mask in (("heads", heads), ("filters", filters)):
            weight = weights(kind, forget, normalize)
            removed = torch.einsum("nlu,slu->snl", getattr(importance, kind).double(), mask.double())
            if first_order:
                change -= (removed.mean(1) * weight).sum(1)
            removed = removed * weight.sqrt()
            removed = removed.sum(2, keepdim=True) if across else removed
            change += removed.square().mean(1).sum(1) / 2
        return change

    return loss_change(forget) - lam * loss_change(retain)


def all_masks() -> tuple[Tensor, Tensor, Tensor]:
    """Every heads [S, 2, 2], filters [S, 2, 5], and their costs [S]."""
    subsets = ((torch.arange(2**14)[:, None] >> torch.arange(14)) & 1).bool()
    heads, filters = subsets[:, :4].view(-1, 2, 2), subsets[:, 4:].view(-1, 2, 5)
    return heads, filters, 5 * heads.sum((1, 2)) + 2 * filters.sum((1, 2))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_reported_objective_is_that_of_the_masks(across: bool, first_order: bool, normalize: bool) -> None:
    forget, retain = make(7, 1), make(11, 2)
    options = {"budget": 0.4, "lam": 0.5, "across_layers": across, "first_order": first_order, "normalize": normalize}
    warm = search(forget=forget, retain=retain, mode="warm", **options)
    greedy = search(forget=forget, retain=retain, **options)

    def value(masks: ModuleMasks) -> float:
        found = objective(masks.heads[None], masks.filters[None], forget, retain, 0.5, across, first_order, normalize)
        return found.item()

    assert warm.provenance["objective_before"] == warm.provenance["objective_after"] == pytest.approx(value(warm))
    assert greedy.provenance["objective_before"] == pytest.approx(value(warm))
    assert greedy.provenance["objective_after"] == pytest.approx(value(greedy))
    assert greedy.provenance["swaps"] > 0
    assert value(greedy) > value(warm)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_warm_start_is_the_diagonal_optimum(seed: int, first_order: bool) -> None:
    forget, retain = make(5, seed), make(8, seed + 100)
    masks = search(forget=forget, retain=retain, mode="warm", budget=0.35, lam=0.7, first_order=first_order)

    def score(kind: str) -> Tensor:
        own = (getattr(forget, kind).double() ** 2).mean(0) - 0.7 * (getattr(retain, kind).double() ** 2).mean(0)
        linear = getattr(forget, kind).double().mean(0) - 0.7 * getattr(retain, kind).double().mean(0)
        return (own / 2 - first_order * linear) * weights(kind, forget)[:, None]

    heads, filters, costs = all_masks()
    values = (heads * score("heads")).sum((1, 2)) + (filters * score("filters")).sum((1, 2))
    found = (masks.heads * score("heads")).sum() + (masks.filters * score("filters")).sum()
    assert found.item() == pytest.approx(values[costs <= 0.35 * 40].max().item(), abs=1e-12)
    assert masks.cost() == masks.provenance["used"] <= 0.35


@pytest.mark.parametrize(("normalize", "left"), [(False, 0.5), (True, 0.75)])
def test_gap_to_the_true_optimum(normalize: bool, left: float) -> None:
    """The exchange nearly always reaches the best masks of its counts; what is left of the gap is in the counts."""
    heads, filters, costs = all_masks()
    affordable = costs <= 0.4 * 40
    warm_gaps, gaps, gaps_in_counts = [], [], []
    for seed in range(30):
        forget, retain = make(6, seed), make(9, seed + 100)
        masks = search(forget=forget, retain=retain, budget=0.4, lam=0.5, normalize=normalize)
        values = objective(heads, filters, forget, retain, 0.5, normalize=normalize)
        same_counts = (heads.sum(2) == masks.heads.sum(1)).all(1) & (filters.sum(2) == masks.filters.sum(1)).all(1)
        best, best_in_counts = values[affordable].max().item(), values[same_counts].max().item()
        before, after = masks.provenance["objective_before"], masks.provenance["objective_after"]
        assert before - 1e-9 <= after <= best_in_counts + 1e-9
        warm_gaps.append((best - before) / best)
        gaps.append((best - after) / best)
        gaps_in_counts.append((best_in_counts - after) / best)
    assert sum(gap < 1e-9 for gap in gaps_in_counts) >= 27
    assert max(gaps_in_counts) < 0.05
    assert sum(gaps) < left * sum(warm_gaps)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_single_swap_improves(seed: int, across: bool) -> None:
    forget, retain = make(6, seed), make(9, seed + 100)
    masks = search(forget=forget, retain=retain, budget=0.4, lam=0.5, across_layers=across)
    start = objective(masks.heads[None], masks.filters[None], forget, retain, 0.5, across).item()
    for kind in ("heads", "filters"):
        mask = getattr(masks, kind)
        places = list(itertools.product(range(2), range(mask.shape[1])))
        for one, other in itertools.product(places, places):
            if mask[one] and not mask[other] and (across or one[0] == other[0]):
                swapped = {"heads": masks.heads.clone(), "filters": masks.filters.clone()}
                swapped[kind][one], swapped[kind][other] = False, True
                value = objective(swapped["heads"][None], swapped["filters"][None], forget, retain, 0.5, across)
                assert value.item() <= start + 1e-9


def test_exchange_keeps_the_counts() -> None:
    forget, retain = make(6, 3), make(9, 103)
    warm = search(forget=forget, retain=retain, mode="warm", budget=0.4, lam=0.5)
    layered = search(forget=forget, retain=retain, budget=0.4, lam=0.5)
    across = search(forget=forget, retain=retain, budget=0.4, lam=0.5, across_layers=True)
    for kind in ("heads", "filters"):
        assert torch.equal(getattr(layered, kind).sum(1), getattr(warm, kind).sum(1))
        assert getattr(across, kind).sum() == getattr(warm, kind).sum()
    assert not torch.equal(across.filters.sum(1), warm.filters.sum(1))


def test_max_swaps() -> None:
    forget, retain = make(6, 0, replace(LAYOUT, filters=63)), make(9, 1, replace(LAYOUT, filters=63))
    reached = [
        search(forget=forget, retain=retain, budget=0.4, max_swaps=swaps).provenance["objective_after"]
        for swaps in (0, 1, 2, 400)
    ]
    assert reached == sorted(reached)
    assert reached[0] < reached[1] < reached[2] < reached[3]
    masks = search(forget=forget, retain=retain, budget=0.4, max_swaps=2)
    assert max(masks.provenance["blocks"]["filters"]["swaps"]) == 2


@pytest.mark.parametrize("mode", ["greedy", "rearrange"])
@pytest.mark.parametrize("across", [False, True])
def test_backends_agree_and_repeat(mode: str, across: bool) -> None:
    shape = replace(LAYOUT, filters=63)
    forget, retain = make(6, 0, shape), make(9, 1, shape)
    options = {"forget": forget, "retain": retain, "budget": 0.3, "lam": 0.5, "mode": mode, "across_layers": across}
    options["normalize"] = not across  # weighted gradients are no integers
    first, second, plain = (search(**options, backend=backend) for backend in ("auto", "cpu", "reference"))
    for masks in (second, plain):
        assert torch.equal(masks.heads, first.heads)
        assert torch.equal(masks.filters, first.filters)
        assert masks.provenance == first.provenance


def test_layers_count_alike() -> None:
    """The scale of a layer's gradients decides nothing; without normalising, the layer with larger ones takes all."""
    forget, retain = make(6, 0, replace(LAYOUT, filters=63)), make(9, 1, replace(LAYOUT, filters=63))
    scaled = [replace(x, heads=x.heads.clone(), filters=x.filters.clone()) for x in (forget, retain)]
    for importance in scaled:
        for gradients in (importance.heads, importance.filters):
            gradients[:, 1] *= 16
    options = {"budget": 0.2, "lam": 0.5}
    masks, same = search(forget=forget, retain=retain, **options), search(forget=scaled[0], retain=scaled[1], **options)
    assert torch.equal(masks.heads, same.heads)
    assert torch.equal(masks.filters, same.filters)
    assert masks.provenance["objective_after"] == pytest.approx(same.provenance["objective_after"])
    assert (masks.filters.sum(1) > 0).all()
    plain = search(forget=scaled[0], retain=scaled[1], normalize=False, **options)
    assert not plain.heads[0].any()
    assert not plain.filters[0].any()


def test_normalising_changes_nothing_where_the_budget_holds_everything_worth_selecting() -> None:
    forget, retain = make(6, 0), make(9, 1)
    forget.heads[:, 1] = forget.filters[:, 1] = 0.0  # a layer that the forget set does not use
    masks, plain = (search(forget=forget, retain=retain, budget=1.0, mode="warm", normalize=x) for x in (True, False))
    assert torch.equal(masks.heads, plain.heads)
    assert torch.equal(masks.filters, plain.filters)
    assert masks.filters[0].any()
    assert not masks.filters[1].any()


def test_half_precision_importance_selects_the_same() -> None:
    forget, retain = make(6, 0), make(9, 1)
    halves = [replace(x, heads=x.heads.bfloat16(), filters=x.filters.bfloat16()) for x in (forget, retain)]
    full = search(forget=forget, retain=retain, budget=0.4, lam=0.5)
    half = search(forget=halves[0], retain=halves[1], budget=0.4, lam=0.5)
    assert torch.equal(full.filters, half.filters)
    assert full.provenance["objective_after"] == half.provenance["objective_after"]


def test_grouped_queries_are_one_module() -> None:
    forget, retain = make(6, 2, GROUPED), make(9, 3, GROUPED)
    masks = search(forget=forget, retain=retain, budget=0.4, lam=0.5)
    units = [replace(x, heads=x.heads.unflatten(2, (2, 3)).sum(3), layout=LAYOUT) for x in (forget, retain)]
    expected = search(forget=units[0], retain=units[1], budget=0.4, lam=0.5)
    assert torch.equal(masks.heads, expected.heads.repeat_interleave(3, dim=1))
    assert torch.equal(masks.filters, expected.filters)
    assert 0 < int(masks.head_groups.sum()) < 4
    assert masks.provenance["objective_after"] == expected.provenance["objective_after"]


def test_rearrangement_follows_the_forget_gradients() -> None:
    shape = replace(LAYOUT, filters=63)
    forget, retain = make(6, 0, shape), make(9, 1, shape)
    masks = search(forget=forget, retain=retain, budget=0.3, objective="forget", mode="rearrange")
    warm = search(forget=forget, budget=0.3, objective="forget", mode="warm")
    assert masks.provenance["swaps"] > 0

    def left_over(mask: Tensor) -> float:
        """Norm of the summed gradients of what is not selected, which the procedure keeps small."""
        return (forget.filters * ~mask).sum(2).square().sum().item()

    assert left_over(masks.filters) < left_over(warm.filters)


def test_what_selects_nothing_is_said() -> None:
    forget, retain = make(8, 0), make(8, 1)
    ratios = [getattr(forget, f"fisher_{kind}") / getattr(retain, f"fisher_{kind}") for kind in ("heads", "filters")]
    most = max(float(ratio.max()) for ratio in ratios)
    assert search(forget=forget, retain=retain, budget=1.0, lam=0.99 * most).cost() > 0
    with pytest.raises(ValueError, match=rf"lam must be below {most:.3g} to select at least one head or filter, got "):
        search(forget=forget, retain=retain, budget=1.0, lam=1.01 * most)
    with pytest.raises(ValueError, match="lam must be smaller to select at least one head or filter, got 1e"):
        search(forget=forget, retain=retain, lam=1e9, first_order=True)
    with pytest.raises(ValueError, match="budget must afford at least one head or filter, got 1e-06"):
        search(forget=forget, retain=retain, lam=0.0, budget=1e-6)


def test_forget_objective_is_lam_zero() -> None:
    forget, retain = make(6, 0), make(9, 1)
    alone = search(forget=forget, objective="forget", budget=0.4)
    both = search(forget=forget, retain=retain, lam=0.0, budget=0.4)
    assert torch.equal(alone.heads, both.heads)
    assert torch.equal(alone.filters, both.filters)
    assert alone.provenance["objective_after"] == both.provenance["objective_after"]


def test_ratio_ranks_modules_of_both_kinds() -> None:
    forget, retain = make(6, 0), make(9, 1)
    retain.filters[:, 1, 2] = 0.0  # the retain set does not use this filter: its ratio is large, not infinite
    masks = search(forget=forget, retain=retain, objective="ratio", budget=0.4)
    ratios = {
        kind: getattr(forget, f"fisher_{kind}") / getattr(retain, f"fisher_{kind}") for kind in ("heads", "filters")
    }
    assert masks.filters[1, 2]
    for kind, ratio in ratios.items():
        chosen = getattr(masks, kind)
        if chosen.any():
            assert ratio[chosen].min() >= ratio[~chosen].max()
    assert "objective_after" not in masks.provenance


def test_random_and_magnitude() -> None:
    forget = make(3, 0)
    masks = search(forget=forget, objective="random", budget=0.4, seed=5)
    assert torch.equal(masks.filters, ModuleMasks.random(LAYOUT, 0.4, 5).filters)
    model = tiny_model("vit")
    shape = layout(model)
    masks = search(forget=make(3, 0, shape), objective="magnitude", budget=0.4, model=model)
    assert torch.equal(masks.filters, ModuleMasks.magnitude(model, 0.4).filters)
    assert masks.provenance["objective"] == "magnitude"


def test_provenance_survives_a_file(tmp_path) -> None:
    forget, retain = make(6, 0), make(9, 1)
    masks = search(forget=forget, retain=retain, budget=0.4, lam=0.5)
    assert masks.provenance["forget"] == {"records": 6, "fingerprint": forget.fingerprint, "model": "Tiny"}
    assert masks.provenance["retain"]["records"] == 9
    assert masks.provenance == json.loads(json.dumps(masks.provenance))
    masks.save(tmp_path / "masks.safetensors")
    loaded = ModuleMasks.load(tmp_path / "masks.safetensors", LAYOUT)
    assert loaded.provenance == masks.provenance
    assert f"{masks.provenance['swaps']} swaps" in loaded.summary()


BAD = {
    "budget": (0.0, r"budget must lie in \(0, 1\], got 0\.0"),
    "objective": ("best", "objective must be one of difference, .*, got 'best'"),
    "mode": ("fast", "mode must be one of greedy, warm, rearrange, got 'fast'"),
    "lam": (-1.0, r"lam must be finite and >= 0, got -1\.0"),
    "max_swaps": (-1, "max_swaps must be >= 0, got -1"),
    "retain": (None, "retain must be an Importance for objective 'difference', got None"),
    "backend": ("fpga", "backend of greedy_swap must be one of .*, got 'fpga'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        search(**{"forget": make(3, 0), "retain": make(3, 1), name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_bad_importance(name: str) -> None:
    def run(broken: Importance) -> None:
        search(**{"forget": make(3, 0), "retain": make(3, 1), name: broken})

    with pytest.raises(ValueError, match=f"{name} importance must hold at least one record, got none"):
        run(make(0, 2))
    for value in (torch.nan, torch.inf):
        broken = make(3, 2)
        broken.filters[1, 0, 3] = value
        with pytest.raises(
            ValueError, match=f"{name} importance must be finite, got NaN or infinite gradients of filters"
        ):
            run(broken)
    with pytest.raises(ValueError, match="retain must be of the same model as forget"):
        run(make(3, 2, replace(LAYOUT, fingerprint="f" * 64)))


def test_model_must_fit() -> None:
    with pytest.raises(ValueError, match="model must be of the same model as forget, bert 0123456789ab, got vit"):
        search(forget=make(3, 0), objective="random", model=tiny_model("vit"))
    with pytest.raises(ValueError, match="model must be the model itself for objective 'magnitude', got NoneType"):
        search(forget=make(3, 0), objective="magnitude")
    with pytest.raises(ValueError, match="mode 'rearrange' needs objective 'difference' or 'forget', got 'random'"):
        search(forget=make(3, 0), objective="random", mode="rearrange")
