"""The three trackers, each opened with what it needs, and imported only when it is asked for.

`send(step, values)` takes one line. `rewind(step)` takes back what was sent of `step` and later; False: it cannot, and goes
on behind what it has.
"""

from pathlib import Path


class TensorBoard:
    """Event files in `place`; every one begins with the step that it starts at, where readers drop what came before it."""

    def __init__(self, place: Path, project: str, name: str, run_id: str, options: dict, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.open = lambda step: SummaryWriter(str(place), purge_step=step)
        self.writer = self.open(first)
        if first == 0 and options:
            rows = "".join(
                f"| {option} | {str(value).replace('|', chr(92) + '|')} |\n" for option, value in options.items()
            )
            self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", 0)

    def send(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> bool:
        self.writer.close()
        self.writer = self.open(step)
        return True

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Kept:
    """A tracker whose `run` keeps what it was once sent."""

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


class WandB(Kept):
    """A run of Weights & Biases; WANDB_MODE=offline writes into `place` alone, for `wandb sync`."""

    def __init__(self, place: Path, project: str, name: str, run_id: str, options: dict, first: int):
        import wandb

        quiet = wandb.Settings(console="off", x_disable_stats=True)  # of this process, which trains nothing
        who = dict(project=project, name=name, id=run_id, resume="allow")
        try:
            self.run = wandb.init(**who, dir=str(place), config=options, settings=quiet)
        except wandb.errors.Error as error:  # no account, no network
            raise ValueError(f"wandb: {error}; WANDB_MODE=offline needs neither account nor network") from None


class Trackio(Kept):
    """A run of Trackio, in its local database (TRACKIO_DIR), or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, place: Path, project: str, name: str, run_id: str, options: dict, first: int):
        import trackio

        quiet = dict(auto_log_cpu=False, auto_log_gpu=False, embed=False)
        self.run = trackio.init(project, name=f"{name}-{run_id}", config=options, resume="allow", **quiet)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
