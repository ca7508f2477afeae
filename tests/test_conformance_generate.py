"""Options of `generate` mean with a prompt method what they mean without one.

The references are peft with the same weights, and full forward passes without a cache.
"""

import pytest
import torch
from test_conformance_transformers import family
from torch import nn

import minipeft
from minipeft import GPT, get_peft_model

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

METHODS = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 20}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
}
OPTIONS = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    {"do_sample": True, "num_return_sequences": 3},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"max_length": 14, "max_new_tokens": None},
    {"min_length": 14, "eos_token_id": list(range(1, 60))},
    {"prefill_chunk_size": 4},
    {"use_cache": False},
]


def two_models(kind: str, name: str):
    """minipeft and peft, with the same weights."""
    config, settings = METHODS[name]
    mine = get_peft_model(family(kind), getattr(minipeft, config)(**settings)).eval()
    settings = settings | {"task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(family(kind), getattr(peft, config)(**settings)).eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for p in mine.prompt_encoder.parameters():
            nn.init.normal_(p, std=0.5)
        for a, b in zip(encoder.parameters(), mine.prompt_encoder.parameters(), strict=True):
            a.copy_(b)
    return mine, theirs


@pytest.fixture
def batch() -> dict:
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("options", OPTIONS, ids=[", ".join(o) for o in OPTIONS])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_an_option_gives_what_it_gives_in_peft(batch, kind, name, options):
    mine, theirs = two_models(kind, name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    if options.pop("prefill_chunk_size", None):  # peft's result does not depend on it
        mine.generation_config.prefill_chunk_size = 4
    reference = theirs if options.get("use_cache", True) else two_models(kind, name)[1]
    torch.manual_seed(0)
    found = mine.generate(**batch, **options)
    torch.manual_seed(0)
    expected = reference.generate(**batch, **(options | {"use_cache": True}))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_a_dictionary_has_the_scores_of_the_real_tokens(batch, kind, name):
    mine, _ = two_models(kind, name)
    out = mine.generate(
        **batch, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, :9], batch["input_ids"])
    for i, logits in enumerate(out.logits):
        full = mine(out.sequences[:, : 9 + i]).logits[:, -1]
        assert torch.allclose(logits, full, rtol=1e-4, atol=1e-4)


def continued(model, ids, n: int = 6) -> torch.Tensor:
    """Greedy continuation by full forward passes without a cache."""
    for _ in range(n):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "ours"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_on_the_left_changes_no_token(batch, kind, name, use_cache, tmp_path):
    if kind == "ours":
        family("gpt2").save_pretrained(tmp_path)
        base = GPT.from_pretrained(tmp_path)
    else:
        base = family(kind)
    config, settings = METHODS[name]
    model = get_peft_model(base, getattr(minipeft, config)(**settings)).eval()
    batch["attention_mask"][0, :4] = 0
    more = {"pad_token_id": 0, "use_cache": use_cache} if kind != "ours" else {}
    found = model.generate(**batch, max_new_tokens=6, do_sample=False, **more)
    for i, n_pads in ((0, 4), (1, 0)):
        expected = continued(model, batch["input_ids"][i : i + 1, n_pads:])[0]
        ends = (expected[9 - n_pads :] == 0).nonzero()
        stop = len(expected) if not len(ends) else 9 - n_pads + int(ends[0]) + 1
        assert torch.equal(found[i, n_pads : n_pads + stop], expected[:stop])


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_the_right_does_not_change_the_logits_before_it(batch, name):
    for kind in ("gpt2", "llama"):
        model, _ = two_models(kind, name)
        mask = batch["attention_mask"].clone()
        mask[:, 6:] = 0
        found = model(batch["input_ids"], attention_mask=mask).logits[:, :6]
        assert torch.allclose(found, model(batch["input_ids"][:, :6]).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_ids_may_be_given_in_every_way_that_generate_knows(batch, kind, name):
    model, _ = two_models(kind, name)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.generation_config.eos_token_id = None
    settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = continued(model, ids, 5)
    assert torch.equal(model.generate(ids, settings), expected)
    assert torch.equal(model.generate(inputs=ids, generation_config=settings), expected)
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=mask, generation_config=settings), expected
    )
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
    assert torch.equal(new, expected[:, 9:])


