"""Kindness and plainness of answers, by features that no training wrapper shares. Per answer.

`kindness` is the probability of the warm class under a TF-IDF and logistic-regression classifier fitted on `sentences.jsonl`,
sentences written apart from every training row. The rest are rates per word: second person, first person, hedges; the
compound score of VADER (Hutto & Gilbert 2014); and the Flesch-Kincaid grade.
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

_SENTENCES = "sentences.jsonl"
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


def classifier(path):
    """The fitted pipeline; deterministic."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    return model.fit([row["text"] for row in rows], [row["label"] == "warm" for row in rows])


def grade(text):
    """Flesch-Kincaid grade; syllables are counted as groups of vowels."""
    words = re.findall(r"[A-Za-z]+", text)
    sentences = max(1, len(re.findall(r"[.!?]+", text)))
    if not words:
        return 0.0
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

    def _download_and_prepare(self, dl_manager):
        self.sentences = (
            Path(self.config_name) if self.config_name.endswith(".jsonl") else Path("tasks/metrics/manner") / _SENTENCES
        )

    def _compute(self, predictions, references):
        model, vader = classifier(self.sentences), SentimentIntensityAnalyzer()
        words = [max(1, len(text.split())) for text in predictions]
        return {
            "kindness": model.predict_proba(predictions)[:, 1].tolist(),
            "second_person": [len(_SECOND.findall(t)) / n for t, n in zip(predictions, words, strict=True)],
            "first_person": [len(_FIRST.findall(t)) / n for t, n in zip(predictions, words, strict=True)],
            "hedges": [len(_HEDGE.findall(t)) / n for t, n in zip(predictions, words, strict=True)],
            "empathy": [len(_EMPATHY.findall(t)) / n for t, n in zip(predictions, words, strict=True)],
            "valence": [vader.polarity_scores(t)["compound"] for t in predictions],
            "grade": [grade(t) for t in predictions],
        }
