"""The faults that other projects' users reported (shared/bugs): every case passes, by the names of today."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, shared

MOVED = {  # what the cases import or call -> where that is now
    "from rlhf.pretrained import": "from rlhf.lm.pretrained import",
    "from rlhf.reward_model import python_reward": "from rlhf.reward.scorer import python_reward",
    'python_reward(str(tmp / "r.py"), "f", ': 'python_reward(str(tmp / "r.py") + ":f", ',
    "from data.loader import prompts_from_text": "from data.text import prompt_lines",
    'tokenizer.decode(row) for row in prompts_from_text(tmp / "prompts.txt", tokenizer)': '*prompt_lines(tmp / "prompts.txt")',
    '"data.prepare", "preferences", ': '"data.prepare", "--strict=true", ',  # else a bad row is counted, and the run goes on
}
CASES = """template_tojson_of_a_text template_title_of_a_role template_with_generation_tag
tied_flag_beside_another_output_matrix sentencepiece_user_defined_symbol_in_gguf added_tokens_beside_tokenizer_model
several_ends_of_text_through_gguf llama_bpe_without_add_bos added_tokens_json_beside_a_bpe not_a_number_at_temperature_0
prompt_file_with_a_line_separator preferences_with_half_a_surrogate_pair preferences_nested_too_deeply
reward_function_returns_a_dict reward_function_returns_a_text api_top_k_below_zero
api_null_content_of_a_tool_call""".split()


@pytest.mark.slow
def test_every_reported_fault_is_mended(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra compare")
    for name in ("cases.py", "lib.py"):
        text = (shared("bugs") / name).read_text()
        for old, new in MOVED.items():
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "cases.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    verdicts = dict(line.split()[1::-1] for line in done.stdout.splitlines() if line[:4] in ("PASS", "FAIL"))
    assert verdicts == dict.fromkeys(CASES, "PASS"), done.stdout
