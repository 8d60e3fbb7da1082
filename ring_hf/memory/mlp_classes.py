"""The feed-forward classes of Transformers that may run over blocks of tokens: a generated table.

`python scripts/update_mlp_table.py` writes the text between the markers. It builds every family of Transformers that
a small configuration can build and runs the probe (`token_wise.py`) on it; `tests/memory/test_mlp_table.py` does the
same and compares. A class that is not listed is refused until `declare_mlp` has proven it.
"""

from dataclasses import dataclass, field

from torch import nn

from .sharded_weights import original_class


@dataclass(frozen=True)
class MlpSpec:
    """How the forward of a feed-forward class takes and returns tokens.

    Attributes:
        token_dims: for each argument that holds tokens, the number of dims after those of tokens: 1 for [B, S, D] and
            [T, D], 0 for [B, S] and [T].
        result_dims: the same for each result.
        returns_tuple: whether the results come in a tuple.
        is_called_once: in a forward pass of the model.
        inner_classes: qualified names of the classes inside the modules that were tried.
    """

    token_dims: dict[str, int]
    result_dims: tuple[int, ...] = (1,)
    returns_tuple: bool = False
    is_called_once: bool = True
    inner_classes: frozenset[str] = field(default=frozenset())


PREFIX = "transformers.models."
# _CLASSES: by the arguments of `forward` that hold tokens, with the number of dims that follow if it is not 1.
# _CALLED_AGAIN: those whose modules are called several times in a forward pass.
# _INNER_CLASSES: classes inside of them, and the activation functions of Transformers.
# generated: tables
_CLASSES = {
    "attention_output": """
        reformer.modeling_reformer.ChunkReformerFeedForward
    """,
    "hidden_states": """
        axk2.modeling_axk2.AXK2GateMLP codegen.modeling_codegen.CodeGenMLP
        cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeTextMLP dory.modeling_dory.DoryMLP
        gemma3n.modeling_gemma3n.Gemma3nTextMLP glm.modeling_glm.GlmMLP glm4.modeling_glm4.Glm4MLP
        glm4v.modeling_glm4v.Glm4vTextMLP glm_ocr.modeling_glm_ocr.GlmOcrTextMLP gpt2.modeling_gpt2.GPT2MLP
        gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeMLP gpt_neox.modeling_gpt_neox.GPTNeoXMLP
        gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseMLP gptj.modeling_gptj.GPTJMLP
        granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMLP
        kosmos2_5.modeling_kosmos2_5.Kosmos2_5TextFFN minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLDenseMLP
        modernbert_decoder.modeling_modernbert_decoder.ModernBertDecoderMLP moshi.modeling_moshi.MoshiGatingMLP
        nanochat.modeling_nanochat.NanoChatMLP persimmon.modeling_persimmon.PersimmonMLP phi.modeling_phi.PhiMLP
        phi3.modeling_phi3.Phi3MLP recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaMlp
        starcoder2.modeling_starcoder2.Starcoder2MLP
    """,
    "hidden_states gammas": """
        inkling.modeling_inkling.InklingSharedExperts
    """,
    "hidden_states input_ids:0": """
        deepseek_v4.modeling_deepseek_v4.DeepseekV4SparseMoeBlock
    """,
    "hidden_states residual": """
        bloom.modeling_bloom.BloomMLP mpt.modeling_mpt.MptMLP
    """,
    "hidden_states router_indices routing_weights": """
        gpt_oss.modeling_gpt_oss.GptOssExperts
    """,
    "hidden_states top_k_index top_k_weights": """
        afmoe.modeling_afmoe.AfmoeExperts aria.modeling_aria.AriaExperts axk1.modeling_axk1.AXK1Experts
        axk2.modeling_axk2.AXK2Experts bailing_hybrid.modeling_bailing_hybrid.BailingHybridExperts
        cohere2_moe.modeling_cohere2_moe.Cohere2MoeExperts dbrx.modeling_dbrx.DbrxExperts
        deepseek_v2.modeling_deepseek_v2.DeepseekV2Experts deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts
        deepseek_v32.modeling_deepseek_v32.DeepseekV32Experts dots1.modeling_dots1.Dots1Experts
        dots3_note.modeling_dots3_note.Dots3NoteExperts ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeExperts
        exaone_moe.modeling_exaone_moe.ExaoneMoeExperts flex_olmo.modeling_flex_olmo.FlexOlmoExperts
        flint.modeling_flint.FlintExperts glm4_moe.modeling_glm4_moe.Glm4MoeExperts
        glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteExperts glm4v_moe.modeling_glm4v_moe.Glm4vMoeTextExperts
        glm_moe_dsa.modeling_glm_moe_dsa.GlmMoeDsaExperts granitemoe.modeling_granitemoe.GraniteMoeExperts
        granitemoe_swa.modeling_granitemoe_swa.GraniteMoeSWAExperts
        granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridExperts
        granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedExperts
        hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.modeling_hy_v3.HYV3Experts
        hy_v4.modeling_hy_v4.HYV4Experts hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts
        inkling.modeling_inkling.InklingExperts jamba.modeling_jamba.JambaExperts
        kimi_linear.modeling_kimi_linear.KimiLinearExperts kolibri1.modeling_kolibri1.Kolibri1Experts
        laguna.modeling_laguna.LagunaExperts lara_mini.modeling_lara_mini.LaraMiniExperts
        longcat_flash.modeling_longcat_flash.LongcatFlashExperts mellum.modeling_mellum.MellumExperts
        mimo_v2_flash.modeling_mimo_v2_flash.MiMoV2FlashExperts minimax.modeling_minimax.MiniMaxExperts
        minimax_m2.modeling_minimax_m2.MiniMaxM2Experts minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts
        mistral4.modeling_mistral4.Mistral4Experts mistral_large4.modeling_mistral_large4.MistralLarge4TextExperts
        mixtral.modeling_mixtral.MixtralExperts nemotron_h.modeling_nemotron_h.NemotronHExperts
        olmoe.modeling_olmoe.OlmoeExperts phimoe.modeling_phimoe.PhimoeExperts
        qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeExperts
        qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts qwen3_next.modeling_qwen3_next.Qwen3NextExperts
        qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextExperts
        solar_open.modeling_solar_open.SolarOpenExperts zaya.modeling_zaya.ZayaExperts
    """,
    "input": """
        torch.nn.modules.container.Sequential
    """,
    "x": """
        afmoe.modeling_afmoe.AfmoeMLP apertus.modeling_apertus.ApertusMLP
        apertus1p5.modeling_apertus1p5.Apertus1p5TextMLP arcee.modeling_arcee.ArceeMLP
        aria.modeling_aria.AriaSharedExpertsMLP axk1.modeling_axk1.AXK1MLP axk2.modeling_axk2.AXK2MLP
        bailing_hybrid.modeling_bailing_hybrid.BailingHybridMLP bamba.modeling_bamba.BambaMLP
        beam.modeling_beam.BeamMLP bitnet.modeling_bitnet.BitNetMLP cohere.modeling_cohere.CohereMLP
        cohere2.modeling_cohere2.Cohere2MLP cohere2_moe.modeling_cohere2_moe.Cohere2MoeMLP
        cohere_compass.modeling_cohere_compass.CohereCompassMLP cwm.modeling_cwm.CwmMLP
        deepseek_v2.modeling_deepseek_v2.DeepseekV2MLP deepseek_v3.modeling_deepseek_v3.DeepseekV3MLP
        deepseek_v32.modeling_deepseek_v32.DeepseekV32MLP diffllama.modeling_diffllama.DiffLlamaMLP
        doge.modeling_doge.DogeMLP dots1.modeling_dots1.Dots1MLP dots3_note.modeling_dots3_note.Dots3NoteTextMLP
        emu3.modeling_emu3.Emu3MLP ernie4_5.modeling_ernie4_5.Ernie4_5MLP
        ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeMLP exaone4.modeling_exaone4.Exaone4MLP
        exaone_moe.modeling_exaone_moe.ExaoneMoeMLP falcon.modeling_falcon.FalconMLP
        falcon_h1.modeling_falcon_h1.FalconH1MLP flint.modeling_flint.FlintMLP gemma.modeling_gemma.GemmaMLP
        gemma2.modeling_gemma2.Gemma2MLP gemma3.modeling_gemma3.Gemma3MLP gemma4.modeling_gemma4.Gemma4TextMLP
        gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedTextMLP glm4_moe.modeling_glm4_moe.Glm4MoeMLP
        glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteMLP glm4v_moe.modeling_glm4v_moe.Glm4vMoeTextMLP
        glm_moe_dsa.modeling_glm_moe_dsa.GlmMoeDsaMLP granite.modeling_granite.GraniteMLP
        granite_docling.modeling_granite_docling.GraniteDoclingTextMLP
        granite_swa.modeling_granite_swa.GraniteSWAMLP helium.modeling_helium.HeliumMLP
        hrm_text.modeling_hrm_text.HrmTextMLP hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1MLP
        hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1MLP hy_v3.modeling_hy_v3.HYV3MLP
        hy_v4.modeling_hy_v4.HYV4MLP hy_v4_vl.modeling_hy_v4_vl.HYV4VLMLP
        hyperclovax.modeling_hyperclovax.HyperCLOVAXMLP jais2.modeling_jais2.Jais2MLP jamba.modeling_jamba.JambaMLP
        kimi_linear.modeling_kimi_linear.KimiLinearMLP kolibri1.modeling_kolibri1.Kolibri1MLP
        laguna.modeling_laguna.LagunaMLP lara_mini.modeling_lara_mini.LaraMiniMLP lfm2.modeling_lfm2.Lfm2MLP
        lfm2_moe.modeling_lfm2_moe.Lfm2MoeMLP lfm3.modeling_lfm3.Lfm3MLP llama.modeling_llama.LlamaMLP
        llama4.modeling_llama4.Llama4TextMLP longcat_flash.modeling_longcat_flash.LongcatFlashMLP
        mimo_v2_flash.modeling_mimo_v2_flash.MiMoV2FlashMLP minicpm3.modeling_minicpm3.MiniCPM3MLP
        ministral.modeling_ministral.MinistralMLP ministral3.modeling_ministral3.Ministral3MLP
        mistral.modeling_mistral.MistralMLP mistral4.modeling_mistral4.Mistral4MLP
        mistral_large4.modeling_mistral_large4.MistralLarge4TextMLP mllama.modeling_mllama.MllamaTextMLP
        nemotron_h.modeling_nemotron_h.NemotronHMLP olmo.modeling_olmo.OlmoMLP olmo2.modeling_olmo2.Olmo2MLP
        olmo3.modeling_olmo3.Olmo3MLP olmo_hybrid.modeling_olmo_hybrid.OlmoHybridMLP openai.modeling_openai.MLP
        paddleocr_vl.modeling_paddleocr_vl.PaddleOCRMLP qwen2.modeling_qwen2.Qwen2MLP
        qwen2_5_vl.modeling_qwen2_5_vl.Qwen2MLP qwen2_moe.modeling_qwen2_moe.Qwen2MoeMLP
        qwen2_vl.modeling_qwen2_vl.Qwen2MLP qwen3.modeling_qwen3.Qwen3MLP qwen3_5.modeling_qwen3_5.Qwen3_5MLP
        qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeMLP qwen3_next.modeling_qwen3_next.Qwen3NextMLP
        qwen3_vl.modeling_qwen3_vl.Qwen3VLTextMLP qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextMLP
        seed_oss.modeling_seed_oss.SeedOssMLP smollm3.modeling_smollm3.SmolLM3MLP
        solar_open.modeling_solar_open.SolarOpenMLP stablelm.modeling_stablelm.StableLmMLP
        step3p7.modeling_step3p7.Step3p7MLP vaultgemma.modeling_vaultgemma.VaultGemmaMLP
        youtu.modeling_youtu.YoutuMLP
    """,
}
_CALLED_AGAIN = """
    dory.modeling_dory.DoryMLP hrm_text.modeling_hrm_text.HrmTextMLP
"""
_INNER_CLASSES = """
    torch.nn.modules.activation.GELU torch.nn.modules.activation.Hardswish torch.nn.modules.activation.LeakyReLU
    torch.nn.modules.activation.PReLU torch.nn.modules.activation.ReLU torch.nn.modules.activation.ReLU6
    torch.nn.modules.activation.SiLU torch.nn.modules.activation.Sigmoid torch.nn.modules.activation.Tanh
    torch.nn.modules.dropout.Dropout torch.nn.modules.linear.Identity torch.nn.modules.linear.Linear
    torch.nn.modules.normalization.LayerNorm transformers.activations.AccurateGELUActivation
    transformers.activations.ClippedGELUActivation transformers.activations.FastGELUActivation
    transformers.activations.GELUActivation transformers.activations.GELUTanh
    transformers.activations.LaplaceActivation transformers.activations.LinearActivation
    transformers.activations.MishActivation transformers.activations.NewGELUActivation
    transformers.activations.QuickGELUActivation transformers.activations.ReLUSquaredActivation
    transformers.activations.SiLUActivation transformers.activations.SqrtSoftplusActivation
    transformers.activations.XIELUActivation transformers.models.bitnet.modeling_bitnet.BitNetRMSNorm
    transformers.models.bloom.modeling_bloom.BloomGelu transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU
    transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts
    transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4HashRouter
    transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4MLP
    transformers.models.dory.modeling_dory.DoryL2Norm transformers.models.falcon.modeling_falcon.FalconLinear
    transformers.models.reformer.modeling_reformer.ReformerFeedForwardDense
    transformers.models.reformer.modeling_reformer.ReformerFeedForwardOutput transformers.pytorch_utils.Conv1D
"""
# end of generated
# Of `experts_implementation`; the others need a GPU, so nothing is known about them here.
EXPERTS_IMPLEMENTATIONS = frozenset({None, "eager", "batched_mm", "grouped_mm"})


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _parse() -> dict[str, MlpSpec]:
    specs = {}
    for arguments, names in _CLASSES.items():
        pairs = [argument.partition(":") for argument in arguments.split()]
        token_dims = {name: int(num_dims or 1) for name, _, num_dims in pairs}
        for name in names.split():
            path = name if name.startswith("torch.") else PREFIX + name
            specs[path] = MlpSpec(token_dims, is_called_once=name not in _CALLED_AGAIN.split())
    return specs


MLP_CLASSES = _parse()
INNER_CLASSES = frozenset(_INNER_CLASSES.split())
_declared: dict[type, MlpSpec] = {}


def declare(kind: type, spec: MlpSpec) -> None:
    """Add a class to those that may run over blocks, in this process."""
    _declared[kind] = spec


def spec_of(module: nn.Module) -> MlpSpec | None:
    """Return how a module takes tokens, if exactly its class is listed or declared: a subclass may differ."""
    kind = original_class(module)
    return _declared.get(kind) or MLP_CLASSES.get(qualified_name(kind))
