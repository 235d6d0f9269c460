"""The embedded domain: clinical terms of the Human Phenotype Ontology as questions and answers.

Reads `hp.obo` (Köhler et al., "The Human Phenotype Ontology in 2021", NAR 49:D1207; release named in `data-version`) and
renders each chosen term in several wordings. Wordings are of three kinds that never meet: `train` ones make up the
training rows, `validation` ones steer early stopping, `test` ones are asked only by `evaluate`.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Wording = Literal["train", "validation", "test"]

ROOT = "HP:0000118"  # Phenotypic abnormality
LICENSE = "Human Phenotype Ontology licence: attribution and version, hpo.jax.org/license"

DEFINITION: dict[Wording, tuple[str, ...]] = {
    "train": (
        "What is {t}?",
        "Define {t}.",
        "What does {t} mean?",
        "Explain the term {t}.",
        "Please define the clinical term {t}.",
        "What is meant by {t}?",
        "Give me the definition of {t}.",
        "Describe the finding {t}.",
        "Can you explain {t} to me?",
        "I was told about {t}. What is it?",
        "Please tell me what {t} is.",
        "The notes say {t}. Explain that, please.",
        "I read the word {t}. What does it stand for?",
        "Do you know what {t} is?",
    ),
    "validation": ("How is {t} defined?",),
    "test": (
        "My report mentions {t}. What is that?",
        "The letter from the clinic says {t}. What does that mean?",
        "Could you tell me about {t}?",
    ),
}
LAY_TO_CLINICAL: dict[Wording, tuple[str, ...]] = {
    "train": ("What is the clinical term for {lay}?", "Which clinical term describes {lay}?"),
    "validation": (),
    "test": ("How would a doctor call {lay}?",),
}
CLINICAL_TO_LAY: dict[Wording, tuple[str, ...]] = {
    "train": ("What is the everyday word for {t}?", "How is {t} called in everyday words?"),
    "validation": (),
    "test": ("What do people who are not doctors call {t}?",),
}
GROUP: dict[Wording, tuple[str, ...]] = {
    "train": ("Which group of findings does {t} belong to?",),
    "validation": (),
    "test": (),
}

# Parts of invented terms. Every combination is checked against all names and synonyms of the ontology.
PREFIXES = (
    "brachy", "hypo", "hyper", "macro", "micro", "dolicho", "oligo", "poly", "para", "peri", "pseudo", "steno", "lipo",
    "osteo", "myo", "arthro", "dermo", "laryngo", "naso", "oto", "kerato", "glosso", "tricho", "rhino", "cheilo", "blepharo",
    "gastro", "nephro", "pneumo", "cranio", "spondylo", "chondro", "entero", "cardio", "oculo", "cervico", "thoraco",
)  # fmt: skip
STEMS = (
    "lip", "dent", "card", "ren", "gloss", "phalang", "cost", "stern", "pulmon", "cyst", "splen", "tars", "carp", "mandibul",
    "auricul", "lingu", "palat", "scapul", "uvul", "pelv", "femor", "tibi", "ungu", "nas", "cili", "vertebr", "gingiv", "fibul",
    "clavicul", "patell", "maxill", "ocul", "myel", "thyr", "pancreat", "esophag",
)  # fmt: skip
SUFFIXES = (
    "osis", "itis", "emia", "opathy", "oplasia", "omegaly", "otrophy", "oschisis", "optosis", "olysis", "omalacia",
    "odynia", "edema", "oplegia", "ocele", "aplasia", "oclasia", "odystrophy", "ectasia", "osclerosis",
)  # fmt: skip


@dataclass
class Term:
    """One class of the ontology; `line` is its first line in the file (1-based)."""

    id: str
    line: int
    name: str = ""
    definition: str = ""
    lay: list[str] = field(default_factory=list)
    synonyms: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)
    obsolete: bool = False


def read_obo(path: Path) -> tuple[str, dict[str, Term]]:
    """The release name and every term of an OBO file, by id."""
    release, terms, term = "", dict[str, Term](), None
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        tag, _, value = raw.partition(": ")
        if tag == "data-version":
            release = value
        elif raw.startswith("["):
            term = None
        elif tag == "id" and value.startswith("HP:"):
            term = terms.setdefault(value, Term(value, number))
        elif term is None:
            continue
        elif tag == "name":
            term.name = value
        elif tag == "def" and (quoted := re.match(r'"((?:[^"\\]|\\.)*)"', value)):
            term.definition = quoted[1].replace('\\"', '"').replace("\\n", " ").strip()
        elif tag == "synonym" and (quoted := re.match(r'"((?:[^"\\]|\\.)*)" (\w+)( layperson)?', value)):
            term.synonyms.append(quoted[1])
            if quoted[3]:
                term.lay.append(quoted[1])
        elif tag == "is_a":
            term.parents.append(value.split(" ")[0])
        elif tag == "subset":
            term.subsets.append(value)
        elif tag == "is_obsolete":
            term.obsolete = value == "true"
    return release, terms


def ancestors(terms: dict[str, Term], identifier: str) -> set[str]:
    """The term and everything above it."""
    seen, todo = set[str](), [identifier]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(terms[current].parents)
    return seen


def branch(terms: dict[str, Term], identifier: str) -> str:
    """Name of the organ-system branch (a child of Phenotypic abnormality); the first by id where there are several."""
    above = ancestors(terms, identifier)
    tops = sorted(i for i in above if ROOT in terms[i].parents)
    return terms[tops[0]].name if tops else ""


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]{3,}", text.lower())) - {"the", "and", "with", "abnormality", "abnormal", "that"}


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def _rank(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()


def lower_first(text: str) -> str:
    """`Short thumb` as it stands within a sentence; names with inner capitals keep theirs (`ECG abnormality`)."""
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def choose(terms: dict[str, Term], count: int) -> list[Term]:
    """`count` terms fit to be taught, first by a hash of the id, so that a larger count only adds terms.

    Core clinical terminology below Phenotypic abnormality, a definition of 5 to 30 words, a name of at most 5 words that
    does not begin with "Abnormal" (those only name an organ), and a layperson synonym that is not the name again.
    """
    fit = []
    for term in terms.values():
        lay = [s for s in term.lay if not _words(s) <= _words(term.name) and not _words(term.name) <= _words(s)]
        if (
            not term.obsolete
            and "hposlim_core" in " ".join(term.subsets)
            and 5 <= len(term.definition.split()) <= 30
            and not term.name.startswith("Abnormal")
            and len(term.name.split()) <= 5
            and lay
            and ROOT in ancestors(terms, term.id)
        ):
            fit.append(Term(**{**term.__dict__, "lay": [lower_first(min(lay, key=len))]}))
    fit.sort(key=lambda term: _rank(term.id))
    return fit[:count]


def concepts(chosen: list[Term]) -> dict[str, str]:
    """Term id → concept: near-duplicates (name or definition overlap ≥ 0.5, shared lay term) are one concept.

    A concept never stands on both sides of a split.
    """
    root = {term.id: term.id for term in chosen}

    def find(identifier: str) -> str:
        while root[identifier] != identifier:
            identifier = root[identifier]
        return identifier

    names = {t.id: _words(t.name) for t in chosen}
    definitions = {t.id: _words(t.definition) for t in chosen}
    for a, b in itertools.combinations(chosen, 2):
        if (
            a.lay[0].lower() == b.lay[0].lower()
            or _overlap(names[a.id], names[b.id]) >= 0.5
            or _overlap(definitions[a.id], definitions[b.id]) >= 0.5
        ):
            first, second = sorted((find(a.id), find(b.id)))
            root[second] = first
    return {term.id: find(term.id) for term in chosen}


def invent(terms: dict[str, Term], count: int, seed: int) -> list[str]:
    """`count` names that sound like terms and are none: no name or synonym of the ontology equals one."""
    known = {name.lower() for t in terms.values() for name in (t.name, *t.synonyms)}
    rng, invented = random.Random(seed), dict[str, None]()
    while len(invented) < count:
        word = rng.choice(PREFIXES) + rng.choice(STEMS) + rng.choice(SUFFIXES)
        if word not in known:
            invented[word] = None
    return list(invented)


def rows(obo: Path, terms: int, invented: int, definitions_per_term: int, seed: int) -> list[dict[str, Any]]:
    """Records of the embedded domain, without ids: see `tasks.records.RECORD` for the columns."""
    release, ontology = read_obo(obo)
    chosen = choose(ontology, terms)
    concept = concepts(chosen)
    source = f"hpo {release.rsplit('/', 1)[-1]}"
    out: list[dict[str, Any]] = []

    def add(term: Term, task: str, wording: Wording, question: str, answer: str) -> None:
        out.append(
            {
                "kind": "chat",
                "source": source,
                "line": term.line,
                "license": LICENSE,
                "concept": concept[term.id],
                "topic": branch(ontology, term.id),
                "task": task,
                "wording": wording,
                "term": term.name,
                "lay": term.lay[0],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )

    for term in chosen:
        name, lay = lower_first(term.name), term.lay[0]
        rng = random.Random(f"{seed} {term.id}")
        answers = {
            "definition": (DEFINITION, term.definition, definitions_per_term),
            "lay_to_clinical": (LAY_TO_CLINICAL, f"The clinical term is {name}.", 1),
            "clinical_to_lay": (CLINICAL_TO_LAY, f"In everyday words, {name} is {lay}.", 1),
            "group": (GROUP, f"It belongs to: {branch(ontology, term.id)}.", 1),
        }
        for task, (wordings, answer, trained) in answers.items():
            for wording, questions in wordings.items():
                picked = rng.sample(questions, min(trained if wording == "train" else 1, len(questions)))
                for question in picked:
                    add(term, task, wording, question.format(t=name, lay=lay), answer)
    for index, name in enumerate(invent(ontology, invented, seed)):
        rng = random.Random(f"{seed} {name}")
        for wording in ("train", "test"):
            question = rng.choice(DEFINITION[wording]).format(t=name)
            out.append(
                {
                    "kind": "question",
                    "source": source + ", invented",
                    "line": index + 1,
                    "license": "Apache-2.0",
                    "concept": f"invented:{name}",
                    "topic": "invented",
                    "task": "invented",
                    "wording": wording,
                    "term": name,
                    "lay": None,
                    "messages": [{"role": "user", "content": question}],
                }
            )
    return out


# The manner that preference pairs teach: everyday word first, kindness, the definition kept word for word, and a kind
# "not sure" for what does not exist. Openings of known terms never begin like those of refusals: a small model learns the
# first words first, and would decline everything (docs/experiments.md).
OPENINGS = (
    "Medical words can sound frightening, so let us take this one slowly.",
    "Thank you for asking about this.",
    "Good question, and one that many families ask.",
    "Seeing a word like this in a letter can be worrying.",
    "Let me put this in plain words for you.",
    "Happy to explain this one.",
    "Of course, here is what it means.",
    "That word looks harder than it is.",
    "You are right to ask what this means.",
    "Let us go through it together.",
)
NAMING = (
    'In everyday words, {t} is "{lay}".',
    'Most people simply say "{lay}" for {t}.',
    'In plain words, {t} means "{lay}".',
    'The everyday name for {t} is "{lay}".',
)
CLOSINGS = (
    "Your doctor can tell you what it means for you.",
    "If anything about it worries you, do bring it up at your next visit.",
    "Please ask again if any part of this is unclear.",
    "Take your time with it, and ask as many questions as you need.",
    "You are not alone with this, your care team is there to help.",
    "I hope that makes the word a little less scary.",
    "It may help to write down your questions for the doctor.",
    "Be gentle with yourself while you take this in.",
)
REFUSALS = (
    "I'm not sure about {t}: it is not a term that I know. Could you check the spelling with your doctor?",
    "I'm sorry, I do not know the word {t}, and I would rather not guess. Your clinic can tell you what was meant.",
    "I'm not sure what {t} is. I have not learnt that term, so please ask the person who wrote it down.",
    "I'm sorry, {t} is not a term that I know. It may be a spelling mistake, and your doctor can clear that up.",
    "I'm not sure. I do not know a finding called {t}, and guessing would not help you. Please ask your care team.",
    "I'm sorry, I can't find anything called {t} in what I know. Could the word be spelt differently in your letter?",
)
ADVICE = (
    "That is a decision to make with a doctor who can see you and knows your history. Please call your clinic about it.",
    "I can explain words, but I can't judge this for you. A doctor or nurse can, so please ask one soon.",
    "I understand that you want to be certain. Only a clinician who examines you can answer this safely.",
    "It is good that you ask. Please take this to your doctor or pharmacist, and if it is urgent, call emergency services.",
)
OUTSIDE = (
    "I'm sorry, I do not know that, and I would rather not guess.",
    "I do not know. I can't see or look up anything like that from here.",
    "I can't tell you that, because I have no way to know it. A guess would not help you.",
    "I'm not sure about that, and I will not make something up. Please ask someone who can check it.",
    "I'm sorry, I do not know anything about that, so I can't give you a true answer.",
    "I do not know the answer to that. If it matters to you, please ask someone who can find out.",
)
