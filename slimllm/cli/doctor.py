"""`slimllm doctor`."""

from __future__ import annotations

from slimllm.cli.options import app
from slimllm.cli.terminal import console


@app.command("doctor")
def doctor_command() -> None:
    """Show what this machine has, and which backend each operation uses on it and why."""
    from slimllm.cli.display import show_diagnosis
    from slimllm.runtime.doctor import diagnose, settings

    show_diagnosis(console, diagnose(), settings())
