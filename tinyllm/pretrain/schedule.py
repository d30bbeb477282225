"""Warm-up, stable rate, linear decay to zero (WSD: Hu et al. 2024, arXiv 2404.06395)."""

from dataclasses import dataclass

from tinyllm.pretrain.settings import Settings


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in steps, over all restarts; pauses are not counted
    decay_start: int = -1  # first step of the decay stage, -1 before it
    start: int = 0  # step at which the optimizers were fresh: not 0 after --start_from


def fraction_done(settings: Settings, progress: Progress) -> float:
    """Share of the run that is over, by steps or by time, whichever is further."""
    if settings.stage == "decay":
        return (progress.step - progress.decay_start) / settings.decay_steps
    by_steps = progress.step / settings.max_steps
    by_time = progress.seconds / (60 * settings.max_minutes) if settings.max_minutes else 0.0
    return max(by_steps, by_time)


def rate_factor(settings: Settings, progress: Progress) -> float:
    """What the learning rates are multiplied with at this step, in (0, 1]."""
    warmup = min(1.0, (progress.step - progress.start + 1) / max(1, settings.warmup_steps))
    if settings.stage == "stable":
        return warmup
    done = fraction_done(settings, progress)
    share = 1.0 if settings.stage == "decay" else settings.decay_share
    left = (1 - done) / share if share else 1.0  # without a decay the rate stays
    return max(0.01, min(warmup, left))


def seconds_left(settings: Settings, progress: Progress, seconds_per_step: float) -> float:
    """Until the stage ends, at the present pace."""
    end = settings.max_steps
    if settings.stage == "decay":
        end = progress.decay_start + settings.decay_steps
    left = (end - progress.step) * seconds_per_step
    if settings.max_minutes and settings.stage != "decay":
        left = min(left, 60 * settings.max_minutes - progress.seconds)
    return max(0.0, left)