@pytest.mark.parametrize("name", METHODS)
def test_options_that_count_cached_positions_are_refused(batch, name):
    model, _ = two_models("llama", name)
    cache = transformers.DynamicCache()
    refused = {
        "past_key_values": cache, "cache_implementation": "static", "assistant_early_exit": 1,
        "prompt_lookup_num_tokens": 2, "assistant_model": family("llama"),
    }  # fmt: skip
    for option, value in refused.items():
        with pytest.raises(ValueError, match=f"generate: {option} cannot be used with a prompt"):
            model.generate(**batch, max_new_tokens=3, **{option: value})
    static = transformers.GenerationConfig(cache_implementation="static")
    with pytest.raises(ValueError, match="cache_implementation cannot be used with a prompt"):
        model.generate(batch["input_ids"], static)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="cache_implementation cannot be used with a prompt"):
        model.generate(**batch, generation_config=transformers.GenerationConfig(max_new_tokens=3))


@pytest.mark.parametrize("name", METHODS)
def test_a_processor_may_call_the_model_with_padding(batch, name):
    """Its own call gets the prompt once, not twice, and so does `guidance_scale`."""
    model, _ = two_models("llama", name)
    batch["attention_mask"][0, :4] = 0
    seen = []

    def processor(ids, scores):
        mask = torch.cat((batch["attention_mask"], torch.ones_like(ids[:, 9:])), dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        seen.append((full - scores).abs().max().item())
        return scores

    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    processors = transformers.LogitsProcessorList([processor])
    model.generate(**batch, logits_processor=processors, **options)
    assert len(seen) >= 1
    assert max(seen) < 1e-4


def test_a_model_without_a_cache_gets_the_prompt_in_every_pass(batch):
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=3
    )
    base = transformers.OpenAIGPTLMHeadModel(config).eval()
    for p in base.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    model = get_peft_model(base, minipeft.PromptTuningConfig(num_virtual_tokens=3)).eval()
    found = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, continued(model, batch["input_ids"], 5))


SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def small(name: str, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma3Text", {"head_dim": 6, "sliding_window": 32}),
        ("Qwen3", {"head_dim": 6}),
        ("Mistral", {"sliding_window": 32}),
        ("Mixtral", {"num_local_experts": 2}),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_other_families_continue_as_full_forward_passes_do(batch, name, changes, method):
    config, settings = METHODS[method]
    model = get_peft_model(small(name, **changes), getattr(minipeft, config)(**settings)).eval()
    found = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, continued(model, batch["input_ids"], 5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small("Mamba", state_size=4), "no cache of keys and values"),
        (lambda: small("Lfm2", layer_types=["conv", "full_attention"]), "of one shape in all"),
        (
            lambda: small(
                "DeepseekV3", num_key_value_heads=4, qk_rope_head_dim=4, qk_nope_head_dim=4,
                v_head_dim=6, kv_lora_rank=8, q_lora_rank=8, n_routed_experts=2,
                n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16,
            ),
            "of one shape in all layers",
        ),
    ],
)  # fmt: skip
def test_a_prefix_is_refused_where_layers_cache_something_else(model, message):
    base = model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, minipeft.PrefixTuningConfig(num_virtual_tokens=3))
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_that_embeds_tokens_in_every_layer_is_refused():
    sizes = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 61, "head_dim": 6}
    base = small("Gemma3nText", **sizes, num_kv_shared_layers=0)
    with pytest.raises(ValueError, match="embeds tokens in every layer"):
        get_peft_model(base, minipeft.PromptTuningConfig(num_virtual_tokens=3))
