"""A run on Weights & Biases. Whatever wandb does, the run goes on: what fails is told once, and left out from then on."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.config import Config
from relora_ds.run.folder import RunFolder, finite, write_atomically
from relora_ds.text.masking import masked_values

if TYPE_CHECKING:  # it imports torch and DeepSpeed
    from relora_ds.optimizer.wrapper import RestartRecord

MODES = {"run": "online", "dryrun": "offline"}
"""What WANDB_MODE may still say of an older wandb."""


class WandbRun(Callback):
    """One run of wandb, on rank 0, which keeps its id over resumes.

    What the recipe leaves open (``wandb.mode: auto``, no project, no name) the variables of wandb decide, if they are set:
    WANDB_MODE, WANDB_PROJECT, WANDB_NAME.

    Args:
        environment: where those variables are; an empty one is none.
        tell: one line to the user.
    """

    def __init__(self, environment: Mapping[str, str], tell: Callable[[str], None]) -> None:
        self.environment, self.tell = environment, tell
        self.run: Any = None

    def begin(self, run: RunState) -> None:
        given, chosen = self.environment.get("WANDB_MODE", ""), run.config.wandb.mode
        mode = MODES.get(given, given) if chosen == "auto" and given else chosen
        if mode != "disabled":
            self.run = self._guarded("does not start", lambda: self._start(run.config, run.folder, self.environment, mode))

    def update(self, run: RunState, record: dict[str, Any]) -> None:
        self._log("train", record)

    def evaluation(self, run: RunState, record: dict[str, Any]) -> None:
        self._log("eval", record)

    def restart(self, run: RunState, restart: RestartRecord) -> None:
        self._log("restart", {"update": run.done.update, **restart.as_dict()})

    def end(self, exit_code: int) -> None:
        if self.run is not None:
            self._guarded("did not end well", lambda: self.run.finish(exit_code=exit_code))

    def _log(self, section: str, record: dict[str, Any]) -> None:
        """What is not finite wandb does not get."""
        if self.run is not None:
            known = {name: value for name, value in finite(record).items() if name != "update" and value is not None}
            values = {f"{section}/{name}": value for name, value in known.items()}
            self._guarded("takes no more figures", lambda: self.run.log(values, step=record["update"]))

    def _guarded(self, what: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; None, and no wandb from then on, where it fails."""
        try:
            return work()
        except Exception as error:
            self.run = None
            self.tell(f"wandb {what} ({_reason(error)}): the run goes on without")
            return None

    def _start(self, config: Config, folder: RunFolder, environment: Mapping[str, str], mode: Any) -> Any:
        """Offline without an API key, and where the server does not let it in, as on compute nodes without the internet."""
        import wandb

        if mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
        if not folder.wandb_id.exists():
            write_atomically(folder.wandb_id, uuid.uuid4().hex[:8])
        project, settings = config.wandb.project, config.wandb
        if "project" not in settings.model_fields_set:
            project = environment.get("WANDB_PROJECT") or project
        begin = partial(
            wandb.init, project=project, name=settings.name or environment.get("WANDB_NAME") or folder.path.name,
            id=folder.wandb_id.read_text(encoding="utf-8").strip(), resume="allow", dir=str(folder.path),
            config=masked_values(config.model_dump(mode="json")), settings=wandb.Settings(silent=True),
        )  # fmt: skip
        try:
            return begin(mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            self.tell(f"wandb goes on offline ({_reason(error)}); later: wandb sync {folder.path}/wandb/offline-run-*")
            wandb.teardown()  # its service holds the id for the run that failed (wandb/wandb#9865)
            return begin(mode="offline")


def _has_key(wandb: Any) -> bool:
    """Whether WANDB_API_KEY or a netrc file holds a key; nobody is asked for one, and no server whether it is good."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.31; later versions warn of it


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
