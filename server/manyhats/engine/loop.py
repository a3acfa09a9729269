"""The step loop: one thread that schedules, runs and postprocesses, and the doors by which others
reach it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from manyhats.engine.interface import EngineObserver, EngineStats
from manyhats.engine.mailbox import Mailbox, Task
from manyhats.engine.postprocess import Postprocessor, RowProbe, adapter_name
from manyhats.engine.residency import AdapterResidency
from manyhats.engine.runner import ModelRunner
from manyhats.errors import DrainingError, EngineFailedError, ManyhatsError, QueueFullError
from manyhats.scheduler.deadlines import Deadlines, out_of_time
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import AdapterRef, GenerationRequest, OutputDelta, Priority, Schedule
from manyhats.types import Sequence as LiveSequence

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Deliver = Callable[[Sequence[OutputDelta]], None]

_SNAPSHOT_INTERVAL_S = 0.1


class EngineLoop:
    """Owns the scheduler, the runner and everything they change; nothing else touches them.

    ``start``, ``submit``, ``abort``, ``stats``, ``close_door`` and ``stop`` may be called from any
    thread; the rest runs on the step thread. ``deliver`` is called there too, once a step, with all
    that the step made. ``snapshot`` makes the statistics from (steps, failed steps). ``threads`` is
    the number that the step's arithmetic runs on; None: as many as the building thread's.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        postprocessor: Postprocessor,
        residency: AdapterResidency | None,
        observer: EngineObserver,
        deliver: Deliver,
        snapshot: Callable[[int, int], EngineStats],
        mailbox: Mailbox,
        max_queue: int,
        max_background: int,
        threads: int | None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._post = postprocessor
        self._residency = residency
        self._observer = observer
        self._deliver = deliver
        self._snapshot = snapshot
        self._mailbox = mailbox
        self._bounds = {Priority.NORMAL: max_queue, Priority.BACKGROUND: max_background}
        self._threads = threads or torch.get_num_threads()
        self._deadlines = Deadlines(postprocessor.open_requests)
        self._ready = threading.Event()
        self._sequence_ids = 0
        self._steps = 0
        self._failed_steps = 0
        self._stats = snapshot(0, 0)
        self._stats_at = time.monotonic()
        self._door = threading.Lock()  # guards the two below
        self._posted = dict.fromkeys(Priority, 0)  # submitted, not seen by the step thread yet
        self._waiting = dict.fromkeys(Priority, 0)  # in the scheduler's queues
        self._draining = False
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        """Starts the step thread and waits until it has set itself up."""
        self._thread.start()
        self._ready.wait()

    def submit(self, request: GenerationRequest, probe: RowProbe | None = None) -> None:
        """Queues a request; its deltas come through ``deliver``. ``probe`` (of a background request
        of one choice) is given the rows of its prompt that ``prompt_logprobs`` asks for.

        Raises QueueFullError over ``max_queue`` waiting sequences (``max_background`` of the
        background ones) and DrainingError once draining.
        """
        count, priority = len(request.params), request.priority
        with self._door:
            if not self.accepting:
                raise DrainingError("the server is shutting down and takes no new request")
            queued, bound = self._posted[priority] + self._waiting[priority], self._bounds[priority]
            if queued + count > bound:
                name = "max_queue" if priority is Priority.NORMAL else "max_background"
                raise QueueFullError(
                    f"the queue holds {queued} sequences and {count} more would pass its bound of "
                    f"{bound} ({name})",
                    retry_after_s=1.0,
                )
            self._posted[priority] += count
            self._mailbox.post(lambda: self._add(request, probe))

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; nothing more is delivered for it."""
        self._mailbox.post(partial(self._end, request_id))

    def between_steps(self, work: Callable[[], _T]) -> Future[_T]:
        """``work`` done on the step thread, between two steps; must be short.

        Nothing comes of it where the step loop does not run.
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - it is the waiting caller's
                future.set_exception(error)

        self._mailbox.post(run)
        return future

    def stats(self) -> EngineStats:
        """The latest snapshot, at most a tenth of a second old while steps run."""
        return self._stats

    @property
    def accepting(self) -> bool:
        """Whether ``submit`` takes requests."""
        return self._thread.is_alive() and not self._draining

    @property
    def failed(self) -> bool:
        """Whether the step thread has ended by a defect."""
        return self._failed

    def close_door(self) -> None:
        """Takes nothing new from now on. Waits for nothing: signal handlers may call it."""
        self._draining = True

    def stop(self) -> None:
        """Ends the step thread; requests that are still there get a DrainingError."""
        self.close_door()
        self._mailbox.post(self._stop)
        if self._thread.is_alive():
            self._thread.join()
        if self._residency is not None:
            self._residency.close()

    def step(self) -> bool:
        """Schedule, run, postprocess. False where nothing could be run until somebody posts, or a
        deadline comes.
        """
        self._expire(time.monotonic())
        schedule = self._scheduler.schedule(time.monotonic())
        self._tell(schedule)
        if not schedule.items:
            return False
        self._publish(self._process(schedule))
        return True

    def _run(self) -> None:
        torch.get_num_threads()  # torch sets up a thread's own count at its first use
        torch.set_num_threads(self._threads)
        self._ready.set()
        tasks: deque[Task] = deque()
        try:
            ran = False
            while not self._stopping:
                if not ran:
                    self._refresh_stats()  # nothing can be run until somebody posts
                idle_s = None if ran else self._deadlines.wait_s(time.monotonic())
                tasks.extend(self._mailbox.take(wait=not ran, timeout_s=idle_s))
                while tasks:
                    tasks.popleft()()
                ran = self.step()
            self._refresh_stats()
        except Exception as error:
            logger.critical("the step loop has ended by a defect", exc_info=True)
            self._failed = True
            with self._door:  # after this nobody posts a request any more
                self.close_door()
            self._take_in((*tasks, *self._mailbox.take(wait=False)))
            self._dismiss(EngineFailedError(f"the engine has failed: {error}"))

    def _take_in(self, tasks: Sequence[Task]) -> None:
        """Runs what was posted before the loop's end, so that those requests are told of it too."""
        for task in tasks:
            try:
                task()
            except Exception:
                logger.exception("a task failed after the step loop's end")

    def _process(self, schedule: Schedule) -> Sequence[OutputDelta]:
        started = time.monotonic()
        self._steps += 1
        try:
            deltas = self._post.process(schedule, self._runner.run(schedule))
        except Exception as error:
            self._failed_steps += 1
            logger.exception("step %d failed", self._steps)
            failure = EngineFailedError(f"the step that held this request failed: {error}")
            failed = list(dict.fromkeys(i.sequence.request_id for i in schedule.items))
            for request_id in failed:
                self._end(request_id)
            return [OutputDelta(request_id, 0, error=failure) for request_id in failed]
        decode = sum(1 for i in schedule.items if i.count == 1)
        self._observer.step(
            time.monotonic() - started, schedule.num_tokens - decode, decode, len(schedule.items)
        )
        return deltas

    def _tell(self, schedule: Schedule) -> None:
        """Reports what the scheduler decided beside the step itself."""
        now = time.monotonic()
        for sequence in self._scheduler.first_admissions:
            sequence.admitted_at = now
            self._observer.queued(adapter_name(sequence), now - sequence.arrival)
        for sequence in schedule.preempted:
            if not sequence.background:
                self._observer.preempted()
        failed = [
            OutputDelta(sequence.request_id, sequence.index, error=error)
            for sequence, error in self._scheduler.take_failed()
        ]
        for delta in failed:
            self._end(delta.request_id)
        self._set_waiting()
        if failed:
            self._publish(failed)

    def _add(self, request: GenerationRequest, probe: RowProbe | None) -> None:
        sequences = [self._sequence(request, index) for index in range(len(request.params))]
        with self._door:
            self._posted[request.priority] -= len(sequences)
        try:
            self._post.open(sequences, probe)
            self._scheduler.add_all(sequences)
        except ManyhatsError as error:
            self._post.close(sequences)
            self._publish([OutputDelta(request.request_id, 0, error=error)])
        else:
            if request.adapter is not None and self._residency is not None:
                self._residency.prefetch(request.adapter)
            if request.deadline is not None:
                self._deadlines.add(request.request_id, request.deadline)
        self._set_waiting()

    def _sequence(self, request: GenerationRequest, index: int) -> LiveSequence:
        worn = request.adapter.lanes if request.adapter is not None else (None,)
        if worn == (request.adapter,):
            virtual = request.adapter.virtual_tokens if request.adapter is not None else 0
            return self._computed(request, index, request.adapter, virtual)
        whole = self._computed(request, index, request.adapter, 0)
        whole.lanes = tuple(
            self._computed(request, index, lane, lane.virtual_tokens if lane is not None else 0)
            for lane in worn
        )
        for lane in whole.lanes:
            lane.whole = whole
        return whole

    def _computed(
        self, request: GenerationRequest, index: int, adapter: AdapterRef | None, virtual: int
    ) -> LiveSequence:
        self._sequence_ids += 1
        return LiveSequence(
            id=self._sequence_ids,
            request_id=request.request_id,
            index=index,
            tenant=request.tenant,
            params=request.params[index],
            adapter=adapter,
            arrival=request.arrival,
            deadline=request.deadline,
            urgency=request.urgency,
            priority=request.priority,
            scores_from=request.scores_from,
            keeps_logits=request.keeps_logits,
            prompt_len=virtual + len(request.prompt_token_ids),
            token_ids=[0] * virtual + list(request.prompt_token_ids),
        )

    def _end(self, request_id: str) -> bool:
        """Takes a request's sequences out, with their blocks and leases; whether there were any."""
        ended = self._scheduler.abort(request_id)
        self._post.close(ended)
        return bool(ended)

    def _expire(self, now: float) -> None:
        """Ends the requests whose time is up, with all they hold."""
        late = []
        for request_id in self._deadlines.expired(now):
            ended = self._scheduler.abort(request_id)
            self._post.close(ended)
            if ended:
                late.append(OutputDelta(request_id, 0, error=out_of_time(ended, now)))
        if late:
            self._set_waiting()
            self._publish(late)

    def _stop(self) -> None:
        self._stopping = True
        left = self._post.open_requests()
        self._dismiss(DrainingError("the server stopped before this request was done"))
        for request_id in left:
            self._end(request_id)

    def _dismiss(self, error: ManyhatsError) -> None:
        """Tells everybody whose request is still open that it will not be done."""
        self._deliver([OutputDelta(r, 0, error=error) for r in self._post.open_requests()])

    def _publish(self, deltas: Sequence[OutputDelta]) -> None:
        # Before the deltas: who has seen its request end finds it gone from the figures.
        if (
            any(d.finish_reason is not None or d.error is not None for d in deltas)
            or time.monotonic() - self._stats_at > _SNAPSHOT_INTERVAL_S
        ):
            self._refresh_stats()
        if deltas:
            self._deliver(deltas)

    def _refresh_stats(self) -> None:
        self._stats = self._snapshot(self._steps, self._failed_steps)
        self._stats_at = time.monotonic()

    def _set_waiting(self) -> None:
        with self._door:
            self._waiting[Priority.NORMAL] = self._scheduler.num_waiting
            self._waiting[Priority.BACKGROUND] = self._scheduler.num_background[0]
