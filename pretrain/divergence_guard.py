"""Steps that may not be applied, in a running attempt: judged, announced, and rolled back. All methods are collective."""

from __future__ import annotations

from dataclasses import replace

from pretrain.checkpoint.random_state import set_random_state
from pretrain.checkpoint.restore import TrainingPosition, restore
from pretrain.checkpoint.rollback import begin_rollback, read_policy
from pretrain.divergence import DivergencePolicy, RefusedStep, StepDecision
from pretrain.engine.base import Engine
from pretrain.rank.rank_zero import run_on_rank_0
from pretrain.records import Records
from pretrain.resume import Restored
from pretrain.run.events import EventKind
from pretrain.session import Session


class DivergenceGuard:
    """Judges every step of an attempt. Needs open records: the policy's history is read from the record after its cut."""

    def __init__(self, session: Session, engine: Engine, restored: Restored, records: Records) -> None:
        self._session, self._engine, self._restored, self._records = session, engine, restored, records
        self._policy = self._read_policy(restored.position)

    def _read_policy(self, position: TrainingPosition) -> DivergencePolicy:
        """Rank 0 reads the history of the run up to `position`; every rank gets the same policy."""
        context = self._session.context
        return run_on_rank_0(lambda: read_policy(context.folder, context.config.divergence, position.consumed_samples))

    def judge(self, loss: float, grad_norm: float) -> StepDecision:
        """The decision on a step; `loss` in nats a token, `grad_norm` before clipping. Call it once a step."""
        return self._policy.judge(loss, grad_norm)

    def announce_skip(self, refused: RefusedStep) -> None:
        self._session.journal.tell(EventKind.SKIPPED_STEP, **refused.as_fields())

    def announce_end(self, refused: RefusedStep) -> None:
        self._session.journal.tell(EventKind.DIVERGED, **refused.as_fields())

    def roll_back(self, refused: RefusedStep) -> TrainingPosition | None:
        """Restore the engine from an earlier checkpoint and pass over the batches since. None: no checkpoint exists.

        No save may be under way.
        """
        context, announce = self._session.context, self._session.journal.announce
        folders = run_on_rank_0(lambda: begin_rollback(context.folder, context.config.divergence, refused, announce))
        if not folders:
            return None
        set_random_state(self._restored.seeded)
        found = restore(folders, self._engine, context.config.optimizer, False, announce)
        assert found is not None, "restore fills the engine or refuses"
        position = replace(found[0], consumed_samples=refused.samples)
        self._session.ending.restored_position = position
        run_on_rank_0(lambda: self._records.roll_back_to(position.step))
        self._policy = self._read_policy(position)
        return position
