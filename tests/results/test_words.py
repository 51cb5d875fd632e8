"""ROUGE-L of texts in any script, and of English as the package rouge-score has it."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from sapt_jax.results.metrics import rouge_l

# Chinese, Hindi, Russian, Thai, Japanese, Korean, Hebrew, Arabic, Persian with a joiner, Greek, French, Vietnamese,
# digits of other scripts, pictures and symbols.
TEXTS = (
    *(
        "我爱北京",
        "दिल्ली भारत की राजधानी है",
        "мама мыла раму",
        "สวัสดีครับ",
        "サーバー",
        "한국어 좋아",
        "מה שלומך",
        "كتاب",
    ),
    *("کتاب\u200cها", "Ελλάδα", "été", "được", "१२३", "٣", "👍", "❤️", "🤷\u200d♂️", "+", "-", "½", "∑", "...", "à", "é"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_itself_and_none_of_the_others(text):
    assert rouge_l(text, [text]) == 1.0
    assert [other for other in TEXTS if other != text and rouge_l(other, [text])] == []
    assert rouge_l("", [text]) == 0.0


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("我有5只猫", "你去5", 1 / 4),
        ("мама5", "папа5", 1 / 2),
        ("I live in 北京", "I live in 上海", 3 / 5),
        ("👍 5", "👎 5", 1 / 2),
        ("हिन्दी में", "हिन्दी का", 1 / 2),
        ("日本語", "日本", 4 / 5),
        ("cafe\u0301", "café", 1.0),
        ("Мама", "мама!", 1.0),
    ],
)
def test_what_two_texts_share_is_counted_in_words(answer, reference, score):
    assert rouge_l(answer, [reference]) == pytest.approx(score, abs=1e-12)


def test_english_scores_as_in_the_package():
    package = RougeScorer(["rougeL"], use_stemmer=True)
    plain = "the cats running don't £4.2bn it’s “so” – m² 12 $5 a_b C++ 😃 i️ e-mail m s caf".split()
    accents = "café Müller ΔCt naïve Â£".split()
    rng = random.Random(3)
    for _ in range(200):
        one, other = (" ".join(rng.choices(of, k=rng.randint(1, 9))) + " ok" for of in (plain, plain + accents))
        for answer, reference in ((one, other), (other, one)):
            assert rouge_l(answer, [reference]) == package.score(reference, answer)["rougeL"].fmeasure
