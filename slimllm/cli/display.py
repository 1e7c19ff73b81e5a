"""Output of `slimllm prune`, `plan`, `export`, `finetune` and `doctor`: the progress bar, summaries, and tables."""

from __future__ import annotations

from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimllm.checks import GIB
from slimllm.cli.terminal import Notices
from slimllm.experiments.bench.forecast import Forecast
from slimllm.pruning.report import PruneReport
from slimllm.pruning.tensor_parallel import tensor_parallel_of
from slimllm.runtime.doctor import Diagnosis
from slimllm.runtime.progress import LayerPruned, Progress, StepTrained


class PruneDisplay:
    """Progress of a run on the terminal; silent with `quiet`."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._bar = rich_progress.Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[about]}", markup=False),
            console=console,
            disable=quiet,
        )
        self._notices = Notices(console, quiet)
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> PruneDisplay:
        self._notices.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._notices.__exit__()
        if self._bar.live.is_started:
            self._bar.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        if not self._quiet:
            self._console.print(sentence, style="dim", highlight=False, soft_wrap=True)

    def progress(self, event: Progress) -> None:
        """Move the bar; a `ProgressCallback`."""
        if not self._console.is_terminal:
            self._line(event)
            return
        self._bar.start()  # starts with the first event, so that input errors appear without a bar
        about = ""
        if event.work not in self._tasks or self._bar.tasks[self._tasks[event.work]].finished:  # the next ratio
            self._tasks[event.work] = self._bar.add_task(event.work, total=event.total, about="")
        if isinstance(event, StepTrained):
            about = f"loss {event.loss:.3f}"
        elif isinstance(event, LayerPruned) and event.done < event.total:
            layer = event.layer
            about = f"ratio {layer['ratio']:.3f}, {layer['num_heads']} heads, width {layer['intermediate_size']}"
        self._bar.update(self._tasks[event.work], completed=event.done, about=about)

    def _line(self, event: Progress) -> None:
        """Print a line for every tenth of the work, where there is no terminal to show a bar."""
        tenth = 10 * event.done // event.total
        if not self._quiet and tenth != self._tenths.get(event.work):
            self._console.print(str(event), highlight=False)
        self._tenths[event.work] = tenth

    def summary(self, report: PruneReport) -> None:
        """Print the summary of a run."""
        print_summary(self._console, report)


def print_summary(console: Console, report: PruneReport) -> None:
    """Print parameters, perplexity, time and memory of a run, and where the result is."""
    parameters, calibration, memory = report.parameters, report.calibration, report.memory_gib
    table = Table(box=None, padding=(0, 2), show_header=True, header_style="bold")
    for title, justify in (("", "left"), ("before", "right"), ("after", "right"), ("removed", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "parameters of the layers",
        f"{parameters['layers_before']:,}",
        f"{parameters['layers_after']:,}",
        f"{report.achieved_ratio:.2%}",
    )
    table.add_row(
        "parameters of the model",
        f"{parameters['before']:,}",
        f"{parameters['after']:,}",
        f"{report.achieved_ratio_model:.2%}",
    )
    table.add_row(
        f"perplexity, {report.judged_by}, {calibration['bos']}",
        f"{calibration['perplexity_dense']:.2f}",
        f"{calibration['perplexity_pruned']:.2f}",
        "",
    )
    console.print(table)
    parts = ", ".join(f"{name.replace('_', ' ')} {size * 1024:,.0f}" for name, size in memory.items())
    lines = [
        f"method  {report.methods}",
        f"time    {report.elapsed_s:.1f} s = {report.elapsed_s / report.dense_pass_s:.2f} x one dense pass "
        f"({report.dense_pass_s:.1f} s)",
        f"        and {report.setup_s:.1f} s before, to open the model and draw the text",
        f"memory  {report.peak_host_gib:.2f} GiB at most; the estimate was {sum(memory.values()):.2f} GiB, in MiB:",
        f"        {parts}",
    ]
    if report.peak_gpu_gib:
        lines.append(f"GPU     {report.peak_gpu_gib:.2f} GiB at most")
    lines.append(tensor_parallel_of(report))
    lines.append(f"saved   {report.out} ({report.format}); details in report.json")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def print_forecast(console: Console, forecast: Forecast) -> None:
    """Print what a run would take, part by part, and how it would fit."""
    plan = forecast.plan
    console.print(
        f"{forecast.model}: {forecast.num_layers} layers, {forecast.params / 1e9:.2f} billion parameters, "
        f"computed in {forecast.compute_dtype} on {forecast.device}"
        + (f", shared by {forecast.ranks} ranks; the figures are for each rank" if forecast.ranks > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2), show_header=False)
    for title, parts, phase in (
        ("GPU memory", plan.gpu, plan.gpu_phase),
        ("host memory", plan.host, plan.host_phase),
        ("disk", plan.disk, ""),
    ):
        if parts:
            when = f"in the phase '{phase}': " if phase else ""
            estimate = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= GIB / 200)
            table.add_row(title, f"{sum(parts.values()) / GIB:.2f} GiB", f"{when}{estimate}")
    table.add_row("calibration", f"{plan.config.samples} × {plan.config.seq_len}", "windows × tokens")
    if forecast.traffic:
        estimate = ", ".join(f"{name} {size / GIB:.2f}" for name, size in forecast.traffic.items())
        table.add_row(
            "network", f"{sum(forecast.traffic.values()) / GIB:.2f} GiB", f"per layer, through the busiest rank: {estimate}"
        )
    if forecast.seconds is None:
        no_gpu = "this machine has no GPU; on a machine with one, plan measures its speed"
        why = "the work of a mixture of experts is not counted" if forecast.mixture else no_gpu
        table.add_row("time", "", f"unknown: {why}")
    else:
        table.add_row("time", _duration(forecast.seconds), "approximately, by counted operations and this machine's rates")
    where = {
        "device": "in memory" if forecast.device == "cpu" else "on the GPU",
        "host": "in host memory",
        "disk": "in files",
    }
    table.add_row("placement", "", f"hidden states {where[plan.placement.states]}; one layer at a time")
    for name, budget in (("host memory", plan.config.host_memory), ("GPU memory", plan.config.gpu_memory)):
        if budget:
            table.add_row("budget", budget, f"of {name}: it fits")
    for choice in plan.choices:
        table.add_row("to fit", "", choice)
    console.print(table, highlight=False)
    for note in forecast.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if forecast.warning:
        console.print(forecast.warning, style="yellow", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_diagnosis(console: Console, diagnosis: Diagnosis, settings: dict[str, str]) -> None:
    """Print what `slimllm doctor` found."""
    about = Table(show_header=False, box=None)
    for title, values in (("versions", diagnosis.versions), ("devices", diagnosis.devices), ("environment", settings)):
        for name, value in values.items():
            about.add_row(title, name, value)
            title = ""
    about.add_row("extension", "slimllm._C", diagnosis.extension)
    console.print(about, highlight=False)
    table = Table("operation", "device", "backend", "because")
    for row in diagnosis.operations:
        table.add_row(*row)
    console.print(table, highlight=False)
