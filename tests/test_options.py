"""The options of a multiple choice: a score among others is of another question."""

from tasks import compare


def test_a_choice_among_other_options_is_no_pair() -> None:
    """Of its likelihood, which no option touches, it is one."""
    before = [
        {"id": f"{n:02}", "set": "general", "task": "choice", "correct": 0.0, "nll": 2.0, "options": "x"}
        for n in range(40)
    ]
    after = [item | {"correct": 1.0, "options": "x" if n < 20 else "y"} for n, item in enumerate(before)]
    found = {d.measure.key: (d.n, d.up, d.down) for d in compare.compare(before, after, resamples=300)}
    assert found == {"general.accuracy": (20, 20, 0), "general.cross_entropy": (40, 0, 0)}


def test_of_options_that_one_side_does_not_name_nothing_is_known() -> None:
    """As of a model that was evaluated before they were kept."""
    before = [{"id": f"{n:02}", "set": "general", "task": "choice", "correct": 0.0} for n in range(40)]
    after = [item | {"correct": 1.0, "options": "x"} for item in before]
    for sides in ((before, after), (after, before)):
        (found,) = compare.compare(*sides, resamples=300)
        assert found.n == 40
