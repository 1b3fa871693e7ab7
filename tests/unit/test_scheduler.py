"""What the scheduler plans for a step."""

from __future__ import annotations

from dspark_ray.config import ResolvedConfig
from dspark_ray.engine.scheduler import Scheduler
from dspark_ray.engine.sequence import Sequence
from dspark_ray.types import Request

VOCAB = 61


def sequence(name: str, num_prompt: int, num_outputs: int = 0) -> Sequence:
    request = Request(request_id=name, prompt_token_ids=(1,) * num_prompt, output_token_ids=(2,) * num_outputs)
    return Sequence(request, eos_token_ids=(0,), vocab_size=VOCAB)


def test_a_sequence_that_is_preempted_and_admitted_again_in_one_plan_does_not_decode_in_it() -> None:
    """It holds a slot again, but nothing of it is in the cache."""
    config = ResolvedConfig(
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=64,
        page_size=8,
        num_pages=8,
        gamma=1,
        schedule="full",
        keep_quantised=False,
        kv_cache_dtype="float32",
    )
    scheduler = Scheduler(config)
    old, young = sequence("old", 60), sequence("young", 9, num_outputs=1)
    for each in (old, young):
        scheduler.add(each)
    scheduler._admit(), scheduler._admit()
    old.num_computed, young.num_computed = 40, 9
    scheduler.pool.grow(old.pages, 40)
    scheduler.pool.grow(young.pages, 11)
    assert young.is_decoding
    # Without this, its own need of pages keeps it out of the plan that took them away.
    scheduler._can_admit = lambda: len(scheduler.waiting) > 0  # type: ignore[method-assign]
    scheduler.pool.grow = lambda pages, num_positions: None  # type: ignore[method-assign]
    plan = scheduler.plan()
    assert scheduler.num_preemptions == 1
    assert [chunk.sequence for chunk in plan.prefill] == [old, young]
    assert plan.decoding == ()
