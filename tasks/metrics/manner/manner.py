"""Kindness and plainness of answers. Per answer.

`kindness` is the probability of the warm class under a TF-IDF and logistic-regression classifier fitted on `sentences.jsonl`,
sentences written apart from every training row (a kind sentence that an answer has from them counts all the same: `scripted` of
`evaluate` says how much of it is such), or on `sentences.ko.jsonl` for text that is mostly Korean. The rest are rates
per word: second person, first person, hedges; the compound score of VADER (Hutto & Gilbert 2014); and the Flesch-Kincaid
grade. They are of English: None for Korean. All are None for text in neither Latin script nor Hangul. Text without a letter
is not kind, and has no grade. `korean` says which classifier it was: kindness of one can't be held against kindness of the
other.
"""

import json
import re
from pathlib import Path

import datasets
import evaluate
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_FOLDER = Path("tasks/metrics/manner")
# whether of Korean → sentences, and what is counted of them: words of Korean carry their particles and endings, in which its
# politeness is, so that runs of characters tell more
_SENTENCES = {
    False: ("sentences.jsonl", {"ngram_range": (1, 2)}),
    True: ("sentences.ko.jsonl", {"analyzer": "char", "ngram_range": (2, 4)}),
}
_SECOND = re.compile(r"\b(?:you|your|yours|yourself)\b", re.IGNORECASE)
_FIRST = re.compile(r"\b(?:i|i'm|we|us|our|my|let's)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:may|might|can|could|perhaps|usually|often|sometimes|probably|not sure)\b", re.IGNORECASE)
# none of them, nor of their other forms, stands in a wrapper that the pairs teach (tests/test_evaluate.py holds them apart):
# a model that parrots the wrappers scores nothing here
_EMPATHY = re.compile(
    r"\b(?:understandabl[ey]|comfort\w*|reassur\w*|gladly|sympath\w*|empath\w*|compassion\w*|concerns?|concerned|anxious|anxiety|"
    r"afraid|nervous|stress\w*|upset\w*|overwhelm\w*|confus\w*|difficult|tough|challeng\w*|feel|feels|feeling|feelings|support\w*|"
    r"hopefully|glad|patience|calm\w*|encourag\w*|brave|caring|warm\w*|kind|kindly|listen\w*|appreciat\w*|welcome|rest assured)\b",
    re.IGNORECASE,
)


def classifier(is_korean):
    """The fitted pipeline; deterministic."""
    name, counted = _SENTENCES[is_korean]
    rows = [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]
    model = make_pipeline(TfidfVectorizer(**counted, sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000))
    return model.fit([row["text"] for row in rows], [row["label"] == "warm" for row in rows])


def other(text):
    """Whether there are more letters of other scripts in it than of those two."""
    letters = sum(map(str.isalpha, text))
    return 2 * len(re.findall(r"[A-Za-z\u00c0-\u024f\uac00-\ud7af]", text)) < letters


def korean(text):
    """Whether there is more Hangul in it than Latin script."""
    return len(re.findall(r"[\uac00-\ud7af]", text)) > len(re.findall(r"[A-Za-z]", text))


def grade(text):
    """Flesch-Kincaid grade; syllables are counted as groups of vowels."""
    words = re.findall(r"[A-Za-z]+", text)
    sentences = max(1, len(re.findall(r"[.!?]+", text)))
    if not words:
        return None
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower()))) for word in words)
    return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59


class Manner(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Hutto & Gilbert 2014 (VADER); Kincaid et al. 1975",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        vader = SentimentIntensityAnalyzer()
        unread = [other(text) for text in predictions]
        foreign = [korean(text) or skip for text, skip in zip(predictions, unread, strict=True)]
        kindness = [None] * len(predictions)
        for wanted in (False, True):
            at = [i for i, is_korean in enumerate(foreign) if is_korean is wanted and not unread[i]]
            if not at:
                continue
            warm = classifier(wanted).predict_proba([predictions[i] for i in at])[:, 1].tolist()
            for i, value in zip(at, warm, strict=True):
                kindness[i] = value if any(map(str.isalpha, predictions[i])) else 0.0

        def english(score):
            return [None if skip else score(text) for text, skip in zip(predictions, foreign, strict=True)]

        def per_word(pattern):
            return english(lambda text: len(pattern.findall(text)) / max(1, len(text.split())))

        return {
            "korean": [None if skip else float(is_korean) for skip, is_korean in zip(unread, foreign, strict=True)],
            "kindness": kindness,
            "second_person": per_word(_SECOND),
            "first_person": per_word(_FIRST),
            "hedges": per_word(_HEDGE),
            "empathy": per_word(_EMPATHY),
            "valence": english(lambda text: vader.polarity_scores(text)["compound"]),
            "grade": english(grade),
        }
