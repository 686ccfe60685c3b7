"""Membership attacks: every score and AUC against values worked out by hand, and attacks that cannot tell."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from metrics_tools import token_scores
from scipy.stats import norm

from pymape.metrics import (
    lira_scores,
    membership_auc,
    membership_aucs,
    min_k_plus_plus_scores,
    min_k_scores,
    modified_entropies,
    privleak,
    reference_scores,
    scaled_confidences,
    zlib_scores,
)


def test_auc_counts_the_pairs_in_order() -> None:
    assert membership_auc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1
    assert membership_auc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 0
    # Pairs (member < stranger): (1, 2), (1, 4), (3, 4) of 4.
    assert membership_auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])) == 0.75
    assert membership_auc(torch.full((3,), 0.5), torch.full((5,), 0.5)) == 0.5
    with pytest.raises(ValueError, match="members must hold at least one score"):
        membership_auc(torch.tensor([]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="non_members must be finite, got 1 non-finite"):
        membership_auc(torch.tensor([1.0]), torch.tensor([torch.inf]))


def test_min_k_takes_the_least_likely_tokens() -> None:
    scores = token_scores([[-1.0, -5.0, -2.0, -4.0, -3.0], [-7.0], [-1.0, -2.0]])
    # A share of 0.4 of 5 tokens is 2, of 1 and 2 tokens at least 1.
    assert min_k_scores(scores).tolist() == [4.5, 7.0, 2.0]
    assert min_k_scores(scores, 1.0).tolist() == [3.0, 7.0, 1.5]
    assert min_k_scores(scores, 0.59).tolist() == [4.5, 7.0, 2.0]


def test_min_k_plus_plus_is_relative_to_the_vocabulary() -> None:
    scores = token_scores([[-1.0, -5.0, -2.0, -4.0, -3.0], [-7.0]])
    z = [(value + 2.0) / 0.5 for value in (-5.0, -4.0)]
    assert min_k_plus_plus_scores(scores).tolist() == [-sum(z) / 2, 10.0]
    scores.stds.zero_()
    assert min_k_plus_plus_scores(scores)[1].item() == pytest.approx(5000)


@pytest.mark.parametrize("attack", [min_k_scores, min_k_plus_plus_scores])
@pytest.mark.parametrize("k", [0.0, 1.5, -1.0, math.nan])
def test_k_is_a_share(attack: Any, k: float) -> None:
    with pytest.raises(ValueError, match=r"k must be in \(0, 1\], got"):
        attack(token_scores([[-1.0]]), k)


def test_zlib_and_reference_scores() -> None:
    scores = token_scores([[-1.0, -3.0], [-4.0]], text_bytes=torch.tensor([8, 16]))
    assert zlib_scores(scores).tolist() == [0.25, 0.25]
    assert reference_scores(scores, token_scores([[-1.0], [-6.0, -4.0]])).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="scores must have text_bytes"):
        zlib_scores(token_scores([[-1.0]]))
    with pytest.raises(ValueError, match="reference must be of the same 2 records in the same order"):
        reference_scores(scores, token_scores([[-1.0], [-1.0]], prefix="x"))


def test_aucs_of_all_attacks() -> None:
    def scores(losses: list[float], prefix: str, **optional: torch.Tensor) -> Any:
        count = len(losses)
        optional = {"text_bytes": torch.full((count,), 10), "gradient_norms": torch.tensor(losses)} | optional
        return token_scores([[-loss] * 3 for loss in losses], prefix=prefix, **optional)

    forget, holdout = scores([1.0, 3.0], "f"), scores([2.0, 4.0], "t")
    reference = scores([2.0, 5.0], "f"), scores([2.0, 4.0], "t")
    found = membership_aucs(forget, holdout, reference=reference)
    names = ["loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm"]
    assert found == {f"mia_{name}": 0.75 for name in names} | {"mia_reference": 1.0}
    alike = membership_aucs(scores([1.0] * 3, "f"), scores([1.0] * 4, "t"))
    assert set(alike.values()) == {0.5}


def test_min_k_leaves_the_end_of_the_text_out() -> None:
    forget = token_scores([[-1.0, -9.0], [-1.0, -9.0]])
    holdout = token_scores([[-2.0, -1.0], [-2.0, -1.0]], prefix="t")
    assert membership_aucs(forget, holdout)["mia_min_k"] == 0
    without = membership_aucs(forget, holdout, end_token=7)
    assert without["mia_min_k"] == without["mia_min_k_plus_plus"] == 1
    assert without["mia_loss"] == 0


def test_privleak_is_relative_to_the_retrained_model() -> None:
    assert privleak(0.981, 0.5) == pytest.approx(-96.2)
    assert privleak(0.6, 0.6) == 0
    assert privleak(0.2, 0.6) == pytest.approx(100)
    assert privleak(0.7, 0.6) < 0 < privleak(0.5, 0.6)
    assert math.isnan(privleak(0.5, 1.0))
    with pytest.raises(ValueError, match=r"auc must be in \[0, 1\], got 1.5"):
        privleak(1.5, 0.5)


def test_scaled_confidence_keeps_its_digits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), 0.0], [100.0, 0.0, 0.0], [0.0, 100.0, 0.0]])
    expected = [math.log(3 / 2), 100 - math.log(2), -100.0]
    found = scaled_confidences(logits, torch.tensor([1, 0, 0]))
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_modified_entropy_knows_the_label() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    expected = -(0.5 * math.log(0.5) + 0.3 * math.log(0.7) + 0.2 * math.log(0.8))
    logits = torch.log(p)[None]
    assert modified_entropies(logits, torch.tensor([0])).item() == pytest.approx(expected)
    sure = torch.tensor([[50.0, 0.0]])
    right, wrong = (modified_entropies(sure, torch.tensor([label])).item() for label in (0, 1))
    assert 0 <= right < 1e-18
    assert wrong == pytest.approx(100, rel=1e-6)


def test_lira_is_a_one_sided_test_against_the_shadows() -> None:
    shadows = torch.tensor([[0.0, 4.0], [2.0, 8.0]])  # means 1 and 6, pooled variance (2 + 8) / 2
    target = torch.tensor([1.0, 6.0 + 2 * math.sqrt(5)])
    expected = norm.logsf([0.0, 2.0])
    torch.testing.assert_close(lira_scores(target, shadows), torch.tensor(expected), rtol=1e-6, atol=0)


def test_lira_finds_members_that_no_threshold_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    difficulty = 10 * torch.randn(200, generator=generator)
    shadows = difficulty + 0.5 * torch.randn(8, 200, generator=generator)
    target = difficulty + 0.5 * torch.randn(200, generator=generator)
    target[:100] += 2
    found = lira_scores(target, shadows)
    assert membership_auc(found[:100], found[100:]) > 0.95
    assert membership_auc(-target[:100], -target[100:]) < 0.7
    assert len(found.unique()) == 200  # no ties from saturation


@pytest.mark.parametrize(
    ("shadows", "message"),
    [
        (torch.zeros(1, 3), r"shadows must have shape \[K >= 2, 3\], got \(1, 3\)"),
        (torch.zeros(3), r"got \(3,\) for \(3,\)"),
        (torch.zeros(2, 4), r"got \(2, 4\)"),
        (torch.ones(2, 3), "shadows must differ between models"),
    ],
)
def test_lira_needs_shadows(shadows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lira_scores(torch.zeros(3), shadows)
