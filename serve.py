"""An OpenAI-compatible server with a page, for any model that can be sampled. Needs the extra "serve".

python serve.py --init=out/ppo
python serve.py --init=out/ppo --reference=out/lm --reward=out/rm --feedback=out/feedback.sqlite
python serve.py --init=smollm2-135m-instruct --port=8080 --workers=2
python serve.py --run=out/ppo  # a run while it trains: its curves and samples alone, no model is loaded

One process decodes all its requests together. With --workers several processes share the port: one per GPU, or each with its
share of the cores. A request with a seed gets the same text alone or in company.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.chat import Chat
from rlhf.infra import config, distributed, optim
from rlhf.infra.precision import SamplingPrecision, chosen
from rlhf.lm.int8 import stays_int8, to_compute_with
from rlhf.lm.pretrained import Pretrained, open_pretrained
from rlhf.reward.scorer import open_scorer
from rlhf.serve import connections
from rlhf.serve.api import Served, Service, application, deliver_to
from rlhf.serve.http import Bounded, Origins, is_loopback, parse_origins
from rlhf.serve.live import Watched
from rlhf.serve.protocol import Limits
from rlhf.serve.scheduler import Scheduler, Turns
from rlhf.serve.scorer import Scorer, load_values
from rlhf.serve.weights import Weights, own
from rlhf.serve.workers import Alone, Crew, Member, Seat

KEY = "PLAIN_RLHF_KEY"  # the environment variable for --key
STARTED = int(time.time())  # of the process above the workers, and so of all


@dataclass(frozen=True)
class Config:
    # What is served
    init: str | None = None  # run or checkpoint directory, HF-format or int8 directory, GGUF file, or a model's name
    run: str | None = None  # directory of a run, while it trains or later: the page shows its curves and samples
    base: str | None = None  # model that a run of layout adapters or branch was trained on, where it has moved [init]
    reference: str | None = None  # model before tuning: served as NAME:reference; /v1/tokens tells the KL to it [init]
    reward: str | None = None  # directory of train_rm.py, or file.py:function: /v1/score [init]
    feedback: str | None = None  # file of a feedback store: comparisons are shown and votes taken [init]
    weights_dir: str | None = None  # directory that POST /v1/weights may take weights from; needs a key [init]
    name: str | None = None  # what clients call the model; none = the last part of --init [init]
    precision: SamplingPrecision = "auto"  # of matrix products; auto = what is fast here; int8: of an int8 export
    device: str = "cpu"  # cpu, cuda, mps (Apple's GPU) or auto; with several workers the k-th takes the k-th GPU

    # Who may use it
    host: str = "127.0.0.1"  # address to listen on; one that others reach needs a key
    port: int = 8000  # 0 = any free one
    key: str | None = None  # what clients send as their API key; or set PLAIN_RLHF_KEY, which no process list shows
    origins: str | None = None  # whose pages may use it too: https://a.example,http://localhost:3000; or *, with a key

    # How much of it
    workers: int = 1  # processes behind the port, each with a model, a batch and a queue of its own [init]
    threads: int = 1  # CPU threads of a worker; with more, a seed's text may differ in company, by rounding
    max_batch: int = 32  # texts that one worker decodes together
    cache_tokens: int = 32768  # tokens in a worker's cache, a max_batch-th a text; of a reference a quarter more
    max_tokens: int = 1024  # longest answer
    queue: int = 128  # texts that may wait; more are turned away with status 503
    timeout: float = 300.0  # seconds that a request may take; then it ends with what there is
    patience: float = 30.0  # seconds that a client may take to send a request's headers, or its body, or to read on
    max_body: int = 262144  # bytes of a request
    grace: float = 10.0  # seconds for running requests after SIGTERM or Ctrl-C

    def __post_init__(self):
        config.at_least(self, port=0, workers=1, threads=1, max_batch=1, max_tokens=1, queue=0, max_body=1024, grace=0)
        config.at_most(self, port=65535)
        if self.init is None and self.run is None:
            raise ValueError("nothing to serve: name a model, --init=MODEL, or a run to look at, --run=DIR")
        for name in ("timeout", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be above 0")
        if self.cache_tokens < 8 * self.max_batch:
            raise ValueError(
                f"--cache_tokens={self.cache_tokens} leaves each of {self.max_batch} texts less than 8 tokens; "
                "raise it, or lower --max_batch"
            )


def main() -> None:
    cfg = config.parse(Config)
    key = cfg.key or os.environ.get(KEY) or None
    if key is None and not is_loopback(cfg.host):
        raise ValueError(
            f"--host={cfg.host} can be reached by others: give a key with --key or {KEY}, or stay on 127.0.0.1"
        )
    if key is None and cfg.weights_dir:
        raise ValueError(f"--weights_dir lets clients exchange the weights: give a key with --key or {KEY}")
    parse_origins(cfg.origins, key)
    listener = bind(cfg.host, cfg.port)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ValueError("the server needs starlette and uvicorn: pip install -e '.[serve]'") from None
    if cfg.run:
        Watched(cfg.run)  # before a model is opened
    if cfg.init is None:
        return asyncio.run(watch(cfg, key, listener))
    if cfg.workers == 1:
        return work(cfg, key, listener, Seat(), found=None)

    # the workers inherit one socket, which stays open for those that come later: whoever is free takes the next connection
    context = multiprocessing.get_context("fork")  # before any model is opened, or a GPU touched
    found = context.Array("c", 32)  # what `precision_of` found, for all workers, and for those that come later
    Crew(
        cfg.workers,
        lambda seat: context.Process(target=config.run, args=(lambda: work(cfg, key, listener, seat, found),)),
        context.Barrier(cfg.workers),
    ).run()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; OSError says which address is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; try another --port") from None
    return listener


def place_of(cfg: Config, worker: int) -> torch.device:
    """Where a worker computes; ValueError where it cannot."""
    gpus, apple = distributed.accelerators()
    return distributed.device_of(cfg.device, worker % max(1, gpus), cfg.workers, gpus, apple)


def precision_of(cfg: Config, device: torch.device, opened: Pretrained) -> str:
    """How the model is multiplied, as this machine is fast: "bf16 False", the second whether in int8. It is said."""
    settled, dtype = chosen(cfg, device)
    return f"{settled.precision} {stays_int8(opened.model, opened.spec, cfg.precision, dtype, (1, cfg.max_batch))}"


def work(cfg: Config, key: str | None, listener: socket.socket, seat: Seat, found) -> None:
    """One process of the server, until a signal ends it. found: bytes that all workers share, see `main`."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(cfg.threads)
    distributed.leave_out_cudnn_attention()
    device = place_of(cfg, seat.rank)
    opened = open_pretrained(cfg.init, device, base=cfg.base)
    if found is None:
        words = precision_of(cfg, device, opened)
    else:  # met once: a seed's text must not depend on who answers
        if seat.rank == 0 and not found.value:
            found.value = precision_of(cfg, device, opened).encode()
        if not wait_for_all(seat):
            return
        words = found.value.decode()
    precision, int8 = words.split()
    cfg, dtype, int8 = replace(cfg, precision=precision), optim.DTYPES[precision], int8 == "True"
    reference = open_pretrained(cfg.reference, device) if cfg.reference else None
    if reference and reference.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise ValueError(f"{cfg.reference} reads other tokens than {cfg.init}: the KL between them means nothing")
    reward = None
    if cfg.reward:
        under = reference or under_reward(cfg, device, opened)
        reward = open_scorer(cfg.reward, opened.tokenizer, device, base=under, dtype=dtype)
    if cfg.weights_dir:
        own(opened.model)
    # by the same products as the model, or the KL between equal weights would not be 0
    models = [
        replace(x, model=to_compute_with(x.model.eval(), int8, dtype)) for x in (opened, reference) if x is not None
    ]
    asyncio.run(serve(cfg, key, listener, seat, models, reward))


