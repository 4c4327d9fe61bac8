"""The target of a load: the URL of a running pair, or a bundle that is served during the load."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli.dry_run import commands_of
from pdtrim_deploy.cli.options import is_url
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
    """`bundle` is None for a URL. `link` limits the speed of its KV; None: unlimited. `transport` None: TCP.

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
        """UserError: no complete bundle, no URL of this machine, or an option for bundles was given with a URL."""
        if not is_url(text):
            if link is not None and transport is not None and transport.backend != Transport().backend:
                raise UserError(
                    f"--link works with {Transport().backend}, not with {transport.backend}; leave one of them out"
                )
            return cls(text, Bundle.open(Path(text)), executors, serve_python, link, transport, beside)
        for what, option in (("an executor", executors), ("a link", link), ("a transport", transport)):
            if option is not None:
                raise UserError(f"{what} is for bundles, but {text} already runs; leave one of them out")
        check_target(text, allow_remote)
        return cls(text, None, None, None)

    def described(self) -> dict[str, object]:
        """For `--dry-run`: the commands that would be started, or the URL."""
        if self.bundle is None:
            return {"url": self.text}
        return {"programs": commands_of(self._cluster(self.bundle, log_dir=Path()))}

    def check(self) -> None:
        """Check serve environment, engine and transport before anything is started."""
        if self.bundle is not None:
            if self.link is not None and self.bundle.plan.unified:
                raise UserError(
                    f"--link is for KV between two stages, and {self.text} is one model for both; leave it out"
                )
            require("serve", CheckContext(serve_python=self.serve_python))
            self.described()

    def up(self, stack: ExitStack, progress: Progress, name: str) -> tuple[str, Workers | None]:
        """Its URL, served until `stack` ends if it is a bundle, and its workers' metrics."""
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
