"""Runs recipes, cut down where they are long, and puts their reports and answers into docs/gallery.md.

python docs/gallery.py      # twenty minutes on one core; what is finished only gets its report anew
"""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# name of the run: (heading, what the report shows, what it is made by, but for --out)
RUNS = {
    "demo": (
        "A ViT on Fashion-MNIST: fewer images, fewer weights",
        "What `make demo` makes: a choice by DLC and one by herding beside a random one, and half of the "
        "heads and channels cut, with the pictures that were kept and left.",
        "run recipes/demo.yaml",
    ),
    "rows": (
        "Ways to tune the same ViT",
        "Rows, LoRA, DoRA, SHiRA, everything and the head alone; two seeds of few images, from which "
        "little follows.",
        "run recipes/vit_rows.yaml --seeds 2 --data.train_limit 80 --data.test_limit 150 --tune.epochs 2",
    ),
    "language": (
        "Instructions for a small language model",
        "Choices of half and of a tenth, by perplexity of held-out answers; two seeds of twenty examples, so "
        "few that the report finds little.",
        "run recipes/smollm2_instruct.yaml --seeds 2 --data.train_limit 20 --data.test_limit 8 "
        "--data.max_length 256",
    ),
    "advice": (
        "What the adviser says of movie snippets",
        "A small encoder, 1,000 texts, a third of the time: health of the data, every choice at every share, "
        "and what it recommends.",
        "advise --model minilm-l6 --dataset movie-snippets --limit 1000 --test-limit 400 --max-length 64 "
        "--time 0.33x --compare",
    ),
    "advised": (
        "Whether the advice came true",
        "The recipe that it wrote, beside everything and a random choice: predicted beside actual.",
        "run runs/gallery/advice.yaml",
    ),
}
HEAD = """\
# Reports

Each run ends with a report of one file, which needs no network. Its first line is the answer. These are
as they came out, differences within the noise included; `python docs/gallery.py` makes them again.
"""


def report_of(name: str, made_by: str) -> Path:
    """The report of a run or an advice, which is made if it is missing."""
    folder = Path("runs/gallery") / name
    result = ROOT / folder / "result.json"
    out = f"{folder}.yaml" if made_by.startswith("advise") else str(folder)
    command = ["report", str(folder)] if result.exists() else [*made_by.split(), "--out", out]
    subprocess.run([sys.executable, "-m", "serpette.cli", *command], cwd=ROOT, check=True)
    return ROOT / folder / "report.html"


def answer(page: str) -> str:
    found = re.search(r'<h1 id="answer">(.*?)</h1>', page, re.DOTALL)
    assert found, "the report has no answer"
    return found[1].replace("<b>", "**").replace("</b>", "**")


def main() -> None:
    text = HEAD
    for name, (heading, shows, made_by) in RUNS.items():
        page = report_of(name, made_by).read_text(encoding="utf-8")
        target = DOCS / "gallery" / name / "report.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
        text += f"\n## {heading}\n\n{shows}\n\n> {answer(page)}\n\n    serpette {made_by}\n"
        text += f"\n[The report](gallery/{name}/report.html) ({len(page.encode()) / 1000:.0f} kB)\n"
    (DOCS / "gallery.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
