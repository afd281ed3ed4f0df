"""Clients that know nothing of this server, each asked for what it can do; a table of what came back.

python serve.py --init=out/ppo --port=8000
python tests/clients.py http://127.0.0.1:8000

Those that are installed are tried: pip install openai langchain-openai litellm llm
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

ASKED = "Is it a good film?"
MESSAGES = [{"role": "user", "content": ASKED}]
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5}
BIAS = {"10": -100}


def answer_class():
    from pydantic import BaseModel

    class Answer(BaseModel):
        good: bool
        kind: Literal["film", "story"]

    return Answer


def with_openai(url: str, model: str, key: str):
    from openai import OpenAI

    client, answer = OpenAI(base_url=url, api_key=key), answer_class()
    chat = client.chat.completions
    asked = dict(model=model, messages=MESSAGES, max_tokens=60, seed=1)
    yield "chat", lambda: chat.create(**asked, **PENALTIES, logit_bias=BIAS).choices[0].message.content
    yield "stream", lambda: "".join(x.choices[0].delta.content or "" for x in chat.create(**asked, stream=True))
    yield "completions", lambda: client.completions.create(model=model, prompt=ASKED, max_tokens=20).choices[0].text
    yield (
        "structured",
        lambda: chat.parse(**asked, response_format=answer).choices[0].message.parsed.good in (True, False),
    )
    responses = dict(model=model, input=ASKED, max_output_tokens=60)
    yield "responses", lambda: client.responses.create(**responses).output_text
    yield "responses, stream", lambda: [x.type for x in client.responses.create(**responses, stream=True)][-1]
    yield "responses, structured", lambda: client.responses.parse(**responses, text_format=answer).output_parsed.kind
    yield "embeddings", lambda: len(client.embeddings.create(model=model, input=[ASKED, "no"]).data[1].embedding)


def with_langchain_openai(url: str, model: str, key: str):
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    about = dict(base_url=url, api_key=key, model=model)
    chat = ChatOpenAI(**about, max_tokens=60, seed=1, **PENALTIES, logit_bias={10: -100})
    yield "chat", lambda: chat.invoke(ASKED).content
    yield "stream", lambda: "".join(x.content for x in chat.stream(ASKED))
    yield "structured", lambda: chat.with_structured_output(answer_class()).invoke(ASKED).kind
    yield "responses", lambda: ChatOpenAI(**about, max_tokens=60, use_responses_api=True).invoke(ASKED).text
    texts = OpenAIEmbeddings(**about, check_embedding_ctx_length=False)  # or it sends ids of OpenAI's tokenizer
    yield "embeddings", lambda: len(texts.embed_documents([ASKED])[0])


def with_litellm(url: str, model: str, key: str):
    os.environ.setdefault(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # or it asks for a file of prices before anything else
    import litellm

    about = dict(model=f"openai/{model}", api_base=url, api_key=key)
    asked = dict(about, messages=MESSAGES, max_tokens=60, seed=1)
    yield "chat", lambda: litellm.completion(**asked, **PENALTIES, logit_bias=BIAS).choices[0].message.content
    yield "stream", lambda: "".join(x.choices[0].delta.content or "" for x in litellm.completion(**asked, stream=True))
    kind = answer_class()
    yield (
        "structured",
        lambda: json.loads(litellm.completion(**asked, response_format=kind).choices[0].message.content)["kind"],
    )
    yield "responses", lambda: litellm.responses(**about, input=ASKED, max_output_tokens=60).output[0].content[0].text
    yield "embeddings", lambda: len(litellm.embedding(**about, input=[ASKED]).data[0]["embedding"])


def with_llm(url: str, model: str, key: str):
    home = Path(tempfile.mkdtemp())
    entry = {"model_id": "ours", "model_name": model, "api_base": url, "supports_schema": True}
    (home / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML

    def ask(*more: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "ours", ASKED, "--key", key, "-o", "max_tokens", "60", *more]
        done = subprocess.run(command, env=os.environ | {"LLM_USER_PATH": str(home)}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return done.stdout

    penalties = [word for name, value in PENALTIES.items() for word in ("-o", name, str(value))]
    yield "chat", lambda: ask("--no-stream", *penalties, "-o", "logit_bias", json.dumps(BIAS))
    yield "stream", lambda: ask(*penalties)
    schema = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    schema["additionalProperties"] = False
    yield "structured", lambda: json.loads(ask("--schema", json.dumps(schema)))["good"] in (True, False)


CLIENTS = {"openai": with_openai, "langchain-openai": with_langchain_openai, "litellm": with_litellm, "llm": with_llm}


def main() -> None:
    url = sys.argv[1].rstrip("/") + "/v1"
    model, key = (sys.argv[2:] + ["", ""])[:2]
    if not model:
        import urllib.request

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with urllib.request.urlopen(urllib.request.Request(url + "/models", headers=headers)) as told:
            model = json.load(told)["data"][0]["id"]
    print("| client | asked for | came back |\n|---|---|---|")
    failed = 0
    for name, client in CLIENTS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {name} | | not installed |")
            continue
        for what, ask in client(url, model, key or "none"):
            try:
                came = f"`{ask()!r:.60}`"
            except Exception as error:  # one line a client: the others are tried too
                failed += 1
                came = f"FAILED: {type(error).__name__}: {' '.join(str(error).split()):.200}"
            print(f"| {name} {version} | {what} | {came} |", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
