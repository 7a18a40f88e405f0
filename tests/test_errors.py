"""Bad input: one clear error that says what and where, and no traceback on the command line."""
import gzip
import json
import os
import subprocess
import sys

import pytest
import torch

from helpers import config, tiny, word_task
from latent_grpo.cli import main
from latent_grpo.grading import check_gold, is_correct
from latent_grpo.grpo import group_advantages
from latent_grpo.data import problem_rows
from latent_grpo.presets import PRESETS, make_config, text_task, train_tokenizer
from latent_grpo.runs import load_checkpoint
from latent_grpo.sampling import Sampling
from latent_grpo.sft import train_sft
from latent_grpo.tasks import WordVocab, chain_rows, chain_task, load_rows
from latent_grpo.train import draw_groups, load_policy, run, train_rl

GOOD = '{"problem": "2 + 2", "answer": "4"}'

FILES = {    # name: (content, what the error says)
    "empty.jsonl": (b"", "empty.jsonl: no rows"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: no rows"),
    "broken.jsonl": (f'{GOOD}\n{{"problem": "a"\n'.encode(), "broken.jsonl line 2: not valid JSON"),
    "missing.jsonl": (f'{GOOD}\n\n{{"problem": "a"}}'.encode(),
                      "missing.jsonl line 3: field 'answer' is missing.*problem"),
    "null.jsonl": (b'{"problem": "a", "answer": null}', "line 1: field 'answer' is missing"),
    "list.jsonl": (b"[1, 2]", "list.jsonl line 1: expected a JSON object, got list"),
    "latin.jsonl": ("{'problem': '\u00e9'}".encode("latin-1"), "utf-8"),
    "fake.jsonl.gz": (GOOD.encode(), "fake.jsonl.gz"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 9)[:-9], "cut.jsonl.gz"),
}


@pytest.fixture
def bad_file(request, tmp_path):
    (tmp_path / request.param).write_bytes(FILES[request.param][0])
    return tmp_path / request.param


def failure(capsys, *argv):
    """Status and message of a command that has to fail."""
    status = main([str(x) for x in argv])
    return status, capsys.readouterr().err


# --- files ---

@pytest.mark.parametrize("bad_file", [n for n in FILES if not n.endswith("gz")], indirect=True)
def test_bad_file(bad_file):
    with pytest.raises(ValueError, match=FILES[bad_file.name][1]): load_rows(bad_file)


@pytest.mark.parametrize("bad_file", FILES, indirect=True)
def test_bad_file_on_the_command_line(bad_file, capsys):
    status, said = failure(capsys, "train", "--preset", "gsm8k-tiny", "--data", bad_file, "--quiet",
                           "--out", bad_file.parent / "out")
    assert status == 2 and said.count("\n") == 1 and said.startswith("latent-grpo: ")
    assert bad_file.name in said


def test_a_folder_in_place_of_a_file(tmp_path, capsys):
    (tmp_path / "x.jsonl").mkdir()
    status, said = failure(capsys, "train", "--preset", "gsm8k-tiny", "--data",
                           tmp_path / "x.jsonl", "--out", tmp_path / "out", "--quiet")
    assert status == 2 and said.count("\n") == 1 and "x.jsonl" in said


def test_good_files_plain_and_compressed(tmp_path):
    rows = [dict(problem=f"{i} + 1", answer=i + 1, drop=i % 2 == 1) for i in range(6)]
    text = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    plain, packed = load_rows(tmp_path / "a.jsonl"), load_rows(tmp_path / "a.jsonl.gz")
    assert [r["answer"] for r in plain] == list("123456") and plain[2]["id"] == "a.jsonl line 3"
    assert [r["problem"] for r in packed] == [r["problem"] for r in plain]
    assert [r["answer"] for r in load_rows(tmp_path / "a.jsonl", drop="drop")] == list("135")
    assert len(load_rows(tmp_path / "a.jsonl", limit=2)) == 2


# --- names and values ---

NAMES = [(dict(preset="toi"), "unknown preset 'toi'; did you mean 'toy'"),
         (dict(preset="gsm8k"), "did you mean 'gsm8k-tiny'"),
         (dict(method="exakt"), "unknown method 'exakt'; did you mean 'exact'"),
         (dict(method="centered"), "did you mean 'centred'"),
         (dict(grup_size=4), "unknown setting 'grup_size'; did you mean 'group_size'"),
         (dict(noise_scal="1"), "did you mean 'noise_scale'"),
         (dict(method="zzz"), "known: explicit, vanilla")]


