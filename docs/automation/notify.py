"""Create the automations of retrain.yaml on a Prefect server, or bring them up to date.

    export PREFECT_API_URL=http://127.0.0.1:4200/api       # the server; without one nobody watches for events
    REFORGE_NOTIFY_URL=… python docs/automation/notify.py

The address is one of Apprise's, which decides whether it is a mail or a chat message, and is kept as a secret in a block of
the server. Give it in the environment, not on the command line, where others may read it:

    mailtos://user:password@mail.example.org?to=team@example.org
    https://hooks.slack.com/services/…      discord://id/token      mmosts://host/token      json://host/path
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DO_NOT_TRACK", "1")

import yaml
from apprise import Apprise
from prefect.automations import Automation
from prefect.blocks.notifications import SlackWebhook
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

BLOCK = "reforge-notify"


def main() -> int:
    """0 if the automations are there."""
    address = os.environ.get("REFORGE_NOTIFY_URL", "")
    if not PREFECT_API_URL.value():
        print("notify: no server: set PREFECT_API_URL", file=sys.stderr)
        return 1
    if not address or not Apprise().add(address):
        print("notify: REFORGE_NOTIFY_URL is not set, or no address that Apprise knows", file=sys.stderr)
        return 1
    # Prefect hands the address of this type on to Apprise as it is, whatever service it is of
    block: Any = SlackWebhook(url=SecretStr(address)).save(BLOCK, overwrite=True)
    text = Path(__file__).with_name("retrain.yaml").read_text(encoding="utf-8")
    for each in yaml.safe_load(text)["automations"]:
        for action in each["actions"]:
            action["block_document_id"] = str(block)
        automation: Any = Automation.model_validate(each)
        read: Any = Automation.read
        try:
            automation.id = read(name=automation.name).id
        except ValueError:
            automation.create()
        else:
            automation.update()
        print(f"notify: {automation.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
