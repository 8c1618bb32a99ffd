"""The loss curve as a PNG."""

from pathlib import Path

from .train import History

SMOOTHING_STEPS = 8  # width of the running mean, at most


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place."""
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]


def plot_losses(history: History, path: Path, title: str) -> None:
    """Draw training loss (each step, and a running mean) and held-out loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")  # no window, also where a display exists
    from matplotlib import pyplot

    steps = [step["step"] for step in history.steps]
    losses = [step["loss"] for step in history.steps]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=140, layout="constrained")
    try:
        axes.plot(
            steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step"
        )
        width = max(1, min(SMOOTHING_STEPS, len(losses) // 4))
        axes.plot(
            steps, running_mean(losses, width), color="tab:blue", label=f"training, mean of {width}"
        )
        if history.held_out:
            at, held_out = zip(*history.held_out, strict=True)
            axes.plot(at, held_out, "o-", color="tab:orange", label="held-out")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss per answer token (nats)")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path)
    finally:
        pyplot.close(figure)
