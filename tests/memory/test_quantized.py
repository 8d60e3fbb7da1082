"""Weights of 4 bits under the memory options: trying modules must not change them, nor the steps that follow."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ring_hf.memory import apply, token_wise
from tests.memory.models import model_of

OPTIONS = {
    "saved attention": {"attention": "save"},
    "blocks": {"attention": "none", "ffn_block": 20, "loss_block": 20},
}


class PacksWhenEvaluated(nn.Linear):
    """As bitsandbytes does on some CPUs."""

    def forward(self, x):
        if not self.training:
            self.weight.data = self.weight.data + 1
        return super().forward(x)


class WritesWhenEvaluated(nn.Linear):
    def forward(self, x):
        if not self.training:
            with torch.no_grad():
                self.weight.mul_(2)
        return super().forward(x)


class Marked(PacksWhenEvaluated):
    def __init__(self, size):
        super().__init__(size, size)
        self.weight.quant_state = "4 bits"


@pytest.mark.parametrize("kind", [PacksWhenEvaluated, WritesWhenEvaluated])
def test_a_module_that_changes_its_weights_when_it_is_tried_is_refused(kind):
    model = nn.Sequential(kind(4, 4))
    message = r"A module changed 0\.weight when it was tried in evaluation mode"
    with pytest.raises(ValueError, match=message), token_wise.preserved_state(model):
        model(torch.ones(1, 4))


def test_quantized_modules_are_tried_in_training_mode_and_go_back():
    model = nn.Sequential(Marked(4), nn.Dropout(0.5))
    model.eval()
    with token_wise.preserved_state(model):
        assert model[0].training and not model[1].training
        model(torch.ones(1, 4))
    assert not any(module.training for module in model.modules())


def quantized_steps(folder, storage, **options):
    """Loss and the adapters' gradients of one step."""
    from peft import LoraConfig, get_peft_model

    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**settings, bnb_4bit_quant_storage=storage)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    if options:
        apply(model, **options)
    tokens = torch.arange(96).view(2, 48) * 7 % 60
    loss = model.train()(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_adapters_on_4_bits_train_as_without_memory_options(tmp_path, name, storage):
    model_of("llama").save_pretrained(tmp_path)
    expected, gradients = quantized_steps(tmp_path, storage)
    got, ours = quantized_steps(tmp_path, storage, **OPTIONS[name])
    assert len(ours) == len(gradients) and all(g is not None for g in ours)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
