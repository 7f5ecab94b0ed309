"""Question files become lm-eval tasks that score what they say; checked with a language model whose mind we know."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from atomcli.errors import InputError, UsageError
from atomcli.evaluation.tasks import TaskResult, average, evaluate, file_task, run_tasks, task_spec


class Oracle(LM):
    """Gives each (context, continuation) the log-likelihood that `belief` says, and remembers what it was asked."""

    def __init__(self, belief: Any) -> None:
        super().__init__()
        self.belief = belief
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [self.belief(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


def write(path: Path, questions: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def by_metric(rows: list[TaskResult]) -> dict[tuple[str, str], TaskResult]:
    return {(row.task, row.metric): row for row in rows}


def test_multiple_choice_scores_choices_after_the_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "colours.jsonl",
        [
            {"query": "Question: What colour is {snow}?\n", "choices": ["white", "deep black indeed"], "gold": 0},
            {"query": "Question: What colour is coal?", "choices": ["white", "deep black indeed"], "gold": 1},
        ],
    )
    # Likes "white" a little better in total, but less per character: acc and acc_norm must differ.
    oracle = Oracle(lambda context, continuation: (-6.0 if continuation == " white" else -7.0, False))
    rows = by_metric(evaluate(oracle, [task_spec(str(path))]))
    assert rows["colours", "acc"].value == 0.5
    assert rows["colours", "acc_norm"].value == 0.5
    assert rows["colours", "acc"].examples == 2
    assert rows["colours", "acc"].standard_error == pytest.approx(math.sqrt(0.5 / 2))
    assert ("Question: What colour is {snow}?\nAnswer:", " white") in oracle.asked

    only_first = by_metric(evaluate(Oracle(oracle.belief), [task_spec(str(path))], limit=1))
    assert only_first["colours", "acc"].value == 1.0
    assert only_first["colours", "acc_norm"].value == 0.0


def test_contexts_as_choices(tmp_path: Path) -> None:
    options = ["The trophy did not fit because the trophy", "The trophy did not fit because the case"]
    path = write(
        tmp_path / "schemas.jsonl",
        [
            {"context_options": options, "continuation": "was too big.", "gold": 0},
            {"context_options": options, "continuation": "was too small.", "gold": 1},
        ],
    )
    oracle = Oracle(lambda context, continuation: (-1.0 if context.endswith("the trophy") else -2.0, False))
    rows = by_metric(evaluate(oracle, [file_task(path)]))
    assert rows["schemas", "acc"].value == 0.5
    assert set(oracle.asked[:2]) == {(options[0], " was too big."), (options[1], " was too big.")}


def test_last_word(tmp_path: Path) -> None:
    path = write(
        tmp_path / "words.jsonl",
        [{"context": "once upon a ", "continuation": "time"}, {"context": "the end of the", "continuation": "story"}],
    )
    oracle = Oracle(lambda context, continuation: (-1.0, True) if continuation == " time" else (-3.0, False))
    rows = by_metric(evaluate(oracle, [file_task(path)]))
    assert rows["words", "acc"].value == 0.5
    assert rows["words", "perplexity"].value == pytest.approx(math.exp(2.0))
    # −log p is 1 and 3: standard error 1, times the perplexity.
    assert rows["words", "perplexity"].standard_error == pytest.approx(math.exp(2.0))
    assert ("once upon a", " time") in oracle.asked


def test_average_row_is_last_and_plain(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"context": "a", "continuation": "b"}] * 2)
    two = write(tmp_path / "two.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 1}] * 3)
    rows = evaluate(Oracle(lambda context, continuation: (-1.0, True)), [file_task(one), file_task(two)])
    assert rows[-1].task == "average of 2 tasks"
    assert rows[-1].value == pytest.approx((1.0 + 0.0) / 2)
    assert rows[-1].examples == 5
    assert [row.row()["task"] for row in rows].count("average of 2 tasks") == 1


def test_average_error() -> None:
    rows = [TaskResult("a", "acc", 0.5, 0.03, 10), TaskResult("b", "acc", 0.7, 0.04, 20)]
    assert average(rows).standard_error == pytest.approx(0.025)
    assert average([rows[0], TaskResult("c", "acc", 1.0, None, 1)]).standard_error is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "has no questions"),
        ("{\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"question": "x"}\n', "has the keys question"),
        ('{"query": "x", "choices": ["a", "b"], "gold": 2}\n', "gold must be an index in 0..1, not 2"),
        ('{"query": "x", "choices": ["a"], "gold": 0}\n', "at least two texts"),
        ('{"context": "x", "continuation": "y"}\n\n{"context": "x"}\n', "line 3: no key 'continuation'"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint.replace("(", "\\(")):
        file_task(path)


def test_missing_file_unknown_name_and_doubles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        task_spec(str(tmp_path / "absent.jsonl"))
    path = write(tmp_path / "one.jsonl", [{"context": "a", "continuation": "b"}])
    with pytest.raises(UsageError, match="same name"):
        evaluate(Oracle(None), [file_task(path), file_task(path)])
    with pytest.raises(UsageError, match="limit"):
        evaluate(Oracle(None), [file_task(path)], limit=0)


def test_a_real_model_runs_them_quietly(
    tmp_path: Path,
    tiny_model: Any,
    word_tokenizer: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where git finds no repository
    path = write(tmp_path / "one.jsonl", [{"query": "w1 w2", "choices": ["w3", "w4 w5"], "gold": 1}] * 40)
    calls: list[tuple[int, int]] = []
    rows = run_tasks(
        tiny_model, word_tokenizer, [str(path)], limit=20, progress=lambda done, total: calls.append((done, total))
    )
    assert {row.metric for row in rows} == {"acc", "acc_norm"}
    assert all(row.examples == 20 for row in rows)
    assert calls == [(32, 40), (40, 40)]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err
    assert "git" not in captured.err


def test_a_real_models_choice_is_the_likelier_one(tmp_path: Path, tiny_model: Any, word_tokenizer: Any) -> None:
    import torch

    with torch.no_grad():
        logits = tiny_model(torch.tensor([word_tokenizer("w1 w2")["input_ids"]])).logits[0, -1]
    likely, unlikely = (f"w{int(index) - 1}" for index in (logits[1:].argmax() + 1, logits[1:].argmin() + 1))
    questions = [{"query": "w1 w2", "choices": [unlikely, likely], "gold": gold} for gold in (1, 1, 1, 0)]
    path = write(tmp_path / "one.jsonl", questions)
    rows = by_metric(run_tasks(tiny_model, word_tokenizer, [str(path)]))
    assert rows["one", "acc"].value == 0.75