def under_reward(cfg: Config, device: torch.device, opened: Pretrained) -> Pretrained:
    """The frozen trunk that a reward may stand on: what is served, unless others may come in its place."""
    if cfg.base:
        return open_pretrained(cfg.base, device)
    return open_pretrained(cfg.init, device) if cfg.weights_dir else opened


def wait_for_all(seat: Seat) -> bool:
    """Whether all the first workers have come so far; False: one has failed, or we were told to stop."""
    if seat.ready is not None:
        try:
            seat.ready.wait()
        except threading.BrokenBarrierError:
            return False
    return True


def door(cfg: Config, service: Service, wanted: int, quiet: bool):
    """uvicorn's server for the service, of at most `wanted` requests at a time, which a signal ends."""
    log = logging.StreamHandler()
    log.addFilter(connections.OncePerSecond())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[log])
    room, most = connections.room(wanted)
    if most < wanted and not quiet:
        print(
            f"note: {most} requests at a time, not {wanted}: a process may open too few files (ulimit -n)",
            file=sys.stderr,
        )
    bounded = Bounded(application(service), most)
    server = connections.server(Origins(bounded, service.origins), connections.Waiting(room, cfg.patience), cfg.grace)

    def stop() -> None:
        server.should_exit = True
        bounded.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return server


def address(cfg: Config, listener: socket.socket) -> str:
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    return f"http://{host}:{listener.getsockname()[1]}"


async def watch(cfg: Config, key: str | None, listener: socket.socket) -> None:
    """The page with a run alone, until a signal ends it: no model is opened."""
    limits = (cfg.timeout, cfg.patience, cfg.max_body)
    service = Service((), STARTED, None, None, *limits, key, parse_origins(cfg.origins, key), run=Watched(cfg.run))
    server = door(cfg, service, 2 * cfg.queue + 16, quiet=False)
    listener.listen(128)
    print(f"showing {cfg.run} at {address(cfg, listener)}", flush=True)
    await server.serve(sockets=[listener])


