"""What is proven by name, and needs no trial step: classes of models that `tests/hf/test_architectures.py` compares
with one process, made of Transformers' and PyTorch's own modules, with nothing replaced or hooked in.

Everything else is unknown: a subclass may add to the loss, a module of one's own may mix tokens, a hook may keep
hidden states for a loss of its own. `find_unproven` says what it is; the trial step then says whether it is exact.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

_NAMES = """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AriaTextForCausalLM BeamForCausalLM
    BertLMHeadModel BitNetForCausalLM CTRLLMHeadModel Cohere2ForCausalLM Cohere2MoeForCausalLM
    CohereCompassForCausalLM CohereForCausalLM CwmForCausalLM DbrxForCausalLM DeepseekV2ForCausalLM
    DeepseekV3ForCausalLM DiffLlamaForCausalLM Dots1ForCausalLM ElectraForCausalLM Emu3ForCausalLM
    Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM ErnieForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM
    FlexOlmoForCausalLM FlintForCausalLM FuyuForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTNeoXForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForCausalLM GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM GlmForCausalLM GotOcr2ForConditionalGeneration GptOssForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM HYV3ForCausalLM HeliumForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HyperCLOVAXForCausalLM Jais2ForCausalLM JetMoeForCausalLM Kolibri1ForCausalLM
    LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM
    MellumForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM
    Ministral3ForCausalLM MinistralForCausalLM MistralForCausalLM MixtralForCausalLM ModernBertDecoderForCausalLM
    MoshiForCausalLM MossTranscribeDiarizeForConditionalGeneration NanoChatForCausalLM OPTForCausalLM
    Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM PersimmonForCausalLM Phi3ForCausalLM
    PhiForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM RoCBertForCausalLM
    SeedOssForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM
    YoutuForCausalLM
"""
PROVEN_CLASSES = frozenset(_NAMES.split())
KNOWN_PACKAGES = {"torch", "transformers", "accelerate", "ring_hf", "bitsandbytes"}
KNOWN_HOOKS = KNOWN_PACKAGES | {"deepspeed"}  # whose hooks gather weights; its modules may mix tokens
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def original_class(module: nn.Module) -> type:
    """Return the class of a module; FSDP2 puts a class of its own in front of it."""
    kind = type(module)
    in_front = kind.__bases__[0].__module__.startswith("torch.distributed.fsdp") and len(kind.__bases__) == 2
    return kind.__bases__[1] if in_front else kind


def find_unproven(model: PreTrainedModel) -> str | None:
    """Return what of a model is not proven by name, or None."""
    name = original_class(model).__name__
    if not _is_of(original_class(model), {"transformers"}) or name not in PROVEN_CLASSES:
        return f"{name} is not one of the classes that are proven by name"
    for path, module in model.named_modules():
        where = path or name
        if not _is_of(original_class(module), KNOWN_PACKAGES):
            return f"{where} is a {original_class(module).__name__}, which is not part of Transformers"
        replaced = vars(module).get("forward")
        if replaced is not None and "_original_forward" not in vars(module) and not _is_known(replaced):
            return f"the forward of {where} was replaced"
        for hook in _hooks_of(module):
            if not _is_known(hook, KNOWN_HOOKS):
                return f"{where} has a hook, {getattr(hook, '__qualname__', type(hook).__name__)}"
    return None


def find_unproven_path(trainer: Trainer) -> str | None:
    """Return what of a Trainer and the model in it is not proven by name, or None."""
    if type(trainer).__module__ not in ("transformers.trainer", "transformers.trainer_seq2seq"):
        return f"{type(trainer).__name__} is not Transformers' own Trainer"
    methods = {name: own for name, own in vars(trainer).items() if callable(getattr(Trainer, name, None))}
    replaced = [name for name, own in methods.items() if not _is_known(own)]
    replaced += [n for n in ("training_step", "compute_loss") if not _is_known(getattr(Trainer, n))]
    if replaced:
        return f"the Trainer's {replaced[0]} was replaced"
    model = trainer.accelerator.unwrap_model(trainer.model)  # FSDP version 1 puts a module around it
    if not isinstance(model, PreTrainedModel):
        return f"the model is inside a {original_class(model).__name__}"
    return find_unproven(model)


def _hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in HOOKS:
        yield from vars(module).get(name, {}).values()


def _is_known(function: Any, packages: set[str] = KNOWN_PACKAGES) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        owner = None
    return _is_of(type(owner) if owner is not None else getattr(function, "__func__", function), packages)


def _is_of(something: Any, packages: set[str]) -> bool:
    return (getattr(something, "__module__", None) or "").split(".")[0] in packages
