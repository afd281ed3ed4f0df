"""plain-rlhf COMMAND [--name=value ...]: every script of the checkout, from any directory, after `pip install`.

The scripts stay what they are: `plain-rlhf ppo --out=out/ppo` is `python train_ppo.py --out=out/ppo`, and on several processes
`torchrun --nproc_per_node=2 -m plain_rlhf ppo --out=out/ppo`. `plain-rlhf COMMAND --help` lists a command's options.
"""

import difflib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # the checkout, or what the wheel has of it
PROGRAMS = {  # name -> its script, or a module that runs
    "prepare": ("data.prepare", "any files -> prepared data"),
    "lm": ("train_lm.py", "pretrain or fine-tune a language model"),
    "rm": ("train_rm.py", "ratings or preferences -> a reward model"),
    "dpo": ("train_dpo.py", "preferences -> a language model, by DPO or IPO"),
    "ppo": ("train_ppo.py", "a reward -> a language model, by PPO and its relatives"),
    "sample": ("sample.py", "text from any model"),
    "evaluate": ("evaluate.py", "base beside tuned; rm, overoptimisation, report, compare"),
    "export": ("export.py", "HF directory, GGUF, PEFT adapter, int8"),
    "serve": ("serve.py", "OpenAI's API, a page, votes"),
    "iterate": ("iterate.py", "rounds of samples, votes, reward model and PPO"),
    "feedback": ("rlhf.feedback", "votes in the terminal, and files of them"),
    "doctor": ("rlhf.doctor", "what is wrong with a run"),
    "replay": ("rlhf.replay", "a step that a bad number spoiled, again"),
    "check": ("rlhf.check", "another framework's numbers beside ours"),
    "track": ("rlhf.track", "a run in TensorBoard, W&B or Trackio"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("\n".join([__doc__, *(f"  {command:<10}{what}" for command, (_, what) in PROGRAMS.items())]))
        return
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PROGRAMS)}"
        print(f"error: plain-rlhf has no command {name!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    target = PROGRAMS[name][0]
    sys.path.insert(0, str(HERE))  # model and data are general names: ours come first here, and last elsewhere
    sys.argv = [str(HERE / target), *sys.argv[2:]]
    if target.endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
