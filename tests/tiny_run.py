"""What a run of PPO leaves, without the run: rows of metrics.jsonl and samples.jsonl."""

HOSTILE = "<script>alert(1)</script><img src=https://example.org/x onerror=alert(1)> | [a](b) \x00\x1b\ud800 & `c`"


def ppo_rows(count: int = 5, **more) -> list[dict]:
    return [
        {"step": i, "objective/scores": 0.1 * i, "objective/kl": 0.5 * i, "objective/kl_coef": 0.3, "lr": None}
        | {"response/length": 20 - i, "policy/ratio_first": 1.0, "judge/mean": 0.2 * i, "returns/mean": 0.1 * i} | more
        for i in range(count)
    ]  # fmt: skip


def sample(step: int, text: str = HOSTILE) -> dict:
    tokens = ["good", text, ""]
    numbers = {name: [0.5, -1.25, None] for name in ("logprobs", "values", "rewards", "advantages")}
    return {"step": step, "score": 1.5, "kl": 2.5, "prompt": text, "response": "good" + text, "tokens": tokens} | numbers | {
        "ref_logprobs": [0.25, -1.0, 0.0]
    }  # fmt: skip
