"""TOFU's metrics, verbatim extraction, ROUGE and greedy answers, against values worked out by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metrics_tools import FixedForCausalLM, token_scores
from model_zoo import tiny_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pymape.metrics import (
    AnswerScores,
    QuestionSet,
    answer_records,
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth_ratio,
    generate_answers,
    model_utility,
    option_probabilities,
    record_scores,
    rouge_l_recall,
    score_answers,
    tofu_metrics,
    true_better,
    truth_ratios,
)
from pymape.metrics.generation import answer_text

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "Q:", "A:", "who", "what", "he", "she", "wrote", "sang", "it", "them"]
TEMPLATE = "Q: {question} A: {answer}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with an end-of-text token behind every text."""
    built = Tokenizer(WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def questions() -> QuestionSet:
    return QuestionSet.from_columns(
        {
            "question": ["who wrote it", "what"],
            "answer": ["he wrote it", "it"],
            "paraphrased_answer": ["it he wrote", "them"],
            "perturbed_answer": [["she wrote it", "she sang it them"], ["them he", "who"]],
        }
    )


def test_truth_ratio_is_a_ratio_of_geometric_means() -> None:
    correct = torch.tensor([math.log(2), 1.0])  # probability 1/2 and 1/e
    wrong = torch.tensor([[math.log(4), math.log(16)], [1.0, 1.0]])  # 1/4 and 1/16, of geometric mean 1/8
    torch.testing.assert_close(truth_ratios(correct, wrong), torch.tensor([0.25, 1.0]).double())


def test_aggregates_of_truth_ratios() -> None:
    ratios = torch.tensor([0.5, 4.0, 1.0])
    assert forget_truth_ratio(ratios) == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert true_better(ratios) == pytest.approx(0.5 / 3)
    assert forget_truth_ratio(1 / ratios) == pytest.approx(forget_truth_ratio(ratios))


def test_probability_among_the_options() -> None:
    correct, wrong = -torch.log(torch.tensor([0.3, 0.1])), -torch.log(torch.tensor([[0.1, 0.2], [0.3, 0.1]]))
    torch.testing.assert_close(option_probabilities(correct, wrong), torch.tensor([0.5, 0.2]).double())


@pytest.mark.parametrize("function", [truth_ratios, option_probabilities])
@pytest.mark.parametrize(("correct", "wrong"), [((2,), (3, 1)), ((2,), (2,)), ((0,), (0, 3)), ((2,), (2, 0))])
def test_answers_must_pair_up(function: Any, correct: tuple[int, ...], wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"correct and wrong must have shapes \[N\] and \[N, K\]"):
        function(torch.zeros(correct), torch.zeros(wrong))


def test_forget_quality_is_the_p_value_of_a_ks_test() -> None:
    # Two samples of 4 without overlap: D = 1, and 2 of the C(8, 4) = 70 arrangements are as extreme.
    below, above = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.1, 1.2, 1.3, 1.4])
    assert forget_quality(below, above) == pytest.approx(2 / 70)
    assert forget_quality(1 / below, 1 / above) == pytest.approx(2 / 70)
    assert forget_quality(below, below) == 1
    rng = np.random.default_rng(0)
    same, shifted = (torch.from_numpy(rng.lognormal(mean, size=200)) for mean in (0.0, 1.0))
    assert forget_quality(same, shifted) < 1e-6 < forget_quality(same[:100], same[100:])
    with pytest.raises(ValueError, match="unlearned must be at least one ratio"):
        forget_quality(torch.tensor([]), above)
    with pytest.raises(ValueError, match="retrained must be at least one ratio"):
        forget_quality(below, torch.tensor([torch.nan]))


def test_model_utility_is_a_harmonic_mean() -> None:
    assert model_utility({"a": 0.5, "b": 0.25, "c": 1.0}) == pytest.approx(3 / 7)
    assert model_utility({"a": 0.5, "b": 0.0}) == 0
    with pytest.raises(ValueError, match=r"values must be figures in \[0, 1\], got 1 with \['a'\] outside"):
        model_utility({"a": 1.5})
    with pytest.raises(ValueError, match="got 0 with"):
        model_utility({})


