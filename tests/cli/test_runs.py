"""`ssl runs`: the list, comparisons and the best run, as a person and as a program see them."""

import json
import subprocess
import sys

import pytest

from selfsup.cli.main import main
from selfsup.cli.runs import ago, size


def make(ssl, name, loss=1.0, knn=None, validation=(), objective="guess", batch=8, steps=20):
    folder = ssl.folder / name
    (folder / "checkpoints/step-00000020").mkdir(parents=True)
    (folder / "checkpoints/step-00000020/manifest.json").write_text("{}")
    (folder / "run.toml").write_text(f'[objective]\nname = "{objective}"\n[train]\nsteps = {steps}\nbatch = {batch}\n')
    rows = [{"step": 9, "measured": {"validation/loss": value}} for value in validation]
    rows += [{"step": 9, "measured": {"online/knn": knn}}] if knn else []
    metrics = {"accuracy": loss / 10, "spread": -loss}
    rows += [{"step": 19, "loss": loss, "samples_per_second": 1234.0, "metrics": metrics, "time": 1e9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def columns(out):
    """The list as {run: {column: text}}."""
    head, _, *rows = [line for line in out.splitlines() if line.strip()]
    titles = [part for part in head.split("  ") if part.strip()]
    split = [[part.strip() for part in line.split("  ") if part.strip()] for line in rows]
    return {row[0]: dict(zip([t.strip() for t in titles], row, strict=True)) for row in split}


def test_the_list(ssl):
    make(ssl, "runs/a", 1.5, knn=0.8125, validation=(3.0, 2.0, 2.5))
    make(ssl, "runs/b", 2.5, knn=0.5, validation=(4.0,), steps=40)
    rows = columns(ssl("runs")[0])
    a = {key: rows["runs/a"][key] for key in ("objective", "data", "steps", "state", "loss", "validation", "online")}
    assert list(a.values()) == ["guess", "built-in sample", "20/20", "done", "1.5", "2", "knn 81.2%"]
    assert rows["runs/a"]["samples/s"] == "1,234"
    assert (rows["runs/b"]["state"], rows["runs/b"]["steps"]) == ("stopped", "20/40")
    assert ssl("runs", "list", "runs")[0] == ssl("runs", "runs")[0]


def test_columns_that_no_run_fills_are_left_out(ssl):
    make(ssl, "runs/a")
    assert "online" not in ssl("runs")[0]


def test_json(ssl):
    make(ssl, "here/a", 1.5, knn=0.8)
    (facts,) = json.loads(ssl("runs", "here", "--json")[0])
    assert (facts["run"], facts["loss"], facts["measured"]) == ("here/a", 1.5, {"online/knn": 0.8})
    assert json.loads(ssl("runs", "--json")[0]) == []


def test_a_damaged_run_is_listed_and_harms_no_other(ssl):
    make(ssl, "runs/a")
    (make(ssl, "runs/b") / "run.toml").write_text("[[[")
    out, _ = ssl("runs")
    rows = columns(out[: out.index("\nruns/b: ")])
    assert (rows["runs/a"]["state"], rows["runs/b"]["state"]) == ("done", "damaged")
    assert "run.toml cannot be read as TOML" in out


def test_no_run_yet(ssl):
    assert "there is no run in runs yet; begin one: ssl train" in ssl("runs")[0]
    (ssl.folder / "photos").mkdir()
    assert "there is no run in photos yet" in ssl("runs", "photos")[0]
    assert "there is no folder 'photo'; did you mean 'photos'?" in ssl("runs", "photo", code=1)[1]


def test_a_real_run(toys):
    toys("train", "--plugin", "guess", "--steps", "5", "--device", "cpu", "--set", "data.workers=0")
    ((name, row),) = columns(toys("runs")[0]).items()
    assert name.startswith("runs/guess-")
    assert (row["steps"], row["state"]) == ("5/5", "done")
    assert toys("runs", "best")[0].split()[2] == name


def test_compare_shows_what_differs(ssl):
    make(ssl, "x/a", 1.5, knn=0.8, validation=(2.0, 3.0))
    make(ssl, "x/b", 2.5, batch=16)
    facts = json.loads(ssl("runs", "compare", "x/a", "x/b", "--json")[0])
    assert facts["runs"] == ["x/a", "x/b"]
    assert facts["settings"] == {"train.batch": [8, 16]}
    assert facts["figures"]["loss"] == [1.5, 2.5]
    assert facts["figures"]["validation/loss"] == [3.0, None]
    assert facts["figures"]["validation/loss, lowest"] == [2.0, None]
    lines = [line.split() for line in ssl("runs", "compare", "x/a", "x/b")[0].splitlines()]
    for line in (["a", "b"], ["train.batch", "8", "16"], ["online/knn", "0.8", "-"], ["state", "done", "done"]):
        assert line in lines


def test_compare_names_folders_of_one_name_whole_and_says_if_nothing_differs(ssl):
    for name in ("x/a", "y/a"):
        make(ssl, name)
    out, _ = ssl("runs", "compare", "x/a", "y/a")
    assert out.split()[:2] == ["x/a", "y/a"]
    assert "all settings are equal" in out


def test_compare_needs_two_runs(ssl):
    make(ssl, "x/alpha")
    assert "name two runs or more" in ssl("runs", "compare", "x/alpha", code=2)[1]
    assert "did you mean 'alpha'?" in ssl("runs", "compare", "x/alpha", "x/alpa", code=1)[1]


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ([], ["b", "c"]),  # by validation/loss, where it was measured
        (["--by", "loss"], ["a", "b", "c"]),
        (["--by", "loss", "--highest"], ["c", "b", "a"]),
        (["--by", "online/knn"], ["a", "c"]),
        (["--by", "accuracy"], ["c", "b", "a"]),
        (["--by", "spread", "--lowest"], ["c", "b", "a"]),
    ],
)
def test_the_best_run(ssl, words, order):
    make(ssl, "runs/a", 1.0, knn=0.9)
    make(ssl, "runs/b", 2.0, validation=(5.0, 1.0, 7.0))
    make(ssl, "runs/c", 3.0, validation=(4.0,), knn=0.5)
    facts = json.loads(ssl("runs", "best", *words, "--json")[0])
    assert [entry["run"] for entry in facts["ranked"]] == [f"runs/{name}" for name in order]
    assert facts["without"] == 3 - len(order)
    lines = ssl("runs", "best", *words)[0].splitlines()
    assert lines[1].split()[0] == f"runs/{order[0]}"


