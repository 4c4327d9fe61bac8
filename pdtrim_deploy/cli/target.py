"""What a user puts under load: the URL of a running pair, or a bundle that is served meanwhile."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli.dry_run import programs
from pdtrim_deploy.cli.progress import Progress
from pdtrim_deploy.doctor import Asked, require
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest import Workers, check_target
from pdtrim_deploy.serving import Executors, ServeEnvironment, cluster_of, throttled
from pdtrim_deploy.sizing.link import Link


@dataclass(frozen=True)
class Target:
    """`bundle` is None for a URL; `link` is what its KV goes over, None: loopback as it is."""

    text: str
    bundle: Bundle | None
    executors: Executors | None
    serve_python: Path | None
    link: Link | None = None

    @classmethod
    def of(
        cls,
        text: str,
        executors: Executors | None,
        serve_python: Path | None = None,
        allow_remote: bool = False,
        link: Link | None = None,
    ) -> Target:
        """UserError: no complete bundle, no URL of this machine, or an executor or link for a pair that runs."""
        if "://" not in text:
            return cls(text, Bundle.open(Path(text)), executors, serve_python, link)
        for what, given in (("an executor", executors), ("a link", link)):
            if given is not None:
                raise UserError(f"{what} is for bundles, {text} runs already; leave one of them out")
        check_target(text, allow_remote)
        return cls(text, None, None, None)

    def described(self) -> dict[str, object]:
        """For `--dry-run`: what would be started, or asked."""
        if self.bundle is None:
            return {"url": self.text}
        return {"programs": programs(self.bundle, self.executors, self.serve_python)}

    def check(self) -> None:
        """Ask the doctor, before anything is started."""
        if self.bundle is not None:
            require("serve", Asked(serve_python=self.serve_python))

    def up(self, stack: ExitStack, progress: Progress, name: str) -> tuple[str, Workers | None]:
        """Its URL, served until `stack` ends if need be, and where its workers count."""
        if self.bundle is None:
            return self.text, None
        environment = ServeEnvironment.find(self.serve_python)
        starting = cluster_of(self.bundle, executors=self.executors, environment=environment, say=progress.note)
        with progress.show(f"serve {name}"):
            cluster = stack.enter_context(throttled(starting, self.link) if self.link else starting)
        return cluster.url, Workers.of(cluster)
