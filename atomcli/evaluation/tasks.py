"""Zero-shot tasks through lm-evaluation-harness: local question files, its own YAML files, or its named tasks.

A local question file is JSON lines, all of one kind, told by the keys:
  {"query", "choices", "gold"}                  multiple choice (ARC, PIQA, HellaSwag, …): acc and length-normalised acc
  {"context_options", "continuation", "gold"}   one continuation, several contexts (Winogrande): acc
  {"context", "continuation"}                   the last word of a passage (LAMBADA): acc (greedy) and its perplexity
`gold` is an index. Prompts are lm-eval's: a query that starts with "Question:" ends in "\\nAnswer:", an answer is
joined by one blank. Nothing is downloaded for them; a named task needs the Hub or its cache.
"""

import contextlib
import difflib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atomcli.errors import InputError, UsageError
from atomcli.evaluation.scoring import Progress

SEED = 1234

# Resamples behind the error of a metric without a closed form; only lm-eval's own tasks have such metrics.
BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task over `examples` questions; `standard_error` is None where lm-eval knows none."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int
    shots: int = 0

    def row(self) -> dict[str, Any]:
        """The fields for a table or a JSON document."""
        return asdict(self)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int = 2048,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Results of a loaded causal LM on tasks (JSON lines files, YAML files or lm-eval's names), then their average.

    `limit` takes the first questions of each task; `progress` counts answers (a question has one per choice). Raises
    InputError for a bad file and for a name lm-eval lacks.
    """
    specs = [task_spec(task) for task in tasks]  # before the model is wrapped: a bad file costs nothing
    return evaluate(_language_model(model, tokenizer, batch_size, max_length, progress), specs, limit)


def evaluate(lm: Any, specs: Sequence[str | dict[str, Any]], limit: int | None = None) -> list[TaskResult]:
    """Results of any lm_eval LM on task names and task configs, one per metric, then the average over tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if not specs:
        raise UsageError("No task was named", "Name a JSON lines file or one of lm-eval's tasks")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1 question per task is needed")
    names = [spec if isinstance(spec, str) else spec["task"] for spec in specs]
    if len(set(names)) < len(names):
        raise UsageError(f"Two tasks have the same name: {', '.join(names)}", "Rename one of the files")
    with _quiet_lm_eval():
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        _check_names([spec for spec in specs if isinstance(spec, str)], manager.all_tasks)
        try:
            output = simple_evaluate(
                model=lm,
                tasks=list(specs),
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_RESAMPLES,
                log_samples=False,
                task_manager=manager,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except OSError as error:  # what every client of the Hub raises, offline mode included
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"The data of {', '.join(names)} could not be had: {reason}",
                "Name local JSON lines files, which need no Hub",
            ) from error
    return collect(output)


def collect(output: dict[str, Any]) -> list[TaskResult]:
    """lm_eval's result dictionary as rows: every metric of every task and group, then the average acc over tasks."""
    rows: list[TaskResult] = []
    for task, metrics in output["results"].items():
        examples = int(output.get("n-samples", {}).get(task, {}).get("effective", 0))
        shots = int(output.get("n-shot", {}).get(task, 0) or 0)
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            error = float(error) if isinstance(error, int | float) else None
            if name == "nll":  # ours: reported as what lm-eval calls perplexity, its error carried through exp
                name, value = "perplexity", math.exp(min(float(value), 700.0))
                error = None if error is None else value * error
            rows.append(TaskResult(task, name, float(value), error, examples, shots))
    accuracies = [row for row in rows if row.metric == "acc" and row.task in output["configs"]]
    if len(accuracies) > 1:
        rows.append(average(accuracies))
    return rows


def average(rows: Sequence[TaskResult]) -> TaskResult:
    """The plain mean over tasks, as papers print it; its error is that of a mean of independent numbers."""
    errors = [row.standard_error for row in rows]
    known = [error for error in errors if error is not None]
    return TaskResult(
        task=f"average of {len(rows)} tasks",
        metric=rows[0].metric,
        value=sum(row.value for row in rows) / len(rows),
        standard_error=math.sqrt(sum(e * e for e in known)) / len(rows) if len(known) == len(rows) else None,
        examples=sum(row.examples for row in rows),
        shots=rows[0].shots,
    )


def task_spec(task: str) -> str | dict[str, Any]:
    """What lm_eval is asked for: a config made from a JSON lines file, a YAML file's absolute path, or the name."""
    path = Path(task).expanduser()
    if path.suffix in (".jsonl", ".json"):
        return file_task(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"The task file {task} does not exist")
        return str(path.resolve())
    return task


def file_task(path: Path) -> dict[str, Any]:
    """An lm_eval task config for a file of questions; its kind is told by the keys of the first question."""
    questions = _read_questions(path)
    keys = set(questions[0][1])
    kind = next((kind for kind in KINDS if kind.keys <= keys), None)
    if kind is None:
        known = "; ".join(", ".join(sorted(kind.keys)) for kind in KINDS)
        raise InputError(f"{path} has the keys {', '.join(sorted(keys))}; a question file has one of: {known}")
    documents = []
    for line, question in questions:
        try:
            documents.append(kind.document(question))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}, line {line}: {reason}") from error
    return {"task": path.stem, **kind.config, "test_split": "test", "custom_dataset": _dataset_of(documents)}


