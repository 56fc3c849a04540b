"""The scripts of the tutorials on real models and data, as `--small` runs them."""

import runpy
import sys
from pathlib import Path

import pytest

from serpette import zoo

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "image": ("vit-s", "fashion-mnist"),
    "text": ("minilm-l6", "movie-snippets"),
    "llm": ("smollm2-135m", "mmlu-cot"),
}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:a training of .* steps")  # so few examples
@pytest.mark.parametrize("name", NEEDS)
def test_the_script_of_the_tutorial(name, tmp_path, monkeypatch, capsys):
    for entry in NEEDS[name]:
        if not zoo.is_cached(entry):
            pytest.skip(f"{entry} is not cached; run `serpette fetch {entry}`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    table, after = capsys.readouterr().out.split("to random\n")[1].split("\n\n")
    lines = table.splitlines()
    assert len(lines) == (5 if name == "llm" else 4)
    assert [line.count(" to ") for line in lines] == ([1, 0, 1, 2, 1] if name == "llm" else [0, 1, 2, 1])
    assert " of the time." in after
