"""Write the measured table into README.md and redraw its figure: `python docs/results_to_readme.py`.

Both come from docs/results/toy.json, which `latent-grpo compare` wrote.
"""
import json
from pathlib import Path

from latent_grpo.compare import draw, table_rows, table_text
from latent_grpo.plots import save_figure

ROOT = Path(__file__).parent.parent
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->"


def measured(record):
    """The table and the line that says how it was made."""
    seeds = record["seeds"]
    made = (f"Mean over seeds {seeds[0]}-{seeds[-1]} ± half a 95 % t interval; {record['split']} split, "
            f"512 problems. `{record['command']}`, commit `{record['commit']}`, "
            f"{record['hardware']}, {record['date']}.")
    return f"{table_text(table_rows(record['results']))}\n\n{made}\n"


def with_table(readme, record):
    """README text with the measured part replaced."""
    head, rest = readme.split(START)
    return head + START + measured(record) + END + rest.split(END)[1]


if __name__ == "__main__":
    record = json.loads((ROOT / "docs/results/toy.json").read_text("utf-8"))
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text("utf-8"), record), "utf-8")
    save_figure(draw(table_rows(record["results"])), ROOT / "docs/images/toy")
