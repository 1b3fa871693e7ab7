"""A minimal application, for tests of the processes around an application."""

from __future__ import annotations

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    def __call__(self) -> str:
        return "hello"


app = Hello.bind()
