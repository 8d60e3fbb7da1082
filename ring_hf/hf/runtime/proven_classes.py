"""Models that are proven by name and need no trial step: classes that `tests/hf/test_architectures.py` compares with
one process in the installed release, made of modules of Transformers and PyTorch alone, with no forward replaced and
no hook added.

Everything else is unknown: a subclass may add to the loss, a custom module may mix tokens, a hook may keep hidden
states for another loss. `find_unproven_module` names the first unknown part. The trial step then shows whether it is
exact.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer

_NAMES = """
    AXK1ForCausalLM AfmoeForCausalLM Apertus1p5TextForCausalLM ApertusForCausalLM ArceeForCausalLM
    AriaTextForCausalLM BeamForCausalLM BertLMHeadModel BitNetForCausalLM CTRLLMHeadModel CodeGenForCausalLM
    Cohere2ForCausalLM Cohere2MoeForCausalLM CohereCompassForCausalLM CohereForCausalLM CwmForCausalLM
    DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM DiffLlamaForCausalLM DoryForCausalLM
    Dots1ForCausalLM ElectraForCausalLM Emu3ForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM
    ErnieForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM FlexOlmoForCausalLM FlintForCausalLM FuyuForCausalLM
    GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForCausalLM GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    GlmForCausalLM GotOcr2ForConditionalGeneration GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HYV3ForCausalLM HeliumForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HyperCLOVAXForCausalLM Jais2ForCausalLM JetMoeForCausalLM Kolibri1ForCausalLM LagunaForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM MellumForCausalLM
    MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM Ministral3ForCausalLM
    MinistralForCausalLM MistralForCausalLM MixtralForCausalLM ModernBertDecoderForCausalLM MoshiForCausalLM
    MossTranscribeDiarizeForConditionalGeneration NanoChatForCausalLM OPTForCausalLM Olmo2ForCausalLM
    Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM RoCBertForCausalLM SeedOssForCausalLM
    SmolLM3ForCausalLM SolarOpenForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM YoutuForCausalLM
"""
PROVEN_CLASSES = frozenset(_NAMES.split())
# Releases of Transformers in which the classes were compared, and those that differ from one process there, because
# they compute a loss of their own from the labels of a shard. In other releases nothing is proven by name.
PROVEN_RELEASES: dict[str, frozenset[str]] = {
    "5.15": frozenset({"Gemma3ForConditionalGeneration", "ModernBertDecoderForCausalLM", "MoshiForCausalLM"}),
    "5.23": frozenset(),
    "5.24": frozenset(),
}
KNOWN_PACKAGES = {"torch", "transformers", "accelerate", "ring_hf", "bitsandbytes"}
KNOWN_HOOK_PACKAGES = KNOWN_PACKAGES | {"deepspeed"}  # its hooks gather weights, but its modules may mix tokens
HOOK_ATTRIBUTES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def original_class(module: nn.Module) -> type:
    """Return the class of a module before FSDP2, which replaces it by a subclass of its own class and this one."""
    module_class = type(module)
    bases = module_class.__bases__
    is_fsdp = bases[0].__module__.startswith("torch.distributed.fsdp") and len(bases) == 2
    return bases[1] if is_fsdp else module_class


def installed_release() -> str:
    """Return the first two numbers of the version of Transformers."""
    return ".".join(transformers.__version__.split(".")[:2])


def find_unproven_module(model: PreTrainedModel) -> str | None:
    """Return which part of a model is not proven by name, as the reason for a trial step, or None."""
    name, release = original_class(model).__name__, installed_release()
    if not _is_from(original_class(model), {"transformers"}) or name not in PROVEN_CLASSES:
        return f"{name} is not one of the classes that are proven by name"
    if name in PROVEN_RELEASES.get(release, PROVEN_CLASSES):
        return f"{name} is not proven by name in Transformers {release}"
    for path, module in model.named_modules():
        label = path or name
        if not _is_from(original_class(module), KNOWN_PACKAGES):
            return f"{label} is a {original_class(module).__name__}, which is not part of Transformers"
        forward = vars(module).get("forward")
        if forward is not None and "_original_forward" not in vars(module) and not _is_known(forward):
            return f"the forward of {label} was replaced"
        for hook in _hooks_of(module):
            if not _is_known(hook, KNOWN_HOOK_PACKAGES):
                return f"{label} has a hook, {getattr(hook, '__qualname__', type(hook).__name__)}"
    return None


def find_unproven_part(trainer: Trainer) -> str | None:
    """Return which part of a Trainer or its model is not proven by name, as the reason for a trial step, or None."""
    if type(trainer).__module__ not in ("transformers.trainer", "transformers.trainer_seq2seq"):
        return f"{type(trainer).__name__} is not Transformers' own Trainer"
    overrides = {name: value for name, value in vars(trainer).items() if callable(getattr(Trainer, name, None))}
    replaced = [name for name, method in overrides.items() if not _is_known(method)]
    replaced += [name for name in ("training_step", "compute_loss") if not _is_known(getattr(Trainer, name))]
    if replaced:
        return f"the Trainer's {replaced[0]} was replaced"
    model = trainer.accelerator.unwrap_model(trainer.model)  # FSDP version 1 wraps it in a module
    if not isinstance(model, PreTrainedModel):
        return f"the model is inside a {original_class(model).__name__}"
    return find_unproven_module(model)


def _hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in HOOK_ATTRIBUTES:
        yield from vars(module).get(name, {}).values()


def _is_known(function: Any, packages: set[str] = KNOWN_PACKAGES) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        owner = None
    return _is_from(type(owner) if owner is not None else getattr(function, "__func__", function), packages)


def _is_from(obj: Any, packages: set[str]) -> bool:
    return (getattr(obj, "__module__", None) or "").split(".")[0] in packages