def test_extraction_strength_is_the_longest_right_suffix() -> None:
    hits = [[True, False, True, True], [True] * 3, [True, True, False], [True], [False]]
    scores = token_scores([[-1.0] * len(own) for own in hits], hits=hits)
    assert extraction_strength(scores).tolist() == [0.5, 1, 0, 1, 0]
    torch.testing.assert_close(exact_memorization(scores), torch.tensor([0.75, 1, 2 / 3, 1, 0]).double())


def test_extraction_strength_is_what_greedy_decoding_gives() -> None:
    model = tiny_model("gpt2")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 50, (1, 4), generator=generator)
    said = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    spoilt = [*said[:6], (said[6] + 1) % 47 + 3, *said[7:]]  # its third answer token is another one
    suffix = spoilt[:7]
    rest = model.generate(torch.tensor([suffix]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    data = [
        {"id": name, "input_ids": tokens, "labels": [-100] * 4 + tokens[4:]}
        for name, tokens in (("said", said), ("spoilt", rest[0].tolist()))
    ]
    assert extraction_strength(record_scores(model, data)).tolist() == [1.0, 0.5]


def test_rouge_recall_counts_the_common_subsequence() -> None:
    # "the cats sat" is a subsequence of both after stemming: 3 of the answer's 6 words.
    recall = rouge_l_recall(["the cat and sat", "", "a b"], ["the cats happily sat down there", "a b", "a b"])
    assert recall.tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(ValueError, match="generated must be one text for each answer, got 1 for 2"):
        rouge_l_recall(["a"], ["a", "b"])


def test_rouge_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge_score"):
        rouge_l_recall(["a"], ["a"])


def test_only_the_answer_and_the_end_are_labelled(tokenizer: Any) -> None:
    record = answer_records(tokenizer, ["who wrote it"], ["he wrote it"], ids=["a"], template=TEMPLATE)[0]
    expected = [WORDS.index(word) for word in ["Q:", "who", "wrote", "it", "A:", "he", "wrote", "it", "[EOS]"]]
    assert record["input_ids"] == expected
    assert record["labels"] == [-100] * 5 + expected[5:]
    assert record["attention_mask"] == [1] * 9


def test_what_a_template_puts_behind_the_answer_is_not_labelled(tokenizer: Any) -> None:
    record = answer_records(tokenizer, ["who"], ["he wrote it"], ids=["a"], template=TEMPLATE + " what them")[0]
    words = ["Q:", "who", "A:", "he", "wrote", "it", "what", "them", "[EOS]"]
    assert record["input_ids"] == [WORDS.index(word) for word in words]
    assert record["labels"] == [-100] * 3 + record["input_ids"][3:6] + [-100] * 2 + [WORDS.index("[EOS]")]
    assert answer_text(tokenizer, record) == "he wrote it"
    for empty in ("", " "):
        with pytest.raises(ValueError, match="answers must not be empty, got one with id 'b'"):
            answer_records(tokenizer, ["who", "who"], ["he", empty], ids=["a", "b"], template=TEMPLATE)


def test_a_token_that_reaches_into_the_answer_is_labelled() -> None:
    built = Tokenizer(WordLevel({"Q:": 0, "Ġwho": 1, "ĊA:": 2, "Ġhe": 3, "[UNK]": 4}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "merged_with_next"), pre_tokenizers.Split(" ", "merged_with_next"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]")
    record = answer_records(fast, ["who"], ["he"], ids=["a"], template="Q: {question}\nA: {answer}")[0]
    assert record["input_ids"] == [0, 1, 2, 3]
    assert record["labels"] == [-100, -100, -100, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{question}"}, r"template must hold {question} before {answer}, got '{question}'"),
        ({"template": "{answer} {question}"}, "template must hold"),
        ({"template": "{answer}"}, "template must hold"),
        ({"max_length": 5}, "answers must begin within max_length 5 and after a token, got id 'a'"),
        ({"answers": [float("nan")]}, "answers must be texts, got nan for id 'a'"),
        ({"questions": [None]}, "questions must be texts, got None for id 'a'"),
        ({"ids": ["a", "b"]}, r"questions, answers and ids must be of one length, got \[1, 1, 2\]"),
    ],
)
def test_questions_that_cannot_be_encoded(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    good = {"questions": ["who wrote it"], "answers": ["he"], "ids": ["a"], "template": TEMPLATE}
    with pytest.raises(ValueError, match=message):
        answer_records(tokenizer, **(good | options))


def test_answers_do_not_depend_on_the_other_prompts(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=len(WORDS), seed=1)
    asked = ["who wrote it", "what", "who sang them it"]
    rows = answer_records(tokenizer, asked, ["it"] * 3, ids=["a", "b", "c"], template=TEMPLATE)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)  # greedy all the same
    together = generate_answers(model, tokenizer, rows, max_new_tokens=5)
    alone = [generate_answers(model, tokenizer, [row], max_new_tokens=5)[0] for row in rows]
    assert together == alone
    assert len(set(together)) > 1
    tokens = torch.tensor([rows[0]["input_ids"][:5]])
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        if tokens[0, -1] == 2:
            break
    assert together[0] == tokenizer.decode(tokens[0, 5:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="records must have a token before the first label"):
        generate_answers(model, tokenizer, [{"input_ids": [4, 5], "labels": [4, 5]}])


def test_answers_end_where_the_learned_positions_do() -> None:
    built = Tokenizer(WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]")  # nothing ends a text
    model = tiny_model("gpt2", vocab_size=len(WORDS), max_position_embeddings=12, eos_token_id=None)
    rows = [{"input_ids": [4] * length + [6], "labels": [-100] * length + [6]} for length in (3, 12, 9, 10)]
    said: list[int] = []
    hook = model.transformer.wpe.register_forward_hook(lambda _, inputs, __: said.append(int(inputs[0].max())))
    together = generate_answers(model, tokenizer, rows, max_new_tokens=4)
    hook.remove()
    assert max(said) == 11
    assert together == [generate_answers(model, tokenizer, [row], max_new_tokens=4)[0] for row in rows]
    assert [len(answer.split()) for answer in together] == [4, 1, 4, 3]
    rows.append({"input_ids": [4] * 14, "labels": [-100] * 13 + [4]})
    with pytest.raises(ValueError, match="records must have prompts of at most 12 tokens for this model, got 13"):
        generate_answers(model, tokenizer, rows, max_new_tokens=4)


def test_scores_of_questions(tokenizer: Any, questions: QuestionSet, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(WORDS))
    scores = score_answers(model, tokenizer, questions, template=TEMPLATE, max_new_tokens=4)
    assert scores.answer.counts.tolist() == [4, 2]
    assert scores.perturbed.ids == ["0/0", "0/1", "1/0", "1/1"]
    assert scores.perturbed.counts.tolist() == [4, 5, 3, 2]
    assert scores.paraphrased is not None
    assert scores.rouge is not None
    tokens = [WORDS.index(word) for word in ("Q:", "what", "A:", "it", "[EOS]")]
    said = model(torch.tensor([tokens])).logits.log_softmax(-1)
    expected = -(said[0, 2, tokens[3]] + said[0, 3, tokens[4]]) / 2
    assert scores.answer.loss[1].item() == pytest.approx(expected.item(), rel=1e-5)
    wrong = scores.perturbed.loss
    ratio = math.exp(scores.paraphrased.loss[1] - (wrong[2] + wrong[3]) / 2)
    assert scores.truth_ratios[1].item() == pytest.approx(ratio)
    scores.save(tmp_path / "questions")
    loaded = AnswerScores.load(tmp_path / "questions")
    assert tofu_metrics({"forget": loaded}) == tofu_metrics({"forget": scores})
    without = score_answers(model, tokenizer, questions, template=TEMPLATE, max_new_tokens=0)
    assert without.rouge is None
    AnswerScores(scores.answer, scores.perturbed).save(tmp_path / "questions")
    fewer = AnswerScores.load(tmp_path / "questions")
    assert fewer.paraphrased is None
    assert fewer.rouge is None


def made_up(answer: float, wrong: float, paraphrased: float | None, rouge: float | None) -> AnswerScores:
    """Two questions with answers of these probabilities, two wrong ones each."""
    return AnswerScores(
        token_scores([[math.log(answer)] * 3] * 2, hits=[[True, True, False]] * 2),
        token_scores([[math.log(wrong)] * 2] * 4, prefix="w"),
        None if paraphrased is None else token_scores([[math.log(paraphrased)]] * 2),
        None if rouge is None else torch.tensor([rouge, rouge], dtype=torch.float64),
    )


def test_tofu_figures_by_hand() -> None:
    sets = {
        "forget": made_up(0.9, 0.2, 0.4, 0.7),
        "retain": made_up(0.8, 0.1, 0.5, 0.6),
        "ra": made_up(0.6, 0.2, None, 0.5),
        "wf": made_up(0.4, 0.1, None, 0.3),
    }
    found = tofu_metrics(sets, retrained=sets["forget"])
    nine = [0.8, 0.6, 1 - 0.1 / 0.5, 0.6, 0.5, 1 - 0.2 / 0.6, 0.4 / 0.6, 0.3, 1 - 0.1 / 0.4]
    expected = {
        "forget_Q_A_Prob": 0.9,
        "forget_Q_A_PERT_Prob": 0.2,
        "forget_Q_A_PARA_Prob": 0.4,
        "forget_Q_A_ROUGE": 0.7,
        "forget_truth_ratio": 0.5,
        "forget_quality": 1.0,
        "extraction_strength": 0.0,
        "exact_memorization": 2 / 3,
        "retain_Q_A_Prob": 0.8,
        "retain_Q_A_PERT_Prob": 0.1,
        "retain_Q_A_PARA_Prob": 0.5,
        "retain_Q_A_ROUGE": 0.6,
        "retain_Truth_Ratio": 0.8,
        "ra_Q_A_Prob": 0.6,
        "ra_Q_A_PERT_Prob": 0.2,
        "ra_Q_A_ROUGE": 0.5,
        "ra_Q_A_Prob_normalised": 0.6,
        "ra_Truth_Ratio": 1 - 0.2 / 0.6,
        "wf_Q_A_Prob": 0.4,
        "wf_Q_A_PERT_Prob": 0.1,
        "wf_Q_A_ROUGE": 0.3,
        "wf_Q_A_Prob_normalised": 0.4 / 0.6,
        "wf_Truth_Ratio": 0.75,
        "model_utility": 9 / sum(1 / value for value in nine),
    }
    assert found == pytest.approx(expected)
    part = tofu_metrics({name: sets[name] for name in ("forget", "retain")})
    assert part["retain_utility"] == pytest.approx(3 / (1 / 0.8 + 1 / 0.6 + 1 / 0.8))
    assert not {"model_utility", "forget_quality"} & part.keys()
    # The end of the text is left out where it is known: of three tokens the wrong one.
    assert tofu_metrics({"forget": sets["forget"]}, end_token=7)["extraction_strength"] == 1


def test_tofu_refuses_what_does_not_fit() -> None:
    one = made_up(0.9, 0.2, 0.4, None)
    with pytest.raises(ValueError, match=r"sets must be among forget, retain, ra, wf, got \['world'\]"):
        tofu_metrics({"world": one})
    other = AnswerScores(token_scores([[-1.0]] * 2, prefix="x"), one.perturbed, one.paraphrased)
    with pytest.raises(ValueError, match="retrained must be of the same 2 records"):
        tofu_metrics({"forget": one}, retrained=other)
    with pytest.raises(ValueError, match="questions must have the columns answer, perturbed_answer, got"):
        QuestionSet.from_columns({"question": ["q"]})
    columns: dict[str, list[Any]] = {"question": ["q", "r"], "answer": ["a", "b"]}
    with pytest.raises(ValueError, match=r"perturbed must be as many answers for every question, .* got \[1, 2\]"):
        QuestionSet.from_columns(columns | {"perturbed_answer": [["x"], ["x", "y"]]})
    with pytest.raises(ValueError, match="must have a list of texts"):
        QuestionSet.from_columns(columns | {"perturbed_answer": ["x", "y"]})


def test_a_model_that_says_the_same_of_everything_has_ratio_one(tokenizer: Any, questions: QuestionSet) -> None:
    model = FixedForCausalLM([0.0] * len(WORDS))
    scores = score_answers(model, tokenizer, questions, template=TEMPLATE, max_new_tokens=0)
    torch.testing.assert_close(scores.truth_ratios, torch.ones(2).double(), rtol=1e-6, atol=0)
    assert scores.option_probabilities.tolist() == pytest.approx([1 / 3, 1 / 3])
