"""How much of a reference an answer says: ROUGE-L, chrF and recall of its content words, per answer.

Words are runs of letters, their marks and digits of any script; for text without spaces (Chinese, Japanese, Thai) and for Korean, whose
words carry their particles, recall counts character bigrams instead. In mixed text each script is counted in its own way.
Recall is of what the question, where there is one, does not say already: who repeats it knows nothing.
"""

import datasets
import evaluate
import regex
from rouge_score import rouge_scorer
from sacrebleu.metrics import CHRF

_BIGRAM_SCRIPTS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_COMMON = frozenset(
    "the and with that this for are was from which than its into more one two not any all can has have".split()
)


class _Words:
    """rouge_score's own tokenizer drops every letter that is not ASCII."""

    def tokenize(self, text):
        return regex.findall(r"[\w\p{M}]+", text.lower())


def pieces(text, every=False):
    """What recall counts: content words, and character bigrams of the scripts that have them; `every` word and character
    where a reference has nothing else ("42", "no", "네").
    """
    text = text.lower()
    words = regex.findall(rf"(?V1)[[\w\p{{M}}]--[{_BIGRAM_SCRIPTS}]]+", text)  # cut where scripts meet: 404입니다
    letters = "".join(regex.findall(rf"[{_BIGRAM_SCRIPTS}]", text))
    if every:
        return {*words, *letters}
    bigrams = {letters[i : i + 2] for i in range(len(letters) - 1)}
    return bigrams | {word for word in words if len(word) >= 3 and word not in _COMMON}


class Overlap(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin 2004 (ROUGE); Popović 2015 (chrF)",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, questions=None):
        rouge, chrf = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words()), CHRF()
        out = {"rouge_l": [], "chrf": [], "recall": []}
        asked = questions or [""] * len(references)
        for prediction, reference, question in zip(predictions, references, asked, strict=True):
            out["rouge_l"].append(rouge.score(reference, prediction)["rougeL"].fmeasure)
            out["chrf"].append(chrf.sentence_score(prediction, [reference]).score / 100)
            bare = not pieces(reference)
            wanted = pieces(reference, every=bare)
            wanted = wanted - pieces(question, every=bare) or wanted
            out["recall"].append(len(wanted & pieces(prediction, every=bare)) / len(wanted) if wanted else 1.0)
        return out