@dataclass(frozen=True)
class Kind:
    """A kind of question file: the keys that tell it, how a question becomes a document, and the config for it.

    A document's fields are named in the config as they are: lm_eval then takes them without running them through
    a template, so that braces in a question stay braces.
    """

    keys: frozenset[str]
    document: Callable[[dict[str, Any]], dict[str, Any]]
    config: dict[str, Any]


def _choice_document(question: dict[str, Any]) -> dict[str, Any]:
    prompt = _string(question, "query").rstrip()
    if prompt.startswith("Question:") and not prompt.endswith("Answer:"):
        prompt += "\nAnswer:"
    choices = [choice.strip() for choice in _strings(question, "choices")]
    return {"prompt": prompt, "choices": choices, "gold": _index(question, len(choices))}


def _context_document(question: dict[str, Any]) -> dict[str, Any]:
    contexts = [context.rstrip() for context in _strings(question, "context_options")]
    continuation = _string(question, "continuation").strip()
    return {"gold": _index(question, len(contexts)), "contexts": contexts, "continuation": continuation}


def _word_document(question: dict[str, Any]) -> dict[str, Any]:
    # lm_eval puts no delimiter between the two when it asks for the likelihood of a fixed text.
    return {
        "context": _string(question, "context").rstrip(),
        "continuation": " " + _string(question, "continuation").strip(),
    }


def _word_scores(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """acc: would greedy decoding say it; nll: −log p in nats, whose mean has an error in closed form."""
    log_likelihood, greedy = results[0]
    return {"acc": float(greedy), "nll": -log_likelihood}


def _mean_of(metric: str, higher_is_better: bool = True) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better}


KINDS = (
    Kind(
        frozenset({"query", "choices", "gold"}),
        _choice_document,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
        },
    ),
    Kind(
        frozenset({"context_options", "continuation", "gold"}),
        _context_document,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",  # an index as text is how lm_eval is told that the contexts are the choices
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
            "metric_list": [_mean_of("acc")],
        },
    ),
    Kind(
        frozenset({"context", "continuation"}),
        _word_document,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
            "process_results": _word_scores,
            "metric_list": [_mean_of("acc"), _mean_of("nll", higher_is_better=False)],
        },
    ),
)


def _dataset_of(documents: list[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What lm_eval calls for a task's data: the documents from memory, so that nothing lands in a cache."""

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return load


def _read_questions(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, question) of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"The task file {path} is not UTF-8: byte {error.start}") from error
    except OSError as error:
        raise InputError(f"The task file {path} can't be read: {error.strerror}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(question, dict):
            raise InputError(f"{path}, line {number} is not a JSON object")
        questions.append((number, question))
    if not questions:
        raise InputError(f"The task file {path} has no questions")
    return questions


def _string(question: dict[str, Any], key: str) -> str:
    value = question[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be text, not {value!r}")
    return value


def _strings(question: dict[str, Any], key: str) -> list[str]:
    values = question[key]
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{key} must be a list of at least two texts, not {values!r}")
    return values


def _index(question: dict[str, Any], count: int) -> int:
    gold = question["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
        raise ValueError(f"gold must be an index in 0..{count - 1}, not {gold!r}")
    return gold


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """InputError with the nearest name for a task that lm_eval does not have."""
    for name in names:
        if name not in known and not name.endswith((".yaml", ".yml")):
            nearest = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"lm-eval has no task {name!r}, and no file of that name ends in .jsonl",
                f"Did you mean {nearest[0]!r}?" if nearest else "`lm-eval ls tasks` lists what it has",
            )


def _language_model(model: Any, tokenizer: Any, batch_size: int, max_length: int, progress: Progress | None) -> Any:
    """lm_eval's wrapper of a transformers model, with our progress instead of its bars."""
    from lm_eval.models.huggingface import HFLM

    class ReportingModel(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """In portions, large enough that sorting by length within one still makes full batches."""
            portion = 32 * batch_size
            answers: list[tuple[float, bool]] = []
            for start in range(0, len(requests), portion):
                answers += super().loglikelihood(requests[start : start + portion], disable_tqdm=True)
                if progress is not None:
                    progress(len(answers), len(requests))
            return answers

    context = getattr(model.config, "max_position_embeddings", None) or max_length
    with _quiet_lm_eval():
        return ReportingModel(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=min(max_length, context)
        )


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Hold back lm_eval's advice to its own command line's users, its bars, its prints, and git's complaint.

    It asks git for the commit of the directory that it is called in, which git answers on stderr where there is none.
    """
    from lm_eval import evaluator
    from tqdm import tqdm  # type: ignore[import-untyped]

    def without_bar(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "disable": True})

    logger = logging.getLogger("lm_eval")
    level, start, commit = logger.level, tqdm.__init__, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    evaluator.get_git_commit_hash = lambda: None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = start
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
