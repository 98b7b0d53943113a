"""ssl eval on a toy run: the table, the JSON, and what it says when it cannot judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from selfsup.cli.eval import evaluate
from selfsup.kernel import Backbone, Loss, Modality, Objective, Plugins, Signal, Stem, about, compose, saving
from selfsup.kernel.config import to_toml
from selfsup.kernel.errors import BadSample, DataError, StateError
from selfsup.plugins.common import compare, judges
from selfsup.plugins.services.data import Data


class Numbers(Modality):
    """Text files of eight numbers; the class shows in which of the first six is large, the last two are noise."""

    field, suffixes = "number", (".txt",)

    def __init__(self, *, padded: Annotated[bool, about("as if lengths differed")] = False) -> None:
        self.padded = padded

    def read(self, stored):
        text = stored.read_text() if isinstance(stored, Path) else stored["bytes"].decode()
        if text == "bad":
            raise BadSample("it is bad")
        return torch.tensor([float(word) for word in text.split()])

    def collate(self, raws, draw=None):
        x = torch.stack(raws)[..., None]
        return Signal(x, torch.ones(x.shape[:2]) if self.padded else None)

    def stem(self, width):
        return Embed(width)

    def sample(self):
        return [{"number": {"bytes": row(i % 2, i).encode()}, "label": i % 2} for i in range(40)]


class Embed(Stem):
    def __init__(self, width):
        super().__init__()
        self.width, self.size = width, 1
        self.embed = nn.Linear(1, width)

    def latents(self, raw):
        return Signal(self.embed(raw.x), raw.segments)


class Mix(Backbone):
    def __init__(self, *, width: Annotated[int, about("of a token", ge=1)] = 6) -> None:
        super().__init__()
        self.width, self.mix = width, nn.Linear(8, width)

    def forward(self, tokens, *, causal=False, context=None):
        return Signal(self.mix(tokens.x.mean(2))[:, None])


class Nothing(Objective):
    towers, paper = ("student",), "a toy"
    presets: ClassVar = {"base": {"modality.name": "numbers", "backbone.name": "mix", "train.seed": 3}}

    def __init__(self, student) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch, step):
        return Loss(self.student(batch["student"]).x.sum())


class Toys(Plugins):
    toys: ClassVar[dict[str, dict[str, Any]]] = {
        "objectives": {"nothing": Nothing},
        "modalities": {"numbers": Numbers},
        "backbones": {"mix": Mix},
        "services": {"data": Data},
        "commands": {},
    }

    def names(self, kind):
        return sorted(self.toys[kind])

    def load(self, kind, name):
        return self.toys[kind][name]


def row(label, number):
    g = torch.Generator().manual_seed(number)
    x = torch.randn(8, generator=g)
    x[label] += 6
    x[6:] *= 40
    return " ".join(f"{value:.4f}" for value in x.tolist())


def write(folder, classes, count=20, name="{label}/{number}.txt", first=0):
    for label in classes:
        for number in range(first, first + count):
            path = folder / name.format(label="abcdef"[label], number=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(row(label, 1000 * label + number))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run whose training made it perfect: feature c is number c, for the first six."""
    return save(tmp_path / "runs/good", {})


def save(folder, settings):
    plugins = Toys()
    whole = compose.resolve(plugins, {"objective": {"name": "nothing"}, "train": {"device": "cpu"}, **settings})
    objective = compose.build(plugins, whole)
    with torch.no_grad():
        objective.student.stem.embed.weight.fill_(1)
        objective.student.stem.embed.bias.zero_()
        objective.student.backbone.mix.weight.copy_(torch.eye(6, 8))
        objective.student.backbone.mix.bias.zero_()
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(to_toml(whole))
    saving.save(folder / "checkpoints", 1234, {"model": objective.state_dict()}, {"settings": whole})
    return folder


def call(*arguments, plugins=None):
    said = CliRunner().invoke(evaluate, [str(a) for a in arguments], obj=plugins or Toys())
    if said.exception and not isinstance(said.exception, SystemExit):
        raise said.exception
    assert said.exit_code == 0, said.output
    return said.stdout


@pytest.mark.parametrize("judge", ["knn", "probe"])
def test_the_rows_share_data_and_judge(run, tmp_path, judge):
    out = json.loads(call(judge, run, "--data", write(tmp_path / "data", range(4)), "--json"))
    assert (out["judge"], out["metric"], out["step"], out["run"]) == (judge, "accuracy", 1234, str(run))
    assert (out["bank"], out["query"], out["classes"], out["skipped"]) == (64, 16, 4, {})
    rows = {key: value["accuracy"] for key, value in out["rows"].items()}
    assert list(rows) == ["trained", "random", "raw", "chance"]
    assert rows["trained"] > 0.9
    assert rows["random"] < rows["trained"]
    assert rows["chance"] == 0.25
    assert out["rows"]["chance"]["error"] == pytest.approx((0.25 * 0.75 / 16) ** 0.5)
    assert out["settings"] == ({"k": 20, "temperature": 0.07} if judge == "knn" else {})
    assert ("C" in out["rows"]["trained"]["found"]) == (judge == "probe")
    assert any("no --test" in note for note in out["notes"])


