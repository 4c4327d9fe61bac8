"""What a user puts under load: the URL of a running pair, or a bundle that is served meanwhile."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli.dry_run import commands_of
from pdtrim_deploy.cli.progress import Progress
from pdtrim_deploy.doctor import CheckContext, require
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest import Workers, check_target
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.serving import (
    Cluster,
    Executors,
    ServeEnvironment,
    Transport,
    WorkerOptions,
    cluster_of,
    throttled,
)


@dataclass(frozen=True)
class Target:
    """`bundle` is None for a URL; `link` is what its KV goes over, by `transport`; None: loopback as it is, by TCP.

    `beside`: other targets are up at the same time.
    """

    text: str
    bundle: Bundle | None
    executors: Executors | None
    serve_python: Path | None
    link: Link | None = None
    transport: Transport | None = None
    beside: bool = False

    @classmethod
    def of(
        cls,
        text: str,
        executors: Executors | None,
        serve_python: Path | None = None,
        allow_remote: bool = False,
        link: Link | None = None,
        transport: Transport | None = None,
        beside: bool = False,
    ) -> Target:
        """UserError: no complete bundle, no URL of this machine, or what is for bundles is said of a pair that runs."""
        if "://" not in text:
            if link is not None and transport is not None and transport.backend != Transport().backend:
                raise UserError(
                    f"a link holds back {Transport().backend}, not {transport.backend}; leave one of them out"
                )
            return cls(text, Bundle.open(Path(text)), executors, serve_python, link, transport, beside)
        for what, given in (("an executor", executors), ("a link", link), ("a transport", transport)):
            if given is not None:
                raise UserError(f"{what} is for bundles, {text} runs already; leave one of them out")
        check_target(text, allow_remote)
        return cls(text, None, None, None)

    def described(self) -> dict[str, object]:
        """For `--dry-run`: what would be started, or asked."""
        if self.bundle is None:
            return {"url": self.text}
        return {"programs": commands_of(self._cluster(self.bundle, log_dir=Path()))}

    def check(self) -> None:
        """Ask the doctor, and whether engine and transport are there, before anything is started."""
        if self.bundle is not None:
            require("serve", CheckContext(serve_python=self.serve_python))
            self.described()

    def up(self, stack: ExitStack, progress: Progress, name: str) -> tuple[str, Workers | None]:
        """Its URL, served until `stack` ends if need be, and where its workers count."""
        if self.bundle is None:
            return self.text, None
        starting = self._cluster(self.bundle, say=progress.note)
        with progress.show(f"serve {name}"):
            cluster = stack.enter_context(throttled(starting, self.link) if self.link else starting)
        return cluster.url, Workers.of(cluster)

    def _cluster(self, bundle: Bundle, **more: Any) -> Cluster:
        environment, transport = ServeEnvironment.find(self.serve_python), self.transport or Transport()
        make = WorkerOptions.beside_others if self.beside else WorkerOptions
        options = make(transfer_backend=transport.backend, served_model_name=bundle.path.resolve().name)
        return cluster_of(
            bundle,
            executors=self.executors,
            options=options,
            transport=transport.options,
            environment=environment,
            **more,
        )
