"""Tasks: prompts that do not leak between splits, metrics with known values, errors that name the line."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from decoding import UserError
from decoding.tasks import gsm8k, spider, squad, stdlib
from decoding.tasks.base import SPLITS, FileTask, JsonlTask, Prompt
from decoding.tasks.gsm8k import Gsm8kTask
from decoding.tasks.humaneval import HumanEvalTask
from decoding.tasks.metrics import edit_similarity, first_line, levenshtein, line_metrics
from decoding.tasks.spec_bench import MtBenchTask, SpecBenchTask
from decoding.tasks.spider import SpiderTask
from decoding.tasks.squad import SquadTask
from decoding.tasks.stdlib import SHARES, StdlibTask, split_of, stdlib_modules
from tests.small_pair import small_tokenizer

DATA = Path(os.environ.get("DSBD_DATA", Path(__file__).parents[4] / "shared" / "data"))
ALL = {"shares": None}


def data_file(name: str) -> str:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in {DATA}; set DSBD_DATA")
    return str(DATA / name)


# Metrics


@pytest.mark.parametrize(
    ("prediction", "finished", "exact", "similarity"),
    [
        ("return x\nmore", False, 1.0, 1.0),
        ("return x  \n", False, 1.0, 1.0),  # trailing blanks do not count
        ("\n\nreturn x\n", False, 1.0, 1.0),  # blank lines are skipped
        ("return x", False, 0.0, 1.0),  # may go on: not a completed line
        ("return x", True, 1.0, 1.0),
        ("return y\n", False, 0.0, 1 - 1 / 8),
        ("", False, 0.0, 0.0),
        ("", True, 0.0, 0.0),
        ("\n", False, 0.0, 0.0),
    ],
)
def test_first_completed_line(prediction: str, finished: bool, exact: float, similarity: float) -> None:
    found = line_metrics(prediction, "return x\nand so on", finished)
    assert found == {"exact_match": exact, "edit_similarity": pytest.approx(similarity)}


def test_no_reference_no_metrics() -> None:
    assert line_metrics("x\n", None) == {}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("ab", "ba", 2), ("x", "x", 0)],
)
def test_levenshtein(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_edit_similarity_of_nothing() -> None:
    assert edit_similarity("", "") == 1.0
    assert first_line("  \n\t\n") == ("", False)


# The standard library


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Twelve made-up modules of the test split, the first four long; one is too short."""
    names = [name for name in (f"module{i}" for i in range(200)) if split_of(name) == "test"][:12]
    found = [(name, "".join(f"x{j} = {j}\n" for j in range(120 if i < 4 else 30))) for i, name in enumerate(names)]
    found[-1] = (names[-1], "x = 1\n")
    monkeypatch.setattr(stdlib, "stdlib_modules", lambda: iter(found))
    return found


def test_stdlib_prompts_end_at_line_ends_and_reference_follows(modules: list[tuple[str, str]]) -> None:
    tokenizer, sources = small_tokenizer(), dict(modules)
    prompts = StdlibTask(20, 12).prompts("test", None, tokenizer)
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 20
    for prompt in prompts:
        name, number = prompt.id.split(":")
        assert len(prompt.tokens) == 20
        assert prompt.text == tokenizer.decode(prompt.tokens)
        assert prompt.text.endswith("\n")
        before = "".join(line + "\n" for line in sources[name].split("\n")[: int(number) - 1])
        assert sources[name].startswith(before + prompt.reference)
        assert before.endswith(prompt.text)


def test_stdlib_prompts_of_a_module_do_not_overlap(modules: list[tuple[str, str]]) -> None:
    tokenizer = small_tokenizer()
    by_module: dict[str, list[int]] = {}
    for prompt in StdlibTask(20, 12).prompts("test", None, tokenizer):
        name, number = prompt.id.split(":")
        lines = dict(modules)[name].split("\n")[: int(number) - 1]
        by_module.setdefault(name, []).append(len(tokenizer("\n".join([*lines, ""]))["input_ids"]))
    ends = [sorted(values) for values in by_module.values()]
    assert any(len(values) > 3 for values in ends)
    assert all(b - a >= 20 + 12 for values in ends for a, b in pairwise(values))


