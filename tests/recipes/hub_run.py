"""Runs `recipes/finetune.py` with a stand-in for the hub, and one for a tracker: `hub_run.py FOLDER ARGUMENTS`.

FOLDER/rank<N>.json gets what this process sent to the hub, and the last log that the tracker saw.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

sent: dict[str, Any] = {"created": [], "uploads": [], "logs": []}


class Tracker(TrainerCallback):
    """What `report_to` names: it gets the logs that every tracker gets."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        sent["logs"].append(dict(logs or {}))


class Hub:
    """Records what is sent."""

    def create_repo(self, name: str, **options: Any) -> Any:
        sent["created"].append(name)
        return SimpleNamespace(repo_id=f"owner/{name}")

    def upload_folder(self, folder_path: str, **options: Any) -> None:
        files = {path.name: path.stat().st_size for path in Path(folder_path).iterdir() if path.is_file()}
        sent["uploads"].append({"repo": options["repo_id"], "files": files, "ignored": options["ignore_patterns"]})


def main() -> None:
    transformers_trainer.hf_api = Hub  # type: ignore[attr-defined]
    INTEGRATION_TO_CALLBACK["trackio"] = Tracker
    folder = Path(sys.argv[1])
    sys.argv = ["finetune.py", *sys.argv[2:]]
    finetune.main()
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    main()
