"""What `make docs` adds to the pages: the reference of the command line, from the commands themselves."""

from __future__ import annotations

from typing import Any

import click
import typer.main

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A hook of mkdocs: put the commands where the page has the mark."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """A section for every command: what it does, its arguments and options."""
    from slimllm.cli import app

    group = typer.main.get_command(app)
    parts = []
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts += [f"## slimllm {name}", command.help or "", _table(command)]
    return "\n\n".join(parts)


def _table(command: click.Command) -> str:
    lines = ["| | default | |", "|---|---|---|"]
    for parameter in command.params:
        names = [str(parameter.name).upper()] if parameter.param_type_name == "argument" else parameter.opts
        about = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        default = parameter.default
        shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
        lines.append(f"| {', '.join(f'`{one}`' for one in names)} | {shown} | {about} |")
    return "\n".join(lines)