@pytest.mark.parametrize("arguments,message", NAMES, ids=str)
def test_unknown_name_suggests_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message): make_config(**arguments)


VALUES = [("group_size", 1, "at least 2 rollouts"), ("group_size", 0, "at least 1"),
          ("prompts", 0, "at least 1"), ("minibatches", 0, "at least 1"),
          ("max_steps", 0, "at least 1"),
          ("lr", "fast", "lr='fast': expected float"), ("latent", "2", "latent='2': expected bool"),
          ("top_k", "2.5", "expected int"), ("clip", "(1, 2, 3)", "clip"),
          ("top_k", 0, "top_k=0"), ("top_k", 300, "max_candidates=256"),
          ("noise", "both", "two-sided"), ("score", "true", "published"),
          ("estimator", "ours", "aligned"), ("end_rule", "never", "sampled"),
          ("text_score", "half", "truncated")]

# What is checked only when it is first used would be found after minutes of supervised training.
LATE = [("masking", "on", "paper"), ("selection", "on", "paper"), ("overlong", "x", "unfinished"),
        ("aggregation", "mean", "token-mean")]


@pytest.mark.parametrize("name,value,message", VALUES + LATE)
def test_bad_value_is_refused_before_anything_runs(name, value, message):
    with pytest.raises(ValueError, match=message): make_config("toy", **{name: value})


@pytest.mark.parametrize("name", ["noise_scale", "temperature", "gumbel_tau", "lr"])
def test_negative_value_is_refused(name):
    with pytest.raises(ValueError, match=name): make_config("toy", **{name: -1.0})


def test_exact_score_without_noise_is_refused():
    """It has no density then; the run would stop later and blame the weights."""
    with pytest.raises(ValueError, match="noise_scale"):
        make_config("toy", "exact", noise_scale=0.0)


def test_no_samples_in_the_evaluation_are_refused():
    with pytest.raises(ValueError, match="eval_samples"): make_config("toy", eval_samples=0)


def test_combinations_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="exact.*clip=None"): make_config(score="exact")
    with pytest.raises(ValueError, match="needs clipped noise"):
        make_config(method="exact", noise="one-sided")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_of_a_preset_has_a_source_and_the_right_type(preset):
    plain = make_config(preset)
    for name, (value, source) in PRESETS[preset].items():
        assert source.strip() and type(value) is type(getattr(plain, name)), name
    assert make_config(preset, group_size="4").group_size == 4


# --- sizes ---

def test_group_of_one():
    with pytest.raises(ValueError, match="group_size=1: a group needs at least 2"):
        group_advantages(torch.ones(3, 1))


def test_more_components_than_words_names_both_numbers():
    cfg = config(top_k=13)
    with pytest.raises(ValueError, match=r"top_k=13.*vocabulary \(12\)"):
        draw_groups(tiny(), word_task(), cfg, 0)
    with pytest.raises(ValueError, match="top_k=0"): Sampling(top_k=0)


