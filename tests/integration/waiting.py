"""For all workers: SGLang 0.5.23 waits asleep, so that those that compute on the same few cores have them.

A data-parallel controller looks for requests in a loop without a pause, and so does a scheduler while none of its
requests is ready to run. With DP attention a group of ranks that has no requests sleeps up to a second at a time, while
the other groups wait for it before each step. Called in the worker's process before SGLang starts. What is done with
requests stays as it is.
"""

from __future__ import annotations

import time
from typing import Any

PAUSE_S = 0.002  # of a scheduler, between two looks at requests that are not ready
GROUP_SLEEP_MS = 10


def wait_asleep(groups: bool) -> None:
    """From now on, in this process and in those that it forks; `groups`: with DP attention."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController, sock_recv
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    on_idle = Scheduler.on_idle

    def dispatch(controller: Any) -> None:
        while True:
            controller.soft_watchdog.feed()
            if controller.recv_from_tokenizer.poll(1000):
                controller._request_dispatcher(sock_recv(controller.recv_from_tokenizer))

    def pause(scheduler: Any) -> None:
        on_idle(scheduler)
        time.sleep(PAUSE_S)

    def doze(sleeper: Any) -> None:
        sleeper.poller.poll(GROUP_SLEEP_MS)

    DataParallelController.event_loop = dispatch
    Scheduler.on_idle = pause
    if groups:
        IdleSleeper.maybe_sleep = doze