async def serve(
    cfg: Config, key: str | None, listener: socket.socket, seat: Seat, models: list[Pretrained], reward
) -> None:
    """Listens until SIGTERM or Ctrl-C, then lets running requests finish for a while. models: --init's, and the reference."""
    service = service_of(cfg, key, seat, models, reward)
    schedulers = [served.scheduler for served in service.models]
    turns = Turns(*schedulers)
    rows = sum(scheduler.rows for scheduler in schedulers)
    wanted = rows + 2 * cfg.queue * len(models) + 16  # texts, as many jobs as may wait, and the page's own requests
    server = door(cfg, service, wanted, quiet=seat.rank > 0)
    if not await asyncio.to_thread(wait_for_all, seat):
        return
    turns.start()
    listener.listen(2048)  # from here on connections wait, and are not refused
    if seat.line is not None:
        service.shared.ready()  # not before the others came: they would wait for one that is started again
    if seat.rank == 0 and not seat.again:
        print(
            f"serving {service.models[0].name} at {address(cfg, listener)} "
            f"({cfg.workers} x {cfg.max_batch} texts of {schedulers[0].width} tokens; "
            f"{promise(all(s.exact for s in schedulers), max(s.rounding for s in schedulers))})",
            flush=True,
        )
    try:
        await server.serve(sockets=[listener])
    finally:
        await asyncio.to_thread(turns.stop)


def served_of(cfg: Config, name: str, opened: Pretrained, rows: int, chat: Chat | None, scorer: Scorer) -> Served:
    """A model with a cache for so many texts, and one more that is read."""
    stop_ids = {*opened.stop_ids, *(chat.stop_ids() if chat else ())}
    width, deliver = cfg.cache_tokens // cfg.max_batch, deliver_to(asyncio.get_running_loop())
    scheduler = Scheduler(opened.model, opened.tokenizer, stop_ids, rows, width, cfg.queue, deliver)
    scheduler.weights = opened.digest
    limits = Limits(scheduler.width, min(cfg.max_tokens, scheduler.width), rows + cfg.queue)
    return Served(name, scheduler, scorer, limits)


def service_of(cfg: Config, key: str | None, seat: Seat, models: list[Pretrained], reward) -> Service:
    """What a worker's endpoints need."""
    from rlhf.feedback.store import FeedbackStore

    opened, *others = models
    tokenizer, name = opened.tokenizer, cfg.name or Path(cfg.init).name
    chat = chat_of(opened, quiet=seat.rank > 0 or seat.again)
    values = None if cfg.weights_dir else load_values(cfg.init, opened.model, cfg.base)  # of these weights alone
    scorer = Scorer(opened.model, others[0].model if others else None, reward, values)
    served = [served_of(cfg, name, opened, cfg.max_batch, chat, scorer)]
    for other in others:
        rows = max(1, cfg.max_batch // 4)  # asked less often: a cache of the same size would stand empty
        scorer = Scorer(other.model, other.model, reward, None)
        served.append(served_of(cfg, f"{name}:reference", other, rows, chat, scorer))
    weights, shared = None, None
    if cfg.weights_dir:
        scheduler = served[0].scheduler
        weights = Weights(scheduler, tokenizer.fingerprint, cfg.precision, Path(cfg.weights_dir))
        if seat.pushed:
            scheduler.weights = pushed_or_own(weights, seat, opened)
        shared = Alone(weights)
    if seat.line is not None:
        shared = Member(weights, seat.line, cfg.workers)
    store = FeedbackStore(cfg.feedback) if cfg.feedback else None
    return Service(
        tuple(served), STARTED, tokenizer, chat,
        cfg.timeout, cfg.patience, cfg.max_body, key, parse_origins(cfg.origins, key), store, weights, shared,
        Watched(cfg.run) if cfg.run else None,
        origin_of(cfg.init, tokenizer, chat),
    )  # fmt: skip


def origin_of(init: str, tokenizer, chat: Chat | None) -> dict:
    """What the page says of the model; a run whose files are damaged is served all the same, and that is said."""
    from rlhf.serve.about import NOTHING, about

    try:
        return about(init, tokenizer, chat)
    except (ValueError, OSError) as error:
        print(f"the page does not say what the model was tuned for: {error}", file=sys.stderr)
        return NOTHING


def pushed_or_own(weights: Weights, seat: Seat, opened: Pretrained) -> str:
    """Takes the weights that the other workers got; -> the sha256 of what is served then.

    Where they are gone it serves those of --init: every answer says so, and the client gives its own again.
    """
    try:
        return weights.load(*seat.pushed)
    except (ValueError, OSError) as error:
        print(f"worker {seat.rank} begins with the weights of --init: {error}", file=sys.stderr)
        return opened.digest


def promise(exact: bool, rounding: float) -> str:
    """What a seed gives, as `exact_shape` found it; in company the differences of several steps come together."""
    if exact:
        return "the same text and log-probs for a seed, alone or in company"
    if rounding < 3e-6:
        return "the same text for a seed, alone or in company, and its log-probs to 1e-5"
    return f"a seed's text up to rounding: log-probs of one token differ by {rounding:.0e}"


def chat_of(opened: Pretrained, quiet: bool = False) -> Chat | None:
    """The model's chat template, or ChatML where its tokenizer can spell it; None: it has neither."""
    try:
        return Chat(opened.tokenizer)
    except ValueError as error:
        if not quiet:
            print(f"no chat: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    config.run(main)