def test_it_judges_by_the_functions_for_everyone(run, tmp_path, monkeypatch):
    """Bank and query, trained and not, go through `features`; guesses are those of `judges.knn`."""
    data, calls = write(tmp_path / "data", range(3)), []
    real = compare.features

    def spy(tower, *rest, **options):
        calls.append(real(tower, *rest, **options))
        return calls[-1]

    monkeypatch.setattr(compare, "features", spy)
    out = json.loads(call("knn", run, "--data", data, "-k", 5, "--temperature", 0.5, "--json"))
    assert len(calls) == 6
    for name, bank, query in zip(("trained", "random", "raw"), calls[::2], calls[1::2], strict=True):
        guess = judges.knn(bank.x, bank.labels, query.x, k=5, temperature=0.5)
        assert out["rows"][name]["accuracy"] == (guess == query.labels).double().mean()


def test_a_test_set_of_its_own(run, tmp_path):
    data, test = write(tmp_path / "data", [1, 2, 3]), write(tmp_path / "test", [0, 2, 3], count=4, first=50)
    out = json.loads(call("knn", run, "--data", data, "--test", test, "--json"))
    assert (out["bank"], out["query"], out["classes"]) == (60, 12, 4)
    assert out["rows"]["trained"]["accuracy"] == pytest.approx(8 / 12)  # labels mean the same; `a` cannot be known
    assert "classes that only --test has, so always wrong: a" in out["notes"]


def test_the_table_for_people(run, tmp_path):
    out = call("knn", run, "--data", write(tmp_path / "data", range(4)))
    assert f"knn, k = 20, temperature = 0.07: {run}, step 1,234" in out
    assert "64 samples to learn from, 16 to be judged on, 4 classes" in out
    assert "25.0 ± 10.8" in out
    for line in ("trained", "random initialisation", "raw input", "most frequent class"):
        assert f"\n{line}" in out
    assert "C = " in call("probe", run, "--data", tmp_path / "data")


def test_without_data_it_is_the_runs_own(tmp_path):
    data = write(tmp_path / "data", range(2))
    known = save(tmp_path / "known", {"data": {"paths": [str(data)]}})
    assert json.loads(call("knn", known, "--json"))["bank"] == 32
    sample = save(tmp_path / "sample", {})
    out = json.loads(call("knn", sample, "--json"))
    assert "built-in sample" in out["notes"][0]
    assert out["bank"] + out["query"] == 40


def test_labels_from_file_names(run, tmp_path):
    data = write(tmp_path / "data", range(3), name="{label}_{number}.txt")
    with pytest.raises(
        DataError, match=r"no sample of .* has a label, which eval needs; labels are found in class fol"
    ):
        call("knn", run, "--data", data)
    assert json.loads(call("knn", run, "--data", data, "--label", r"^([a-z])_", "--json"))["classes"] == 3


def test_padded_samples_have_no_raw_row(tmp_path):
    run = save(tmp_path / "padded", {"modality": {"name": "numbers", "padded": True}})
    data = write(tmp_path / "data", range(2))
    raw = json.loads(call("knn", run, "--data", data, "--json"))["rows"]["raw"]
    assert raw["accuracy"] is None
    assert "different lengths" in raw["why"]
    assert "samples of different lengths have no raw features" in call("knn", run, "--data", data)


def test_limits_are_seeded(run, tmp_path):
    data, test = write(tmp_path / "data", range(3)), write(tmp_path / "test", range(3), first=50)
    first = json.loads(call("knn", run, "--data", data, "--limit", 30, "--json"))
    assert first["bank"] + first["query"] == 30
    assert first == json.loads(call("knn", run, "--data", data, "--limit", 30, "--json"))
    both = json.loads(call("knn", run, "--data", data, "--test", test, "--limit", 25, "--json"))
    assert (both["bank"], both["query"]) == (25, 25)


def test_bad_samples_are_counted_up_to_a_limit(run, tmp_path):
    data = write(tmp_path / "data", range(2), count=40)
    (data / "a/7.txt").write_text("bad")
    out = json.loads(call("knn", run, "--data", data, "--json"))
    assert out["bank"] + out["query"] == 79
    assert out["skipped"] == {str(data / "a/7.txt"): "it is bad"}
    assert "1 samples could not be used" in call("knn", run, "--data", data)
    (data / "b/8.txt").write_text("bad")
    with pytest.raises(
        DataError, match=r"2 of 80 samples cannot be used, more than the run's data\.max_bad_fraction = 0\.01"
    ):
        call("knn", run, "--data", data)


def test_errors_speak_to_people(run, tmp_path):
    write(tmp_path / "data", range(2), count=3)
    with pytest.raises(StateError, match=r"'.*goood' is not the folder of a run; did you mean 'good'"):
        call("knn", run.parent / "goood", "--data", tmp_path / "data")
    with pytest.raises(DataError, match=r"all 3 labelled samples of .* are 'x'; at least two classes"):
        call("knn", run, "--data", write(tmp_path / "one", [0], 3, "x_{number}.txt"), "--label", "^(x)_")
    with pytest.raises(DataError, match="--test needs --data beside it"):
        call("knn", run, "--test", tmp_path / "data")
    with pytest.raises(DataError, match=r"no labelled sample of .* is left to be judged on"):
        call("knn", run, "--data", write(tmp_path / "few", range(3), 1))


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    data = write(tmp_path / "data", range(2))
    weights = next(run.glob("checkpoints/*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(StateError, match="has no checkpoint that can be used; step-00001234 is damaged"):
        call("knn", run, "--data", data)