def test_what_is_better_must_be_known_or_said(ssl):
    make(ssl, "runs/a")
    assert (
        "is more of 'spread' better, or less? Say --highest or --lowest"
        in ssl("runs", "best", "--by", "spread", code=2)[1]
    )
    assert (
        "no run in runs has a figure called 'los'; did you mean 'loss'?"
        in ssl("runs", "best", "--by", "los", code=1)[1]
    )


def test_losses_of_different_objectives_are_not_compared_in_silence(ssl):
    make(ssl, "runs/a")
    make(ssl, "runs/b", objective="other")
    assert "losses of different objectives do not compare: guess, other" in ssl("runs", "best")[0]
    assert "do not compare" not in ssl("runs", "best", "--by", "accuracy")[0]


def test_no_run_has_no_best(ssl):
    assert "no run was found in runs" in ssl("runs", "best", code=1)[1]


def test_torch_is_not_imported(ssl):
    make(ssl, "runs/a")
    code = "import sys\nfrom selfsup.cli.main import main\ntry:\n    main({})\nexcept SystemExit:\n    pass\n"
    check = "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    for words in (["runs"], ["runs", "compare", "runs/a", "runs/a"], ["runs", "best"]):
        subprocess.run([sys.executable, "-c", code.format(words) + check], check=True, cwd=ssl.folder)


def test_a_shell_is_offered_runs(ssl, monkeypatch):
    make(ssl, "runs/a-1")
    make(ssl, "runs/a-2")
    for words, offered in (
        ("ssl runs compare runs/a-1 ru", ["plain,runs/a-1", "plain,runs/a-2"]),
        ("ssl runs b", ["plain,best", "dir,b"]),
        ("ssl runs ru", ["plain,runs/a-1", "plain,runs/a-2"]),
    ):
        monkeypatch.setenv("_SSL_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        ssl.capsys.readouterr()
        with pytest.raises(SystemExit):
            main([])
        assert ssl.capsys.readouterr().out.split() == offered


def test_times_and_sizes_are_short():
    assert [ago(s) for s in (0, 59, 60, 7200, 90000, 86400 * 400)] == ["0 s", "59 s", "1 min", "2 h", "1 d", "1 y"]
    assert [size(n) for n in (12, 1234, 123456789, 2e9)] == ["12 B", "1.23 kB", "123 MB", "2 GB"]