def test_stdlib_limit_covers_as_many_modules_as_it_can(modules: list[tuple[str, str]]) -> None:
    tokenizer, task = small_tokenizer(), StdlibTask(20, 12)
    every = task.prompts("test", None, tokenizer)
    for limit in (1, 5, 11, 14):
        prompts = task.prompts("test", limit, tokenizer)
        assert prompts == every[:limit]  # a longer run starts with the shorter one's prompts
        assert len({prompt.id.split(":")[0] for prompt in prompts}) == min(limit, 11)  # one module is too short


def test_stdlib_counts_the_bos_token(modules: list[tuple[str, str]]) -> None:
    copy = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for prompt in StdlibTask(20, 12).prompts("test", 3, tokenizer):
        assert len(prompt.tokens) == 20
        assert prompt.tokens[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in prompt.tokens[1:]


def test_real_stdlib_gives_prompts_and_splits_share_no_module() -> None:
    names = [name for name, _ in stdlib_modules()]
    assert {split_of(name) for name in names} == set(SHARES)
    prompts = StdlibTask(64, 32).prompts("val", 3, small_tokenizer())
    assert len(prompts) == 3
    assert all(split_of(prompt.id.split(":")[0]) == "val" for prompt in prompts)


@pytest.mark.parametrize("split", ["model", "dev", ""])
def test_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="train, val, test"):
        StdlibTask().prompts(split, 1, small_tokenizer())


def test_stdlib_refuses_what_cannot_be(modules: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError, match="reference_tokens"):
        StdlibTask(20, 0)
    with pytest.raises(UserError, match="has 10012 tokens"):
        StdlibTask(10_000, 12).prompts("test", 1, small_tokenizer())
    with pytest.raises(UserError, match="no tokenizer"):
        StdlibTask(20, 12).prompts("test", 1, None)


# A user's own file


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_jsonl_reads_prompts_and_references(tmp_path: Path) -> None:
    rows = [{"q": "one and one", "a": "two"}, "", {"q": "two and two", "a": "four"}]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    prompts = JsonlTask(path, prompt_field="q", reference_field="a", shares=None).prompts(
        "test", None, small_tokenizer()
    )
    assert [(p.id, p.text, p.reference) for p in prompts] == [
        ("mine.jsonl:1", "one and one", "two"),
        ("mine.jsonl:3", "two and two", "four"),
    ]
    assert prompts[0].tokens == small_tokenizer()("one and one")["input_ids"]
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    again = JsonlTask(str(packed), prompt_field="q", reference_field="a", shares=None)
    assert [p.tokens for p in again.prompts("test", None, small_tokenizer())] == [p.tokens for p in prompts]


def test_jsonl_splits_share_no_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i % 150}"} for i in range(200)]  # fifty of them twice
    task = JsonlTask(write_lines(tmp_path / "p.jsonl", rows))
    texts = {split: {p.text for p in task.prompts(split, None, small_tokenizer())} for split in SPLITS}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values())) == 150
    assert len(texts["train"]) > len(texts["test"]) > 0
    assert task.prompts("test", 3, small_tokenizer()) == task.prompts("test", None, small_tokenizer())[:3]
    assert json.dumps(task.describe()) == json.dumps(JsonlTask(task.path).describe())


def test_a_task_says_what_its_prompts_depend_on(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "one"}])
    (tmp_path / "moved").mkdir()
    moved = write_lines(tmp_path / "moved" / "p.jsonl", [{"prompt": "one"}])
    named = write_lines(tmp_path / "q.jsonl", [{"prompt": "one"}])  # other ids
    first = JsonlTask(path).describe()
    assert JsonlTask(moved).describe() == first != JsonlTask(named).describe()
    write_lines(tmp_path / "p.jsonl", [{"prompt": "two"}])
    assert JsonlTask(path).describe() != first


def test_a_task_that_hydra_built_is_json(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "question.jsonl", [{"turns": ["Hello"], "category": "writing"}])
    target = f"{SpecBenchTask.__module__}.SpecBenchTask"
    shares, categories = {"train": 50, "val": 25, "test": 25}, ["writing"]
    node = OmegaConf.create({"_target_": target, "path": path, "categories": categories, "shares": shares})
    about = instantiate(node).describe()
    assert json.loads(json.dumps(about)) == SpecBenchTask(path, shares, categories=categories).describe()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"prompt": "x"', "line 2: not JSON"),
        ('["prompt"]', "line 2: a list"),
        ({"text": "x"}, "line 2: no field 'prompt'; it has text"),
        ({"prompt": 3}, "line 2: 'prompt' is a int"),
        ({"prompt": ""}, "line 2: 'prompt' is empty"),
    ],
)
def test_jsonl_names_the_line_of_a_mistake(tmp_path: Path, row: Any, sentence: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError, match=sentence):
        JsonlTask(path, shares=None).prompts("test", None, small_tokenizer())


