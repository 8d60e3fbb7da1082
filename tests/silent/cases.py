"""The table of cases: scripts of users whose numbers were silently wrong, which hung, or which were refused late.

A case belongs to an item of `KINDS`. It must be *exact* (every number is that of one process with `sdpa`), *refused*
by all ranks with one message in time, or either. Cases that are not `listed` were invented. Those of them that must be
exact are close to a fault, but were exact without any check.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import counts, drift, endings, losses, padding, subclasses, wrappers
from .setting import Setting

EXACT, REFUSED, EITHER = "exact", "refused", "exact or refused"
# The latest moment at which a case may be refused.
CONSTRUCTION, FIRST_STEP, ANY_STEP = "at construction", "before the first step", "at any step"
LATEST = {1: ANY_STEP, 9: ANY_STEP, 10: ANY_STEP, 11: CONSTRUCTION, 12: ANY_STEP}
KINDS = {
    1: "ranks drift apart",
    2: "another loss is trained",
    3: "targets that are not counted",
    4: "losses and mixing inside a class",
    5: "wrappers that bypass the hooks",
    6: "wrappers that read tokens",
    7: "targets at padded positions",
    8: "missing config",
    9: "whole sequences during training",
    10: "pad tokens that do not exist",
    11: "Trainers and models that are refused late",
    12: "short rows",
}


@dataclass(frozen=True)
class Case:
    """One script.

    Attributes:
        item: a key of `KINDS`.
        run: the script, called on every rank.
        expected: `EXACT`, `REFUSED` or `EITHER`.
        listed: whether the case was reported; the others were invented.
        alone: whether it also runs with `ring_zigzag` in one process.
        timeout: seconds after which it counts as hanging.
    """

    item: int
    run: Callable[[Setting], None]
    expected: str
    listed: bool = False
    alone: bool = False
    needs_trl: bool = False
    timeout: int = 60

    @property
    def name(self) -> str:
        return f"{self.item}-{self.run.__name__}"

    @property
    def kind(self) -> str:
        return KINDS[self.item]

    @property
    def latest(self) -> str:
        return LATEST.get(self.item, FIRST_STEP)


def _cases(item: int, expected: str, *functions: Callable[[Setting], None], **flags: bool) -> list[Case]:
    return [Case(item, function, expected, **flags) for function in functions]


CASES: list[Case] = [
    *_cases(
        1,
        EITHER,
        drift.grouped_by_length,
        drift.grouped_rows_of_unequal_length,
        drift.weighted_sampler,
        drift.augmentation_in_rows_rare,
        drift.augmentation_in_collator_rare,
        listed=True,
    ),
    *_cases(
        1,
        EITHER,
        drift.subset_sampler,
        drift.augmentation_in_rows,
        drift.augmentation_in_collator,
        drift.augmentation_by_numpy_workers,
        drift.python_generator,
        drift.numpy_generator,
        drift.random_crops,
        drift.shuffled_stream,
        drift.hardest_rows_first,
    ),
    *_cases(1, REFUSED, drift.generator_of_the_system),
    *_cases(1, EXACT, drift.augmentation_without_workers),
    *_cases(2, EITHER, losses.weighted_cross_entropy, losses.focal_loss, losses.z_loss, losses.adalora, listed=True),
    Case(2, losses.sft_experts, EITHER, listed=True, needs_trl=True),
    *_cases(
        2,
        EITHER,
        losses.entropy_bonus,
        losses.repetition_penalty,
        losses.hidden_states_by_hook,
        losses.largest_activation_by_hook,
        losses.flooding,
        losses.clamped_loss,
        losses.scaled_by_rows,
        losses.distillation,
        losses.second_backward,
        losses.clipped_gradient_by_hook,
        losses.own_training_step,
        losses.shadow,
        losses.constant_factor,
    ),
    Case(2, losses.sft_dynamic_fine_tuning, EITHER, needs_trl=True),
    *_cases(2, REFUSED, losses.loss_function_of_the_trainer, listed=True),
    *_cases(2, EXACT, losses.weight_penalty, listed=True),
    *_cases(2, EXACT, losses.experts_in_trainer),
    *_cases(
        3,
        EITHER,
        counts.gemma4,
        counts.loop_with_guard,
        counts.loop_without_guard,
        counts.loop_with_guard_accumulated,
        counts.loop_without_guard_accumulated,
        listed=True,
    ),
    *_cases(
        3,
        EITHER,
        counts.model_that_takes_no_count,
        counts.model_that_takes_no_count_accumulated,
        counts.first_token_is_a_target,
        counts.override_without_count,
        counts.batches_without_count,
        counts.count_of_its_own_batch,
        counts.loop_with_count_of_a_shard,
        counts.loop_of_plain_pytorch,
        counts.loop_that_evaluates_without_guard,
    ),
    *_cases(3, EXACT, counts.loop_with_count_of_all, counts.loop_that_evaluates),
    *_cases(4, EITHER, subclasses.multi_token_prediction, listed=True),
    *_cases(
        4,
        EITHER,
        subclasses.own_cross_entropy,
        subclasses.later_tokens_weigh_more,
        subclasses.answers_only,
        subclasses.contrastive_neighbours,
        subclasses.pooled_head,
        subclasses.token_shift,
        subclasses.positions_of_its_own,
        subclasses.smoothed_labels_inside,
    ),
    *_cases(4, REFUSED, subclasses.noise_in_the_model),
    *_cases(4, EXACT, subclasses.harmless_subclass),
    *_cases(5, EITHER, wrappers.adaption_prompt, wrappers.adalora_evaluated, listed=True),
    *_cases(
        5,
        EITHER,
        wrappers.wrapper_that_calls_forward,
        wrappers.wrapper_that_calls_the_decoder,
        wrappers.wrapper_under_another_name,
        wrappers.xlora,
    ),
    *_cases(5, EXACT, wrappers.wrapper_that_does_no_harm, wrappers.replaced_forward),
    *_cases(6, EITHER, wrappers.activated_lora, listed=True),
    *_cases(
        6,
        EITHER,
        wrappers.prompt_of_first_tokens,
        wrappers.after_a_separator,
        wrappers.counts_of_tokens,
        wrappers.pairs_of_tokens,
        wrappers.mask_by_hook,
    ),
    *_cases(6, EITHER, wrappers.one_token_at_a_time),
    *_cases(7, EITHER, padding.padded_to_max_length, listed=True, alone=True),
    *_cases(
        7,
        EITHER,
        padding.labels_filled_with_the_pad_token,
        padding.two_ends_of_text,
        padding.padded_in_evaluation,
        alone=True,
    ),
    *_cases(
        7,
        EXACT,
        padding.first_padding_is_a_target,
        padding.padded_without_a_mask,
        padding.padded_but_ignored,
        alone=True,
    ),
    *_cases(8, REFUSED, padding.forgotten_config, padding.config_from_an_empty_environment, listed=True),
    *_cases(
        8,
        REFUSED,
        padding.environment_without_a_config,
        padding.forgotten_config_and_plain_collator,
        padding.config_left_in_another_arguments_object,
        padding.forgotten_config_in_a_loop,
        padding.forgotten_config_in_a_guarded_loop,
    ),
    *_cases(8, EXACT, padding.size_of_one),
    *_cases(
        9,
        EXACT,
        endings.generate_at_the_start_on_rank_0,
        endings.generate_at_step_5_on_rank_0,
        endings.train_then_generate,
        listed=True,
    ),
    *_cases(
        9,
        EXACT,
        endings.generate_at_the_start,
        endings.logits_at_the_start_on_rank_0,
        endings.logits_at_step_5_on_rank_0,
        endings.perplexity_at_step_5_on_rank_0,
        endings.train_then_logits,
    ),
    *_cases(10, EXACT, padding.pad_token_of_minus_one, padding.pad_token_beyond_the_vocabulary, listed=True),
    *_cases(10, EXACT, padding.pad_token_in_blocks),
    *_cases(10, EITHER, padding.pad_token_of_the_collator),
    Case(11, endings.sft_evaluated, EITHER, listed=True, needs_trl=True),
    Case(11, endings.dpo_trained, REFUSED, listed=True, needs_trl=True),
    Case(11, endings.sft_trained, EXACT, needs_trl=True),
    Case(11, endings.sft_packed, EITHER, needs_trl=True),
    *_cases(
        11,
        REFUSED,
        endings.generated_predictions,
        endings.compiled_in_place,
        endings.prompt_tuning,
        listed=True,
    ),
    *_cases(11, EITHER, endings.generated_predictions_without_metrics),
    *_cases(11, REFUSED, endings.compiled_layers, endings.compiled_copy, endings.p_tuning, endings.prefix_tuning),
    *_cases(12, EXACT, padding.short_batch, listed=True),
    *_cases(12, EXACT, padding.short_batch_in_evaluation),
    *_cases(12, EITHER, padding.packed_empty_example, listed=True),
]
BY_NAME = {case.name: case for case in CASES}