def test_more_components_than_words_is_found_before_the_supervised_start(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_grpo.train.train_sft", forbidden)
    cfg = config(top_k=30, train_rows=5, test_rows=2, latent_sft=1)
    with pytest.raises(ValueError, match="top_k=30.*vocabulary"): run(cfg, tmp_path, bar=False)


def test_prompt_over_the_limit_names_the_row():
    task = word_task()
    task.max_prompt = 2
    with pytest.raises(ValueError, match="row 0: prompt has 3 tokens, max_prompt is 2"):
        task.prompt(task.rows["train"][0])
    with pytest.raises(ValueError, match="row .*: prompt has 3 tokens"):
        draw_groups(tiny(), task, config(), 0)


def test_more_problems_than_there_are():
    with pytest.raises(ValueError, match="not enough distinct problems"):
        chain_rows(dict(train=500), modulus=2, slots=1, steps=(1, 1))


def test_words_outside_the_vocabulary():
    with pytest.raises(ValueError, match="word 'zebra'"): WordVocab(["a"]).encode("a zebra a")


# --- tokenizers ---

TEXTS = ["how many apples are 2 and 3 ?", "she has 12 apples"]


def tokenizer(*special, eos=True):
    """A word tokenizer of transformers with these special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<eos>", *special, *sorted({w for t in TEXTS for w in t.split()})]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>",
                                   **dict(eos_token="<eos>") if eos else {})


ROWS = dict(train=[dict(problem=t, answer="5", cot="2 3", id=str(i)) for i, t in enumerate(TEXTS)])


def test_end_token_absent_from_the_tokenizer():
    cfg = make_config("gsm8k-tiny")
    with pytest.raises(ValueError, match="end token.*'</think>'.*<unk>.*special token"):
        text_task(cfg, tokenizer("<think>"), ROWS)
    assert text_task(cfg, tokenizer("<think>", "</think>"), ROWS).end_latent_ids == (3,)


def test_tokenizer_without_end_of_text():
    with pytest.raises(ValueError, match="eos token"):
        text_task(make_config("gsm8k-tiny"), tokenizer("<think>", "</think>", eos=False), ROWS)


def test_end_marker_of_several_tokens_is_taken_as_it_is():
    tok = train_tokenizer(TEXTS, 300)
    tok.add_special_tokens({"eos_token": "<eos>"})
    task = text_task(make_config("gsm8k-tiny"), tok, ROWS)
    assert task.decode(task.end_latent_ids) == "</think>" and task.eos_id == tok.eos_token_id


# --- answers and chains ---

@pytest.mark.parametrize("gold", ["what is this then", "", None, "nan", "none of the above ones"])
def test_unparsable_gold_names_the_row(gold):
    with pytest.raises(ValueError, match="row 'gsm-7'.*cannot be read"): check_gold(gold, "gsm-7")
    with pytest.raises(ValueError, match="row 'gsm-7'"): is_correct("5", gold, "gsm-7")


def test_unparsable_gold_stops_a_run(tmp_path, capsys):
    """Found when the file is read, not when some rollout first ends."""
    rows = [dict(problem=f"{i} + 1", answer="so what is it then", cot="1") for i in range(9)]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = dict(width=8, layers=1, heads=1, ff=8, vocab_size=300, explicit_sft=0, latent_sft=0,
                 steps=1, prompts=2, max_steps=3)
    status, said = failure(capsys, "train", "--preset", "gsm8k-tiny", "--quiet", "--data",
                           tmp_path / "g.jsonl", "--out", tmp_path / "out",
                           *(f"--set={k}={v}" for k, v in sizes.items()))
    assert status == 2 and "g.jsonl line" in said and "so what is it then" in said


def test_training_rows_without_a_chain():
    task = word_task()
    for row in task.rows["train"]: row["cot"] = None
    with pytest.raises(ValueError, match="no training row has a chain of thought"):
        train_sft(tiny(), task, True, 1, bar=False)


# --- the command line ---

COMMANDS = {
    "unknown preset": ("train --preset toi", "did you mean 'toy'"),
    "unknown method": ("train --method exakt", "did you mean 'exact'"),
    "unknown setting": ("train --set grup_size=3", "did you mean 'group_size'"),
    "setting without value": ("train --set lr", "write it as name=value"),
    "wrong type": ("train --set lr=fast", "expected float"),
    "group of one": ("train --set group_size=1", "at least 2"),
    "no data": ("train --preset gsm8k-tiny", "--data"),
    "no such file": ("train --preset gsm8k-tiny --data nothing.jsonl", "nothing.jsonl"),
    "no start": ("train --init nowhere", "nowhere: no saved policy"),
    "no policy": ("eval --policy nowhere", "nowhere: no saved policy"),
    "seeds": ("compare --seeds a-b", "--seeds a-b"),
    "method of a comparison": ("compare --methods paper,exakt", "did you mean 'exact'"),
    "shown preset": ("presets toi", "did you mean 'toy'"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_command(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for work in ("compare.ProcessPoolExecutor", "train.train_sft", "train.train_rl"):
        monkeypatch.setattr(f"latent_grpo.{work}", forbidden)
    command, message = COMMANDS[name]
    status, said = failure(capsys, *command.split())
    assert status == 2 and message in said
    assert said.startswith("latent-grpo: ") and said.count("\n") == 1, said


def forbidden(*args, **kwargs): raise AssertionError("the run started")


def test_unknown_source_of_data_is_one_line(capsys, tmp_path):
    status, said = failure(capsys, "train", "--preset", "gsm8k-tiny", "--data", "nothing.txt",
                           "--out", tmp_path, "--quiet")
    assert status == 2 and said.count("\n") == 1 and "nothing.txt" in said


def test_problem_files_for_a_policy_of_chains(tmp_path):
    from latent_grpo.model import TinyLM
    from latent_grpo.train import save_policy
    cfg = config(width=8, layers=1, heads=1, ff=8, train_rows=5, test_rows=2)
    size = chain_task(dict(train=5)).vocab_size
    save_policy(tmp_path / "p", TinyLM(size, 8, 1, 1, 8), cfg)
    with pytest.raises(ValueError, match="reads generated chains"):
        load_policy(tmp_path / "p", ["x.jsonl"])
    assert load_checkpoint(tmp_path, None) is None


def test_status_and_single_line_from_a_shell():
    run = subprocess.run([sys.executable, "-m", "latent_grpo.cli", "train", "--preset", "toi"],
                         capture_output=True, text=True, env=os.environ)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "latent-grpo: unknown preset 'toi'; did you mean 'toy'?\n"


def write_rows(path, start, stop, **more):
    rows = [dict(problem=f"What is {i} and 1?", answer=str(i + 1), cot=f"<<{i}+1={i + 1}>>", **more)
            for i in range(start, stop)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_test_file_cannot_take_the_place_of_another_split(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", 0, 50)
    clash = write_rows(tmp_path / "a/train.jsonl", 60, 70)
    one, two = (write_rows(tmp_path / name / "t.jsonl", 70, 80) for name in "bc")
    for tests in (str(clash), f"{one},{two}"):
        cfg = make_config("gsm8k-tiny", train=str(data), tests=tests)
        with pytest.raises(ValueError, match="is taken"): problem_rows(cfg)


def test_problems_of_a_test_file_are_left_out_of_training(tmp_path):
    data, test = write_rows(tmp_path / "d.jsonl", 0, 50), write_rows(tmp_path / "t.jsonl", 0, 20)
    cfg = make_config("gsm8k-tiny", train=str(data), tests=str(test), drop="")
    with pytest.warns(UserWarning, match="20 training problems also stand in t"):
        rows = problem_rows(cfg)
    assert len(rows["train"]) + len(rows["validation"]) == 30 and len(rows["t"]) == 20


def test_marked_rows_are_dropped_and_a_misspelt_mark_is_told(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", 0, 50)
    data.write_text(data.read_text() + "\n" + write_rows(tmp_path / "e.jsonl", 50, 60, bad=True)
                    .read_text())
    splits = problem_rows(make_config("gsm8k-tiny", train=str(data), drop="bad"))
    assert sum(map(len, splits.values())) == 50
    with pytest.warns(UserWarning, match="no training row has this field"):
        problem_rows(make_config("gsm8k-tiny", train=str(data), drop="baad"))


def test_resume_with_other_settings_is_refused(tmp_path):
    cfg = config(train_rows=40, test_rows=8, latent_sft=1, explicit_sft=0, steps=1)
    run(cfg, tmp_path, bar=False)
    cfg.steps, cfg.lr = 2, 2 * cfg.lr
    with pytest.raises(ValueError, match="holds a run with lr="):
        run(cfg, tmp_path, resume=True, bar=False)


def test_training_in_half_precision_is_refused():
    cfg, task = config(), word_task()
    with pytest.raises(ValueError, match="train with dtype=float32"):
        train_rl(tiny().to(torch.bfloat16), task, cfg, bar=False)


def test_a_kept_run_of_a_comparison_must_have_the_same_settings(tmp_path):
    from latent_grpo.compare import _finished
    cfg = config(steps=1)
    assert _finished(tmp_path, cfg) is None
    (tmp_path / "scores.json").write_text('{"test": 1}')
    assert _finished(tmp_path, cfg) == {"test": 1}
    cfg.steps = 2
    with pytest.raises(ValueError, match="holds a run with steps=1, not 2"):
        _finished(tmp_path, cfg)


def test_a_run_from_before_a_setting_existed_counts_as_its_default(tmp_path):
    from latent_grpo.train import same_run
    cfg = config(steps=1)
    same_run(tmp_path, cfg)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["advantage"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    same_run(tmp_path, cfg)
    with pytest.raises(ValueError, match="holds a run with advantage='grpo', not 'rloo'"):
        same_run(tmp_path, config(steps=1, advantage="rloo"))


def test_half_precision_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_grpo.train.prepare", forbidden)
    with pytest.raises(ValueError, match="train with dtype=float32"):
        run(make_config("paper-low", train="x.jsonl", dtype="bfloat16"), tmp_path, bar=False)