def test_file_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        JsonlTask(str(tmp_path / "none.jsonl")).prompts("test", 1, small_tokenizer())
    broken = tmp_path / "cut.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 99)[:-20])
    with pytest.raises(UserError, match=r"Cannot read .*cut.jsonl.gz"):
        JsonlTask(str(broken)).prompts("test", 1, small_tokenizer())
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        JsonlTask(str(tmp_path / "latin.jsonl")).prompts("test", 1, small_tokenizer())
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "word " * 50}])
    with pytest.raises(UserError, match=r"has no prompts in split 'test'.* for evaluation only, set data\.shares=null"):
        JsonlTask(long, max_prompt_tokens=5, shares=None).prompts("test", 1, small_tokenizer())
    with pytest.raises(UserError, match="add up to 100"):
        JsonlTask(long, shares={"train": 50, "val": 10, "test": 10})
    with pytest.raises(UserError, match="no chat template"):
        JsonlTask(long, shares=None, chat=True).prompts("test", 1, small_tokenizer())


# Benchmarks


def test_gsm8k_final_number() -> None:
    assert gsm8k.final_number("so 3 + 4 = 7\n#### 1,234.50", finished=True) == gsm8k.final_number("1234.5", True)
    assert gsm8k.final_number("she has 3, then 5.\n\nQuestion: what is 9?") == 5
    assert gsm8k.final_number("#### -2\n#### 4") == -2
    assert gsm8k.final_number("no idea", finished=True) is None


@pytest.mark.parametrize(
    ("cut", "number"),
    [
        ("He has 13 lego sets, so he has 13 * $15 =", None),  # a number on the way
        ("13 * 15 = 195\n#### 19", None),  # of 195, perhaps
        ("13 * 15 = 195\n#### 195\n#### 1", 195),
        ("#### 2\nThe answer is", 2),
        ("####\nThe answer is 2", None),
    ],
)
def test_an_answer_that_was_cut_off_has_the_number_that_it_came_to(cut: str, number: int | None) -> None:
    assert gsm8k.final_number(cut) == number
    prompt = Prompt("gsm8k:1", [1], "13 sets of 15\n#### 15")
    assert Gsm8kTask("test.jsonl").metrics("so he has 13 * $15 =", prompt) == {"number_match": 0.0}
    assert Gsm8kTask("test.jsonl").metrics("so he has 15", prompt, finished=True) == {"number_match": 1.0}


def test_spider_match() -> None:
    task, prompt = SpiderTask("dev.json"), Prompt("spider:t:0", [1], 'SELECT name FROM t WHERE a  = "b"')
    assert task.metrics("select name from t where a='b';\nselect 1", prompt) == {"query_match": 1.0}
    assert task.metrics("select name from t where a='b'", prompt) == {"query_match": 0.0}  # may go on
    assert task.metrics("select name from t where a='b'", prompt, finished=True) == {"query_match": 1.0}
    assert task.metrics("select age from t;", prompt) == {"query_match": 0.0}


@pytest.mark.parametrize(("kind", "count"), [(SpecBenchTask, 240), (MtBenchTask, 80)])
def test_conversation_benchmarks(kind: type[FileTask], count: int) -> None:
    task = kind(data_file(f"{kind.name}/question.jsonl"), **ALL)
    prompts = task.prompts("test", None, small_tokenizer())
    assert len(prompts) == count
    assert prompts[0].id == f"{kind.name}:81"
    assert prompts[0].text.startswith("Compose an engaging travel blog")
    if kind is SpecBenchTask:
        only = SpecBenchTask(task.path, **ALL, categories=["translation"]).prompts("test", None, small_tokenizer())
        assert len(only) == 40
        assert all(prompt.reference for prompt in only)


