"""Write the measured tables into README.md and redraw the figures: `python docs/results_to_readme.py`.

They come from the files in docs/results that `latent-grpo compare` and `latent-grpo train` wrote.
"""
import json
from pathlib import Path

from latent_grpo.compare import draw, table_rows, table_text
from latent_grpo.plots import save_figure
from latent_grpo.stability import plot_long
from latent_grpo.study import read_table
from latent_grpo.verdicts import verdict_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"


def made_by(record):
    """Command, commit, hardware and date of a record."""
    return (f"`{record['command']}`, commit `{record['commit']}`, {record['hardware']}, "
            f"{record['date']}.")


def toy(record):
    """The comparison, and the line that says how it was made."""
    seeds = record["seeds"]
    how = (f"Mean over seeds {seeds[0]}-{seeds[-1]} ± half a 95 % t interval; Pass@1 in %, lengths in "
           "steps, KL to the method's own start in nats per step, minutes of training on one "
           f"thread. {made_by(record)}")
    return f"{table_text(table_rows(record['results']))}\n\n{how}\n"


def gsm8k(record):
    """Pass@1 of one saved policy on each test file."""
    lines = ["| test file | problems | Pass@1 noise-free | sampled | latent | text | unparsed |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for split, modes in record["scores"].items():
        free, drawn = modes["noise_free"], modes["sampled"]
        cells = [split, free["problems"], *(
            f"{100 * s['pass1']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]"
            for s in (free, drawn)), f"{free['latent_length']:.1f}", f"{free['text_length']:.1f}",
            f"{100 * free['unparsed']:.1f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    how = (f"One seed; 95 % intervals over problems; sampled: {drawn['samples']} samples a problem. "
           f"{made_by(record)}")
    return "\n".join(lines) + f"\n\n{how}\n"


WORDS = {"multiarith": "MultiArith", "svamp": "SVAMP", "mawps": "MAWPS, held out"}


def wordproblems(record):
    """Pass@1 of every method on three tests of real word problems, without noise and sampled."""
    tests = {split: table_rows(record["results"], split) for split in WORDS}
    size = lambda split: record["results"][0]["scores"][split]["noise_free"]["problems"]
    percent = lambda x: f"{100 * x[0]:.1f} ± {50 * (x[2] - x[1]):.1f}"
    heads = [f"{name} ({size(split)})" for split, name in WORDS.items()]
    lines = ["| method | " + " | ".join(heads) + " | latent + text | minutes |", "|---" + "|---:" * 5 + "|"]
    for i, row in enumerate(tests["multiarith"]):
        cells = [f"{percent(rows[i]['pass1'])} / {percent(rows[i]['sampled'])}" for rows in tests.values()]
        cells += [f"{row['latent'][0]:.1f} + {row['text'][0]:.1f}", f"{row['minutes'][0]:.1f}"]
        lines.append("| " + " | ".join([row["method"], *cells]) + " |")
    seeds = ", ".join(map(str, record["seeds"]))
    how = (f"Noise-free / sampled Pass@1 in %, mean over seeds {seeds} ± half a 95 % t interval; steps and minutes as above, "
           f"the minutes of a start from nothing. {made_by(record)}")
    return "\n".join(lines) + f"\n\n{how}\n"


def study(record):
    """Every claim that was run, its verdict, and the first rung's effect."""
    runs = ", ".join(f"{name} {n}" for name, n in record["runs"].items())
    ran = [v for v in record["verdicts"] if v["rungs"]]
    rest = lambda word: "; ".join(v["claim"] for v in record["verdicts"] if v["verdict"] == word)
    how = (f"Differences of noise-free Pass@1 in points with 95 % intervals (C2, length: a ratio; C8: hundredths of a share; O1: a gradient factor; O2: a rank correlation; drift: KL to the start, nats a step), on the first rung that was run. "
           f"Lines of the table: {runs}. {made_by(record)}")
    for word, text in (("not run", "Not run yet"), ("no verdict", "Run, but nothing there to judge")):
        how += f" {text}: {rest(word)}." if rest(word) else ""
    return f"{verdict_table(ran, rungs=False)}\n\n{how}\n"


def with_tables(readme):
    """README text with the measured parts replaced."""
    for name, table in (("toy", toy), ("study", study), ("wordproblems", wordproblems), ("gsm8k", gsm8k)):
        record = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
        head, rest = readme.split(start)
        readme = head + start + table(record) + end + rest.split(end)[1]
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
    record = json.loads((RESULTS / "toy.json").read_text("utf-8"))
    save_figure(draw(table_rows(record["results"])), ROOT / "docs/images/toy")
    save_figure(plot_long(read_table(RESULTS / "study.jsonl.gz")), ROOT / "docs/images/long")
