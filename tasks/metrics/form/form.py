"""Length and repetition of answers: what a reward-hacked model changes first. Per answer."""

import re
from itertools import pairwise

import datasets
import evaluate


class Form(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        out = {"characters": [], "words": [], "distinct_2": [], "loops": []}
        for prediction in predictions:
            words = re.findall(r"\w+", prediction.lower())
            bigrams = list(pairwise(words))
            fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
            out["characters"].append(float(len(prediction)))
            out["words"].append(float(len(words)))
            out["distinct_2"].append(len(set(bigrams)) / len(bigrams) if bigrams else 1.0)
            # a run of four words said three times or more
            out["loops"].append(float(any(fours.count(four) >= 3 for four in set(fours))))
        return out
