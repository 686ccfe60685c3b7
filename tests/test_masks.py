"""ModuleMasks: the exact selection under a budget, files, and the picture."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from model_zoo import tiny_model

from pymape.masks import ModuleMasks
from pymape.model_layout import ModelLayout, find_layers, layout

LAYOUT = ModelLayout(
    model_type="bert",
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=3,
    filters=4,
    head_cost=5,
    filter_cost=2,
    fingerprint="0123456789abcdef" * 4,
)  # 2 x (2 groups of 5 + 4 filters of 2) = 36 parameters


def bits(count: int) -> torch.Tensor:
    """All subsets of `count` modules, [2^count, count]."""
    return ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).bool()


@pytest.mark.parametrize("budget", [0.05, 0.1, 1 / 3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_selection_is_the_exact_optimum(budget: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small integers make ties common, and about a third of the scores are negative.
    scores = torch.randint(-2, 6, (2, 6), generator=generator).double()
    masks = ModuleMasks.from_scores(scores[:, :2] * (1 + seed % 3), scores[:, 2:], LAYOUT, budget)

    subsets = bits(12).view(-1, 2, 6)
    values = scores.clone()
    values[:, :2] *= 1 + seed % 3
    costs = (subsets * torch.tensor([5, 5, 2, 2, 2, 2])).sum((1, 2))
    best = (subsets * values).sum((1, 2))[costs <= budget * 36].max()
    found = torch.cat([masks.head_groups, masks.filters], dim=1)
    assert (found * values).sum() == best
    assert masks.cost() <= budget
    assert not (found & (values <= 0)).any()


def test_budget_is_exact_for_decimal_shares() -> None:
    # 0.3 * 10 is 3 parameters, though 0.1 + 0.2 > 0.3 in floating point.
    shape = replace(LAYOUT, layers=1, heads=1, kv_heads=1, filters=9, head_cost=1, filter_cost=1)
    for tenths in range(1, 11):
        masks = ModuleMasks.from_scores(torch.ones(1, 1), torch.ones(1, 9), shape, tenths / 10)
        assert int(masks.heads.sum() + masks.filters.sum()) == tenths


def test_ties_go_to_the_lowest_index() -> None:
    masks = ModuleMasks.from_scores(torch.zeros(2, 2), torch.ones(2, 4), LAYOUT, 10 / 36)
    assert masks.filters.tolist() == [[True] * 4, [True, False, False, False]]


def test_scores_must_be_finite_and_fit() -> None:
    with pytest.raises(ValueError, match=r"head_scores must have shape \(2, 2\), got \(2, 4\)"):
        ModuleMasks.from_scores(torch.ones(2, 4), torch.ones(2, 4), LAYOUT, 0.5)
    with pytest.raises(ValueError, match="scores must be finite, got 1 NaN"):
        ModuleMasks.from_scores(torch.ones(2, 2), torch.tensor([[1, 1, 1, torch.nan], [1.0] * 4]), LAYOUT, 0.5)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan")])
def test_budget_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match=rf"budget must lie in \(0, 1\], got {budget}"):
        ModuleMasks.random(LAYOUT, budget)


def test_random_masks_fill_the_budget_evenly() -> None:
    shape = replace(LAYOUT, layers=3, filters=63)
    masks = [ModuleMasks.random(shape, 0.3, seed) for seed in range(40)]
    assert torch.equal(masks[0].filters, ModuleMasks.random(shape, 0.3, 0).filters)
    assert not torch.equal(masks[0].filters, masks[1].filters)
    assert all(0.3 - 2 / shape.total_cost < mask.cost() <= 0.3 for mask in masks)
    for kind in ("heads", "filters"):
        share = torch.stack([getattr(mask, kind).double().mean() for mask in masks]).mean()
        assert abs(share - 0.3) < 0.06, kind


def test_everything() -> None:
    masks = ModuleMasks.everything(LAYOUT)
    assert masks.heads.all()
    assert masks.filters.all()
    assert masks.cost() == 1.0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_magnitude_finds_the_largest_weights(family: str) -> None:
    model = tiny_model(family)
    shape = layout(model)
    layer = find_layers(model)[1]
    with torch.no_grad():
        for owned in (layer.head_slices(torch.tensor([1])), layer.filter_slices(torch.tensor([3, 17]))):
            for module, name, dim, index in owned:
                getattr(module, name).index_fill_(dim, index, 100.0)
    budget = (shape.head_cost + 2 * shape.filter_cost) / shape.total_cost
    masks = ModuleMasks.magnitude(model, budget + 1e-9)
    assert masks.head_groups.nonzero().tolist() == [[1, 1]]
    assert masks.filters.nonzero().tolist() == [[1, 3], [1, 17]]


def test_masks_must_fit_the_layout() -> None:
    heads, filters = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"heads must have shape \(2, 4\), got \(2, 2\)"):
        ModuleMasks(heads[:, :2], filters, LAYOUT)
    with pytest.raises(ValueError, match=r"filters must be bool, got torch\.float32"):
        ModuleMasks(heads, filters.float(), LAYOUT)
    heads[0, 1] = True  # one of the two query heads of a group
    with pytest.raises(ValueError, match="heads must select whole key/value groups of 2"):
        ModuleMasks(heads, filters, LAYOUT)


def test_file_round_trip(tmp_path) -> None:
    masks = ModuleMasks.random(LAYOUT, 0.5, seed=3)
    masks.provenance["note"] = {"J": 0.1 + 0.2}
    path = tmp_path / "new" / "masks.safetensors"
    masks.save(path)
    loaded = ModuleMasks.load(path, LAYOUT)
    assert torch.equal(loaded.heads, masks.heads)
    assert torch.equal(loaded.filters, masks.filters)
    assert loaded.layout == masks.layout
    assert loaded.provenance == masks.provenance
    assert [file.name for file in path.parent.iterdir()] == ["masks.safetensors"]


def test_masks_of_another_model(tmp_path) -> None:
    path = tmp_path / "masks.safetensors"
    ModuleMasks.random(LAYOUT, 0.5).save(path)
    other = layout(tiny_model("bert"))
    with pytest.raises(ValueError, match=f"masks of bert 0123456789ab for bert {other.fingerprint[:12]}"):
        ModuleMasks.load(path, other)
    with pytest.raises(ValueError, match="masks must fit the model"):
        ModuleMasks.load(path, tiny_model("vit"))


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_file(tmp_path, kept: int) -> None:
    path = tmp_path / "masks.safetensors"
    ModuleMasks.random(LAYOUT, 0.5).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"path must be an intact mask file, got .*masks\.safetensors: ") as caught:
        ModuleMasks.load(path)
    assert "\n" not in str(caught.value)


def test_file_of_another_kind(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"heads": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match="format is None"):
        ModuleMasks.load(path)
    save_file({"heads": torch.zeros(2, 4)}, path, {"format": "pymape.masks.1", "layout": "{}", "provenance": "{}"})
    with pytest.raises(ValueError, match="path must be an intact mask file"):
        ModuleMasks.load(path)
    with pytest.raises(FileNotFoundError):
        ModuleMasks.load(tmp_path / "absent.safetensors")


def test_summary_counts() -> None:
    masks = ModuleMasks.from_scores(torch.tensor([[1, 0], [0, 0]]), torch.tensor([[0] * 4, [1, 1, 0, 0]]), LAYOUT, 0.5)
    lines = masks.summary().splitlines()
    assert "2 of 8 heads, 2 of 8 filters: 25.00% of the module parameters (budget 50.00%)" in lines
    assert lines[-2].split() == ["0", "2", "/", "4", "0", "/", "4"]
    assert lines[-1].split() == ["1", "0", "/", "4", "2", "/", "4"]


@pytest.mark.parametrize("layers, heads, filters", [(1, 1, 1), (3, 4, 63), (5, 4, 1300)])
def test_plot_shows_every_selected_module(tmp_path, layers: int, heads: int, filters: int) -> None:
    pytest.importorskip("matplotlib")
    shape = replace(LAYOUT, layers=layers, heads=heads, kv_heads=heads, filters=filters)
    masks = ModuleMasks.random(shape, 0.3)
    figure = masks.plot(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    for axes, mask in ((figure.axes[0], masks.heads), (figure.axes[2], masks.filters)):
        shown = axes.images[0].get_array()
        assert shown.shape[0] == layers
        columns = torch.from_numpy(shown.filled() if hasattr(shown, "filled") else shown)
        pool = -(-mask.shape[1] // columns.shape[1])
        for layer in range(layers):
            touched = sorted({module // pool for module in mask[layer].nonzero().flatten().tolist()})
            assert columns[layer].nonzero().flatten().tolist() == touched
    shares = [bar.get_width() for bar in figure.axes[3].patches]
    assert shares == pytest.approx((100 * masks.filters.double().mean(1)).tolist())


def test_plot_formats(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    ModuleMasks.everything(LAYOUT).plot(tmp_path / "masks.svg")
    assert b"<svg" in (tmp_path / "masks.svg").read_bytes()


def test_masks_need_neither_transformers_nor_matplotlib() -> None:
    code = "import sys, pymape.masks, pymape.search; print({'transformers', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