@pytest.mark.parametrize(
    ("kind", "name", "count", "metric"),
    [
        (HumanEvalTask, "humaneval/HumanEval.jsonl.gz", 164, "exact_match"),
        (Gsm8kTask, "gsm8k/test.jsonl", 660, "number_match"),
        (SquadTask, "squad/xquad.en.json", 1190, "f1"),
        (SpiderTask, "spider/dev.json", 541, "query_match"),
    ],
)
def test_references_of_benchmarks_match_themselves(kind: type[FileTask], name: str, count: int, metric: str) -> None:
    prompts = kind(data_file(name), **ALL).prompts("test", None, small_tokenizer())
    assert len({prompt.id for prompt in prompts}) == len(prompts) == count
    task = kind(data_file(name), **ALL)
    assert all(task.metrics(prompt.reference or "", prompt, finished=True)[metric] == 1.0 for prompt in prompts)


@pytest.mark.parametrize(
    ("system", "exact", "f1"), [("match_lstm_ensemble", 68.1355, 76.8577), ("logreg_baseline", 40.4143, 51.1296)]
)
def test_squad_scores_of_published_systems(system: str, exact: float, f1: float) -> None:
    examples = list(SquadTask(data_file("squad/dev-half.json")).examples())
    answers = json.loads(Path(data_file(f"squad/predictions_{system}.json")).read_text())
    scores = [squad.answer_metrics(answers.get(example.id, ""), example.references) for example in examples]
    assert 100 * sum(s["exact_match"] for s in scores) / len(scores) == pytest.approx(exact, abs=5e-5)
    assert 100 * sum(s["f1"] for s in scores) / len(scores) == pytest.approx(f1, abs=5e-5)


def test_benchmarks_without_their_file(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"rows": []}')
    (tmp_path / "turns.jsonl").write_text('{"turns": "hello"}\n')
    for task, sentence in (
        (SquadTask(str(tmp_path / "odd.json")), "format of SQuAD"),
        (SpecBenchTask(str(tmp_path / "turns.jsonl")), "'turns' must be a list"),
        (SpiderTask(str(tmp_path / "odd.json")), "Cannot read .*tables.json"),
    ):
        with pytest.raises(UserError, match=sentence):
            task.prompts("test", None, small_tokenizer())


def test_spider_prompt_shows_the_schema(tmp_path: Path) -> None:
    schema = {
        "db_id": "shop",
        "table_names_original": ["item", "sale"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "price"], [1, "item_id"]],
    }
    (tmp_path / "tables.json").write_text(json.dumps([schema]))
    (tmp_path / "dev.json").write_text(json.dumps([{"db_id": "shop", "question": "How many?", "query": "SELECT 1"}]))
    task = SpiderTask(str(tmp_path / "dev.json"))
    (example,) = task.examples()
    assert example.text == "CREATE TABLE item (id, price);\nCREATE TABLE sale (item_id);\n-- How many?\n"
    before = task.describe()
    (tmp_path / "tables.json").write_text(json.dumps([schema, {**schema, "db_id": "other"}]))
    assert task.describe() != before  # the schemas are part of the prompts
    assert spider.normalise("SELECT  count( * )  FROM t;") == spider.normalise("select count(*) from t")


def test_a_prompts_file_as_the_readme_describes_it(tmp_path: Path) -> None:
    """A mark at its start, references by their usual name, ids of the user's own."""
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": "a", "reference": "b", "id": "first"}, {"prompt": "c", "id": 7}, {"prompt": "d"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    found = JsonlTask(str(path), shares=None).prompts("test", None, small_tokenizer())
    assert [(prompt.id, prompt.reference) for prompt in found] == [("first", "b"), ("7", None), ("own.jsonl:3", None)]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ['{"prompt": "a", "id": "x"}', '{"prompt": "b"}', '{"prompt": "c", "id": "x"}'],
            "line 3: the id 'x' is that of line 1",
        ),
        (['{"prompt": "a", "id": [1]}'], r"line 1: 'id' is \[1\]"),
        (['{"prompt": "a", "reference": 3}'], "line 1: 'reference' is a int"),
        (["", " "], "is empty; give a file"),
        ([], "is empty; give a file"),
    ],
)
def test_mistakes_in_a_prompts_file_name_the_line(tmp_path: Path, lines: list[str], sentence: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=sentence):
        JsonlTask(str(path), shares=None).prompts("test", None, small_tokenizer())


def test_a_mistyped_category_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps({"category": name, "turns": ["a"]}) + "\n" for name in ("math", "writing")))
    task = SpecBenchTask(str(path), shares=None, categories=["math", "wrting"])
    with pytest.raises(UserError, match=r"holds 'wrting', which no line .* choose among math, writing"):
        task.prompts("test", 1, small_tokenizer())
