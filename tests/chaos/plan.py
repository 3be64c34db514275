"""What happens to one run of the campaign. In: where it runs, and a seed. Out: a `Case`, always the same one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from pretrain.run.beat import BUILDING, COMPUTING, ENDING, READING, RESTORING, SAVING, STARTING, VALIDATING

LOCAL, SLURM = "local", "slurm"
TRAINING = ""
FULL_DISK = "full disk"

# Way → the phases in which it comes. A rank that is stopped outside of a step is waited for much longer.
ANY = (TRAINING, TRAINING, TRAINING, SAVING, SAVING, VALIDATING, READING, RESTORING, STARTING, BUILDING, ENDING)
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    LOCAL: {
        "SIGKILL a rank": ANY,
        "SIGKILL the fork server": ANY,
        "SIGKILL torchrun's agent": ANY,
        "SIGKILL the launcher": ANY,
        "SIGSTOP a rank": (TRAINING, COMPUTING),
        "SIGTERM": ANY,
        FULL_DISK: (SAVING,),
    },
    SLURM: {
        "SIGKILL a rank": ANY,
        "SIGKILL the fork server": ANY,
        "SIGKILL torchrun's agent": ANY,
        "SIGKILL the batch step": ANY,
        "SIGSTOP a rank": (TRAINING, COMPUTING),
        "SIGTERM": ANY,
        "SIGUSR1": ANY,
        FULL_DISK: (SAVING,),
        "power off a node": ANY,
        "power off the first node": ANY,
        "restart slurmctld": ANY,
        "scontrol requeue": ANY,
        "preemption": ANY,
        "time limit": (TRAINING, SAVING, VALIDATING),
    },
}
# Where the run restarts in place, these come when the step of the next attempt is ready, if it is within some seconds. A second
# blow follows, mostly before the next attempt has ranks.
FOLLOWED = ("SIGKILL a rank", "SIGKILL the fork server", "SIGKILL torchrun's agent")
SECOND = ("SIGTERM", "SIGUSR1", "restart slurmctld", "scontrol requeue", "preemption", "scancel")
SECOND_S = 9.0
BETWEEN = "between two attempts"
BLOWS = {LOCAL: 4, SLURM: 3}
# The private cluster has five nodes and a run needs three of them: nodes stay off for the rest of the run.
MOST_POWER_OFFS = 2
# A phase that lasts long is hit anywhere in it, a short one near its begin.
LONG_S, SHORT_S = 0.8, 0.03


@dataclass(frozen=True)
class Blow:
    """One thing that happens to a run.

    `phase`: it comes there; TRAINING: at any moment. `steps`: so many steps of the attempt come first, where the phase is part of
    training. `held`: rank 0 stands still meanwhile; else it comes `delay_s` seconds later. `victim`: which rank, modulo their
    number. `second`: what happens `second_s` seconds later too, if anything.
    """

    way: str
    phase: str
    steps: int
    held: bool
    delay_s: float
    victim: int
    second: str = ""
    second_s: float = 0.0


@dataclass(frozen=True)
class Case:
    """A run and the blows that it gets, in order. `in_place`: the launcher or the batch step starts it again by itself."""

    where: str
    seed: int
    in_place: bool
    blows: tuple[Blow, ...]


def plan(where: str, seed: int) -> Case:
    """The case of a seed. Odd seeds restart in place."""
    generator, seconds = random.Random(f"{where} {seed}"), random.Random(f"second {seed}")
    made: list[Blow] = []
    while len(made) < BLOWS[where]:
        way = generator.choice(tuple(WAYS[where]))
        if sum("power" in blow.way for blow in made) == MOST_POWER_OFFS and "power" in way:
            continue
        # What is restored must have been saved.
        phases = [phase for phase in WAYS[where][way] if made or phase != RESTORING]
        phase = generator.choice(phases)
        held = way == FULL_DISK or (phase != TRAINING and way != "SIGSTOP a rank" and generator.random() < 0.4)
        longest_s = LONG_S if phase in (TRAINING, STARTING, READING) else SHORT_S
        blow = Blow(way, phase, generator.randint(0, 6), held, generator.random() * longest_s, generator.randint(0, 7))
        if where == SLURM and seed % 2 == 1 and way in FOLLOWED:
            blow = replace(blow, held=True, second=seconds.choice(SECOND), second_s=seconds.random() * SECOND_S)
        made.append(blow)
    return Case(where, seed, seed % 2 == 1, tuple(made))
