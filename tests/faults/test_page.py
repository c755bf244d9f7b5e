"""The table of the campaign: a kind of fault replaces its own row."""

from faults.page import MARK, Row, updated
from faults.trials import Trial

ORDER = ["one", "two", "three"]


def row(title, count, outcome="held", lost=0):
    trials = [Trial(True, outcome)] * (count - lost) + [Trial(False, f"{outcome}: lost")] * lost
    return {title: str(Row(title, trials, 2000, 90.0, 7, "2030-01-02"))}


def test_a_kind_replaces_its_own_row_and_nothing_else():
    page = updated(f"# Title\n\n{MARK}\n", row("two", 1500), ORDER)
    page += "\nWhat was not run.\n"
    page = updated(page, row("one", 3, lost=1), ORDER)
    page = updated(page, row("of an earlier version", 1), ORDER)
    lines = updated(page, row("two", 20, "a | b"), ORDER).splitlines()
    assert lines[:3] == ["# Title", "", MARK] and lines[-2:] == ["", "What was not run."]
    assert lines[5:8] == [
        "| one | 3 | 2,000 | 2 | 1.5 | 7 | 2030-01-02 | 2 held; 1 held: lost |",
        "| two | 20 | 2,000 | 20 | 1.5 | 7 | 2030-01-02 | 20 a / b |",
        "| of an earlier version | 1 | 2,000 | 1 | 1.5 | 7 | 2030-01-02 | 1 held |",
    ]
    assert {line.count("|") for line in lines[3:8]} == {9} and len(lines) == 10


def test_a_page_without_a_table_gets_one_and_many_outcomes_are_summed_up():
    trials = [Trial(True, f"case {i}: {'ab'[i % 2]}{i % 20}") for i in range(100)]
    line = str(Row("one", trials, 100, 6.0, 1, "2030-01-02"))
    assert line.endswith("; 70 others |")
    assert updated("", {"one": line}, ORDER).splitlines()[-1] == line
